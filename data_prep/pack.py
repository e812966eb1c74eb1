"""From documents to MDS shards of fixed-length samples."""

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from streaming import MDSWriter
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.sources import BadRecord, Document, Fields, documents, find_files
from llmprune.data.format import COLUMN, EVAL, TRAIN, DataManifest, SplitCounts, token_dtype, tokenizer_fingerprint
from llmprune.errors import UserError
from llmprune.files import output_folder, refuse_existing

_BATCH_CHARACTERS = 1_000_000
_SHARD_BYTES = 1 << 26
_EARLY_STOP = 100  # bad records, before the share of bad ones is looked at while reading

Key = tuple[str, str]  # domain, split


@dataclass(frozen=True)
class PackSettings:
    """How documents become samples.

    Attributes:
        sequence_length: tokens per sample.
        eval_fraction: share of the documents (by a hash of their text) that is kept for evaluation.
        bos: put the beginning-of-sequence token before every document.
        eos: put the end-of-sequence token after every document.
        max_bad: share of unreadable records that is put up with.
        seed: of the split.
    """

    sequence_length: int
    eval_fraction: float = 0.01
    bos: bool = False
    eos: bool = True
    max_bad: float = 0.01
    seed: int = 17


@dataclass
class Summary:
    """What ``prepare`` did: the manifest and the records that it skipped."""

    manifest: DataManifest
    bad: list[BadRecord] = field(default_factory=list)


