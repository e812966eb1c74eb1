"""Batches of documents to token ids, in parallel and in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer


@dataclass
class Batch:
    """Documents that are tokenised in one go.

    Attributes:
        texts: of the documents.
        domains: of the documents.
        ranks: of the documents (see ``data_prep.split``).
        position: bytes of all inputs that had been read after the last of them.
    """

    texts: list[str]
    domains: list[str]
    ranks: list[int]
    position: int


Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]  # all ids, one document after the other; the length of each

_backend: Tokenizer  # of this process; workers inherit it by fork


def encoded(
    backend: Tokenizer, batches: Iterator[Batch], processes: int
) -> Generator[tuple[Batch, Encoded], None, None]:
    """Every batch with its ids, in order; at most a few batches per process are in memory.

    Closing the generator, or an error, ends the processes after the batches that they are at.
    """
    global _backend
    _backend = backend
    if processes == 1:
        for batch in batches:
            yield batch, _encode(batch.texts)
        return
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch.texts)))
            if len(waiting) > 4 * processes:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> Encoded:
    encodings = _backend.encode_batch_fast(texts, add_special_tokens=False)
    lengths = np.fromiter((len(e) for e in encodings), np.int64, len(encodings))
    parts = [np.asarray(e.ids, dtype=np.uint32) for e in encodings]
    return np.concatenate(parts), lengths
