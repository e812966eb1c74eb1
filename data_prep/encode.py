"""Tokenising batches of documents, in parallel and in order."""

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_prep.join import Encoded
from llmprune.data.sources import BadRecord, Document, Place
from llmprune.utils.processes import end_with


@dataclass
class Batch:
    """Documents that are tokenised together.

    Attributes:
        documents: documents to tokenise.
        bad: unreadable records between the documents.
        empty: number of documents without text between them, by domain and split.
        place: position in the inputs of the last of all these records.
        position: number of bytes of all inputs that had been read by then.
    """

    documents: list[Document] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    empty: Counter[tuple[str, str]] = field(default_factory=Counter)
    place: Place = (0, 0)
    position: int = 0


Pieces = tuple[tuple[str, bool], ...]  # texts of a document, each with a flag whether it is learned
Flat = tuple[NDArray[np.uint32], NDArray[np.bool_] | None, NDArray[np.int64]]  # ids, learned (None = all), lengths


@dataclass(frozen=True)
class Tokens:
    """Settings and tokenizer for turning documents into tokens.

    Attributes:
        backend: tokenizer.
        prefix: token ids placed before every document; learned, unless the document is in pieces.
        suffix: token ids placed after every document; learned.
    """

    backend: Tokenizer
    prefix: list[int]
    suffix: list[int]

    def encode(self, documents: list[Pieces]) -> Flat:
        """Tokenise documents; returns all ids, flags whether they are learned (None = all), and documents' lengths."""
        texts = [text for pieces in documents for text, _ in pieces]
        encodings = iter(self.backend.encode_batch_fast(texts, add_special_tokens=False))
        ids: list[int] = []
        lengths: list[int] = []
        silent: list[tuple[int, int]] = []  # ranges (begin, end) of tokens that are not learned
        for pieces in documents:
            begin = len(ids)
            ids += self.prefix
            if len(pieces) > 1:
                silent.append((begin, len(ids)))
            for _, learned in pieces:
                before = len(ids)
                ids += next(encodings).ids
                if not learned:
                    silent.append((before, len(ids)))
            ids += self.suffix
            lengths.append(len(ids) - begin)
        flags = np.ones(len(ids), bool) if silent else None
        for low, high in silent:
            assert flags is not None
            flags[low:high] = False
        return np.array(ids, np.uint32), flags, np.array(lengths, np.int64)


def _split(flat: Flat) -> list[Encoded]:
    ids, learned, lengths = flat
    if learned is None:
        learned = np.broadcast_to(True, len(ids))
    ends = np.cumsum(lengths).tolist()
    return [Encoded(ids[begin:end], learned[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


_tokens: Tokens  # the setting of this process; workers inherit it by fork


def encoded(
    tokens: Tokens, batches: Iterator[Batch], processes: int
) -> Generator[tuple[Batch, list[Encoded]], None, None]:
    """Yield every batch with its documents' tokens, in order; at most a few batches per process are in memory.

    When the generator is closed, or after an error, the processes finish their current batches and end.
    """
    global _tokens
    _tokens = tokens
    if processes == 1:
        for batch in batches:
            yield batch, _split(_encode(_pieces(batch)))
        return
    waiting: deque[tuple[Batch, Future[Flat]]] = deque()
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, _pieces(batch))))
            if len(waiting) > 4 * processes:
                done, future = waiting.popleft()
                yield done, _split(future.result())
        for done, future in waiting:
            yield done, _split(future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    end_with(parent.pid)


def _pieces(batch: Batch) -> list[Pieces]:
    return [document.pieces or ((document.text, True),) for document in batch.documents]


def _encode(documents: list[Pieces]) -> Flat:
    return _tokens.encode(documents)
