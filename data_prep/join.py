"""Joining documents into samples of a fixed length."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmprune.data.format import LEARNED, STARTS, TOKENS

_BEGIN = np.zeros(1, np.uint32)  # start of a sample, where a document begins or continues
_OPEN = 64  # number of samples that conversations are fitted into at a time

Ids = NDArray[np.uint32]
Row = dict[str, NDArray[np.generic]]  # a sample's values, by column


@dataclass(frozen=True, eq=False)
class Encoded:
    """A document's token ids and, for each, a flag whether a model learns it; both [tokens]."""

    ids: Ids
    learned: NDArray[np.bool_]

    def cut(self, length: int) -> "Encoded":
        """The document's first ``length`` tokens."""
        return self if len(self.ids) <= length else Encoded(self.ids[:length], self.learned[:length])


class Join(Protocol):
    """Joins the documents of one split of one domain."""

    def add(self, documents: Sequence[Encoded]) -> list[Row]:
        """Add documents; returns the samples that are now full."""

    def close(self) -> list[Row]:
        """Return the remaining samples."""

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Documents that wait for a sample to be full, as arrays."""

    def absorb(self, state: dict[str, NDArray[np.generic]]) -> list[Row]:
        """Add the waiting documents of another join; returns the samples that are now full."""


class JoinedText:
    """Concatenates documents, and cuts the text where a sample is full. An incomplete last sample is dropped."""

    def __init__(self, length: int, dtype: str) -> None:
        """Set the number of tokens of a sample, and the dtype of token ids."""
        self._length, self._dtype = length, np.dtype(dtype)
        self._ids: Ids = np.empty(0, np.uint32)
        self._starts: NDArray[np.uint32] = np.empty(0, np.uint32)

    def add(self, documents: Sequence[Encoded]) -> list[Row]:
        """Add documents; returns the samples that are now full."""
        sizes = [len(self._ids), *(len(document.ids) for document in documents)]
        return self._cut(
            np.concatenate([self._ids, *(document.ids for document in documents)]),
            np.concatenate([self._starts, np.cumsum(sizes[:-1], dtype=np.uint32)]),
        )

    def _cut(self, ids: Ids, starts: NDArray[np.uint32]) -> list[Row]:
        length = self._length
        whole = len(ids) // length
        rows = ids[: whole * length].astype(self._dtype).reshape(whole, length)
        cuts = np.searchsorted(starts, np.arange(1, whole + 1) * length)
        parts = np.split(starts, cuts)
        self._ids = ids[whole * length :].copy()  # a view would keep all of ids in memory
        self._starts = parts[-1] - np.uint32(whole * length)
        return [
            {TOKENS: row, STARTS: _from_begin(part - np.uint32(place * length))}
            for place, (row, part) in enumerate(zip(rows, parts[:-1], strict=True))
        ]

    def close(self) -> list[Row]:
        """Return no samples: the last tokens do not fill one."""
        return []

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The tokens of the incomplete sample, and the positions at which documents begin in it."""
        return {"ids": self._ids, "starts": self._starts}

    def absorb(self, state: dict[str, NDArray[np.generic]]) -> list[Row]:
        """Add the waiting tokens of another join; returns the samples that are now full."""
        ids, starts = state["ids"].astype(np.uint32), state["starts"].astype(np.uint32)
        if len(ids) and len(self._ids):
            starts = np.union1d(starts, [0])  # the rest of a document that began elsewhere counts as its own document
        joined = np.concatenate([self._starts, starts + len(self._ids)]).astype(np.uint32)
        return self._cut(np.concatenate([self._ids, ids]), joined)


def _from_begin(starts: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The positions at which documents begin, with 0 for a document that continues at the sample's start."""
    return starts if len(starts) and not starts[0] else np.concatenate([_BEGIN, starts])


@dataclass(eq=False)
class _Open:
    """A sample that is not full."""

    documents: list[Encoded] = field(default_factory=list)
    used: int = 0


class FittedConversations:
    """Places whole conversations in samples: each in the fullest open sample with room; padding fills the rest.

    Conversations that are longer than a sample are cut at its length.
    """

    def __init__(self, length: int, dtype: str, padding: int) -> None:
        """Set the number of tokens of a sample, the dtype of token ids, and the padding token, which is not learned."""
        self._length, self._dtype, self._padding = length, np.dtype(dtype), padding
        self._open: list[_Open] = []

    def add(self, documents: Sequence[Encoded]) -> list[Row]:
        """Add conversations; returns the samples that are now full."""
        full = []
        for whole in documents:
            document = whole.cut(self._length)
            size = len(document.ids)
            room = [sample for sample in self._open if sample.used + size <= self._length]
            if not room:
                room = [_Open()]
                self._open += room
            chosen = max(room, key=lambda sample: sample.used)
            chosen.documents.append(document)
            chosen.used += size
            if chosen.used == self._length:
                self._open.remove(chosen)
                full.append(chosen)
            elif len(self._open) > _OPEN:
                full.append(self._open.pop(max(range(len(self._open)), key=lambda place: self._open[place].used)))
        return [self._row(sample.documents) for sample in full]

    def close(self) -> list[Row]:
        """Return the remaining samples, padded."""
        rows = [self._row(sample.documents) for sample in self._open]
        self._open = []
        return rows

    def _row(self, documents: Iterable[Encoded]) -> Row:
        tokens = np.full(self._length, self._padding, self._dtype)
        learned = np.zeros(self._length, np.uint8)
        starts, place = [], 0
        for document in documents:
            end = place + len(document.ids)
            starts.append(place)
            tokens[place:end] = document.ids
            learned[place:end] = document.learned
            place = end
        starts += [place] if place < self._length else []
        return {TOKENS: tokens, STARTS: np.array(starts, np.uint32), LEARNED: learned}

    def state(self) -> dict[str, NDArray[np.generic]]:
        """The conversations of the samples that are not full, as arrays."""
        documents = [document for sample in self._open for document in sample.documents]
        return {
            "ids": np.concatenate([np.empty(0, np.uint32), *(d.ids for d in documents)]),
            "learned": np.concatenate([np.empty(0, bool), *(d.learned for d in documents)]),
            "sizes": np.array([len(d.ids) for d in documents], np.int64),
            "open": np.array([len(sample.documents) for sample in self._open], np.int64),
        }

    def absorb(self, state: dict[str, NDArray[np.generic]]) -> list[Row]:
        """Add the waiting conversations of another join; returns no samples, because none is full."""
        cuts = np.cumsum(state["sizes"])[:-1]
        ids, learned = state["ids"].astype(np.uint32), state["learned"].astype(bool)
        documents = [Encoded(*parts) for parts in zip(np.split(ids, cuts), np.split(learned, cuts), strict=True)]
        for count in state["open"].tolist():
            taken, documents = documents[:count], documents[count:]
            self._open.append(_Open(taken, sum(len(document.ids) for document in taken)))
        return []