def prepare(
    inputs: Sequence[Path],
    tokenizer: Path | str,
    out: Path | str,
    settings: PackSettings,
    *,
    fields: Fields | None = None,
    processes: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """Tokenise, pack and write documents, one folder per domain.

    Documents are tokenised in parallel, and packed and written in their order, so the result does not depend on the
    number of processes. Texts that are equal go to the same split. An incomplete last sample is dropped.

    Args:
        inputs: files and folders.
        tokenizer: folder or hub name of a fast tokenizer.
        out: folder to write (see ``llmprune.data.format``).
        settings: how.
        fields: of JSON records.
        processes: tokenising processes; None = one per core, 1 = this one.
        overwrite: whether ``out`` may be replaced.
        progress: show a bar on standard error.

    Raises:
        UserError: inputs, tokenizer or settings that can't work; too many bad records; a domain too short for one
            sample.
    """
    refuse_existing(Path(out), overwrite)
    if settings.sequence_length < 2:
        raise UserError(f"a sequence length of {settings.sequence_length} leaves nothing to predict: choose 2 or more")
    if not 0 <= settings.eval_fraction < 1:
        raise UserError(f"the evaluation fraction {settings.eval_fraction} must lie in [0, 1)")
    files = find_files(inputs)
    loaded = load_fast_tokenizer(tokenizer)
    prefix, suffix = _special_ids(loaded, settings, str(tokenizer))
    backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # the text "</s>" in a document is text
    dtype = token_dtype(len(loaded))
    bad: list[BadRecord] = []
    with (
        output_folder(out, overwrite) as folder,
        tqdm(total=sum(p.stat().st_size for p, _ in files), unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        packer = _Packer(folder, settings, np.dtype(dtype), prefix, suffix)
        batches = _batches(documents(files, fields or Fields()), settings, bad)
        for batch, (ids, lengths) in _encoded(backend, batches, processes or os.cpu_count() or 1):
            packer.add(batch.keys, ids, lengths)
            bar.update(batch.position - bar.n)
        _check_bad(bad, packer.documents, settings.max_bad)
        loaded.save_pretrained(folder / "tokenizer")
        manifest = DataManifest(
            sequence_length=settings.sequence_length,
            dtype=dtype,
            tokenizer=tokenizer_fingerprint(loaded),
            vocab_size=len(loaded),
            bos=settings.bos,
            eos=settings.eos,
            seed=settings.seed,
            domains=packer.finish(),
        )
        manifest.save(folder)
    return Summary(manifest, bad)


def load_fast_tokenizer(tokenizer: Path | str) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder or the hub.

    Raises:
        UserError: there is none, or it is not fast.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{tokenizer} has no usable tokenizer: {str(error).strip().splitlines()[0]}") from None
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer of {tokenizer} is not a fast one: convert it with transformers first")
    return loaded


def split_of(text: str, seed: int, eval_fraction: float) -> str:
    """The split that a text belongs to: a keyed hash decides, so equal texts are never on both sides."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=str(seed).encode())
    return EVAL if int.from_bytes(digest.digest(), "big") < eval_fraction * 2**64 else TRAIN


@dataclass(frozen=True)
class _Batch:
    """Documents that are tokenised in one go."""

    texts: list[str]
    keys: list[Key]
    position: int


def _batches(found: Iterable[Document | BadRecord], settings: PackSettings, bad: list[BadRecord]) -> Iterator[_Batch]:
    texts: list[str] = []
    keys: list[Key] = []
    characters = total = position = 0
    for item in found:
        if isinstance(item, BadRecord):
            bad.append(item)
            if len(bad) > _EARLY_STOP:
                _check_bad(bad, total, settings.max_bad)
            continue
        total += 1
        texts.append(item.text)
        keys.append((item.domain, split_of(item.text, settings.seed, settings.eval_fraction)))
        characters, position = characters + len(item.text), item.position
        if characters >= _BATCH_CHARACTERS:
            yield _Batch(texts, keys, position)
            texts, keys, characters = [], [], 0
    if texts:
        yield _Batch(texts, keys, position)


def _check_bad(bad: list[BadRecord], good: int, limit: float) -> None:
    if len(bad) > limit * (len(bad) + good):
        shown = "; ".join(f"{record.place}: {record.reason}" for record in bad[:3])
        raise UserError(
            f"{len(bad)} of {len(bad) + good} records can't be read, more than the {limit:.1%} allowed "
            f"by --max-bad: {shown}"
        )


_backend: Tokenizer  # of this worker process


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _encode(texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """All token ids of the texts, one after the other, and the length of each."""
    encodings = _backend.encode_batch_fast(texts, add_special_tokens=False)
    lengths = np.fromiter((len(e) for e in encodings), np.int64, len(encodings))
    parts = [np.asarray(e.ids, dtype=np.uint32) for e in encodings]
    return np.concatenate(parts), lengths


def _encoded(
    backend: Tokenizer, batches: Iterator[_Batch], processes: int
) -> Iterator[tuple[_Batch, tuple[NDArray[np.uint32], NDArray[np.int64]]]]:
    """Every batch with its ids, in order; at most a few batches per process are in memory."""
    global _backend
    _backend = backend  # children inherit it
    if processes == 1:
        for batch in batches:
            yield batch, _encode(batch.texts)
        return
    waiting: deque[tuple[_Batch, Future[tuple[NDArray[np.uint32], NDArray[np.int64]]]]] = deque()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch.texts)))
            if len(waiting) > 2 * processes:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


class _Packer:
    """Joins documents into samples and writes them, a stream per domain and split."""

    def __init__(
        self, folder: Path, settings: PackSettings, dtype: np.dtype[np.generic], prefix: list[int], suffix: list[int]
    ) -> None:
        self._folder, self._settings, self._dtype = folder, settings, dtype
        self._prefix, self._suffix = np.array(prefix, np.uint32), np.array(suffix, np.uint32)
        self._writers: dict[Key, MDSWriter] = {}
        self._rest: dict[Key, NDArray[np.uint32]] = {}
        self._counts: dict[Key, SplitCounts] = {}
        self.documents = 0

    def add(self, keys: list[Key], ids: NDArray[np.uint32], lengths: NDArray[np.int64]) -> None:
        """Take the documents of one batch: their ids one after the other, and the length of each."""
        pieces: dict[Key, list[NDArray[np.uint32]]] = {}
        for key, document in zip(keys, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
            pieces.setdefault(key, []).extend((self._prefix, document, self._suffix))
            self._counts.setdefault(key, SplitCounts(0, 0, 0)).documents += 1
            self.documents += 1
        for key, parts in pieces.items():
            self._write(key, np.concatenate([self._rest.get(key, parts[0][:0]), *parts]))

    def _write(self, key: Key, ids: NDArray[np.uint32]) -> None:
        length = self._settings.sequence_length
        whole = len(ids) // length
        self._rest[key] = ids[whole * length :]
        if not whole:
            return
        if key not in self._writers:
            self._writers[key] = MDSWriter(
                out=str(self._folder / key[0] / key[1]),
                columns={COLUMN: f"ndarray:{self._dtype}:{length}"},
                hashes=["xxh64"],
                size_limit=_SHARD_BYTES,
            )
        for sample in ids[: whole * length].astype(self._dtype).reshape(whole, length):
            self._writers[key].write({COLUMN: sample})
        self._counts[key].samples += whole
        self._counts[key].tokens += whole * length

    def finish(self) -> dict[str, dict[str, SplitCounts]]:
        """Close all shards; what each domain and split holds.

        Raises:
            UserError: a domain has not one training sample.
        """
        for writer in self._writers.values():
            writer.finish()
        domains: dict[str, dict[str, SplitCounts]] = {}
        for (domain, split), counts in sorted(self._counts.items()):
            splits = domains.setdefault(domain, {TRAIN: SplitCounts(0, 0, 0)})
            if counts.samples or split == TRAIN:
                splits[split] = counts
        if not domains:
            raise UserError("the inputs hold no text")
        for domain, splits in domains.items():
            if not splits[TRAIN].samples:
                raise UserError(
                    f"the domain '{domain}' is too short for one training sample of "
                    f"{self._settings.sequence_length} tokens: "
                    "give it more text, or choose a smaller --sequence-length"
                )
        return domains


def _special_ids(tokenizer: PreTrainedTokenizerFast, settings: PackSettings, name: str) -> tuple[list[int], list[int]]:
    """Ids put before and after every document."""
    for wanted, token, option in ((settings.bos, "bos", "--no-bos"), (settings.eos, "eos", "--no-eos")):
        if wanted and getattr(tokenizer, f"{token}_token_id") is None:
            raise UserError(f"the tokenizer of {name} has no {token.upper()} token: pass {option}")
    return (
        [tokenizer.bos_token_id] if settings.bos else [],
        [tokenizer.eos_token_id] if settings.eos else [],
    )
