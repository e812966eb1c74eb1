"""Joining documents into samples of a fixed length and writing them as MDS shards."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from streaming import MDSWriter

from data_prep.encode import Batch, Encoded
from data_prep.split import exceptions_for, split_of
from llmprune.data.format import COLUMN, EVAL, TRAIN, SplitCounts
from llmprune.errors import UserError

_SHARD_BYTES = 1 << 26
_HELD_TOKENS = 1 << 24  # of a domain whose split is not settled; 64 MiB
_TAKEN_NAMES = {"manifest.json", "tokenizer"}  # of files and folders that stand beside the domains

Ids = NDArray[np.uint32]


@dataclass
class _Domain:
    """The documents of a domain that wait until it is known which split they belong to."""

    held: list[tuple[int, Ids]] = field(default_factory=list)  # rank, ids
    tokens: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, EVAL: 0})
    exceptions: dict[int, str] = field(default_factory=dict)
    settled: bool = False


class Packer:
    """Joins documents into samples and writes them, a stream per domain and split.

    The first documents of a domain are held until both of its splits have a sample's worth of tokens, so that a domain
    too small for that can still be split another way (see ``exceptions_for``). Holding changes no order.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sequence_length: int,
        eval_fraction: float,
        dtype: str,
        prefix: Sequence[int],
        suffix: Sequence[int],
    ) -> None:
        """Write below ``folder``; ``prefix`` and ``suffix`` are the ids put around every document."""
        self._folder, self._length, self._eval_fraction = folder, sequence_length, eval_fraction
        self._dtype = np.dtype(dtype)
        self._prefix, self._suffix = np.array(prefix, np.uint32), np.array(suffix, np.uint32)
        self._domains: dict[str, _Domain] = {}
        self._writers: dict[tuple[str, str], MDSWriter] = {}
        self._rest: dict[tuple[str, str], Ids] = {}
        self._counts: dict[tuple[str, str], SplitCounts] = {}
        self.documents = 0

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """Take the documents of one batch.

        Raises:
            UserError: a domain has the name of something else in the output.
        """
        ids, lengths = encoded
        arrived: dict[str, list[tuple[int, Ids]]] = {}
        documents = np.split(ids, np.cumsum(lengths)[:-1])
        for name, rank, document in zip(batch.domains, batch.ranks, documents, strict=True):
            arrived.setdefault(name, []).append((rank, document))
        self.documents += len(documents)
        for name, pieces in arrived.items():
            if name in _TAKEN_NAMES:
                raise UserError(f"a domain can't be named '{name}', the output has another use for it: pass --domain")
            domain = self._domains.setdefault(name, _Domain(settled=self._eval_fraction == 0))
            if domain.settled:
                self._pack(name, pieces)
            else:
                self._hold(name, pieces)

    def _hold(self, name: str, pieces: list[tuple[int, Ids]]) -> None:
        domain = self._domains[name]
        domain.held += pieces
        for rank, ids in pieces:
            domain.tokens[split_of(rank, self._eval_fraction, {})] += self._size(ids)
        both_have_samples = min(domain.tokens.values()) >= self._length
        if both_have_samples or sum(domain.tokens.values()) >= _HELD_TOKENS:
            self._settle(name)

    def _settle(self, name: str) -> None:
        domain = self._domains[name]
        ranks, sizes = [rank for rank, _ in domain.held], [self._size(ids) for _, ids in domain.held]
        domain.exceptions = exceptions_for(ranks, sizes, self._eval_fraction, self._length)
        domain.settled = True
        held, domain.held = domain.held, []
        self._pack(name, held)

    def _size(self, ids: Ids) -> int:
        return len(self._prefix) + len(ids) + len(self._suffix)

    def _pack(self, name: str, pieces: list[tuple[int, Ids]]) -> None:
        streams: dict[str, list[Ids]] = {}
        exceptions = self._domains[name].exceptions
        for rank, ids in pieces:
            split = split_of(rank, self._eval_fraction, exceptions)
            streams.setdefault(split, []).extend((self._prefix, ids, self._suffix))
            self._counts.setdefault((name, split), SplitCounts(0, 0, 0)).documents += 1
        for split, parts in streams.items():
            key = name, split
            self._write(key, np.concatenate([self._rest.get(key, parts[0][:0]), *parts]))

    def _write(self, key: tuple[str, str], ids: Ids) -> None:
        whole = len(ids) // self._length
        self._rest[key] = ids[whole * self._length :].copy()  # a view would keep all of ids in memory
        if not whole:
            return
        if key not in self._writers:
            self._writers[key] = MDSWriter(
                out=str(self._folder / key[0] / key[1]),
                columns={COLUMN: f"ndarray:{self._dtype}:{self._length}"},
                hashes=["xxh64"],
                size_limit=_SHARD_BYTES,
            )
        for sample in ids[: whole * self._length].astype(self._dtype).reshape(whole, self._length):
            self._writers[key].write({COLUMN: sample})
        self._counts[key].samples += whole
        self._counts[key].tokens += whole * self._length

    def finish(self) -> dict[str, dict[str, SplitCounts]]:
        """Close all shards; what each domain and split holds.

        Raises:
            UserError: there is no text, or a domain has not one training sample.
        """
        for name, domain in self._domains.items():
            if not domain.settled:
                self._settle(name)
        for writer in self._writers.values():
            writer.finish()
        if not self._domains:
            raise UserError("the inputs hold no text: give files with text, or name its field with --text-field")
        found: dict[str, dict[str, SplitCounts]] = {}
        for name in sorted(self._domains):
            train = self._counts.get((name, TRAIN), SplitCounts(0, 0, 0))
            if not train.samples:
                raise UserError(
                    f"the domain '{name}' is too short for one training sample of {self._length} tokens: "
                    "give it more text, or choose a smaller --sequence-length"
                )
            found[name] = {TRAIN: train}
            evaluation = self._counts.get((name, EVAL))
            if evaluation and evaluation.samples:
                found[name][EVAL] = evaluation
        return found
