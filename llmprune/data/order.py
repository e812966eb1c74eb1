"""The order of the samples of one domain, which is computed and not stored.

A domain is split into partitions of equal size, which share no sample and, except where one ends and the next begins,
no shard. Each epoch permutes the shards of a partition and shuffles samples within a window of consecutive permuted
shards. Memory and time grow with the number of shards and the size of one window, never with the number of samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_EPOCH, _WINDOW, _LANES = 0, 1, 2  # uses of a random order


def keyed_generator(*key: int) -> np.random.Generator:
    """A random generator that depends only on ``key``."""
    return np.random.default_rng(np.random.SeedSequence([part & 0xFFFFFFFF for part in key]))


@dataclass(frozen=True)
class _Pieces:
    """Parts of shards: which shard, the first sample, and how many samples."""

    shards: NDArray[np.int64]
    begins: NDArray[np.int64]
    sizes: NDArray[np.int64]


class PartitionOrder:
    """The endless order of a partition's samples, from a sample's number to (shard, index within the shard)."""

    def __init__(self, pieces: _Pieces, key: tuple[int, ...], window: int) -> None:
        """Order ``pieces`` by the random ``key``, with ``window`` of them shuffled together."""
        self.samples = int(pieces.sizes.sum())
        self._pieces, self._key, self._window = pieces, key, window
        self._epoch = self._window_at = -1
        self._permuted: NDArray[np.int64] = np.empty(0, np.int64)
        self._ends: NDArray[np.int64] = np.empty(0, np.int64)
        self._shuffled: NDArray[np.int64] = np.empty(0, np.int64)

    def locate(self, number: int) -> tuple[int, int]:
        """The place of sample ``number`` (from 0, over all epochs), as (shard, index)."""
        epoch, position = divmod(number, self.samples)
        if epoch != self._epoch:
            self._epoch, self._window_at = epoch, -1
            self._permuted, self._ends = self._start(epoch)
        window = int(np.searchsorted(self._ends, position, side="right"))
        start = int(self._ends[window - 1]) if window else 0
        if window != self._window_at:
            self._window_at = window
            size = int(self._ends[window]) - start
            self._shuffled = keyed_generator(*self._key, epoch, _WINDOW, window).permutation(size)
        offset = int(self._shuffled[position - start])
        pieces = self._permuted[window * self._window : (window + 1) * self._window]
        ends = np.cumsum(self._pieces.sizes[pieces])
        within = int(np.searchsorted(ends, offset, side="right"))
        piece, offset = pieces[within], offset - (int(ends[within - 1]) if within else 0)
        return int(self._pieces.shards[piece]), int(self._pieces.begins[piece]) + offset

    @property
    def place(self) -> tuple[int, int]:
        """The epoch and the window of the sample that was located last."""
        return self._epoch, self._window_at

    def upcoming(self) -> list[int]:
        """The shards of the window of the sample located last, and of the next window."""
        first = self._window_at * self._window
        pieces = self._permuted[first : first + 2 * self._window]
        if first + self._window >= len(self._permuted):
            pieces = np.concatenate([pieces, self._start(self._epoch + 1)[0][: self._window]])
        return list(dict.fromkeys(self._pieces.shards[pieces].tolist()))

    def _start(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """An epoch's order of pieces, and the end of each of its windows."""
        permuted = keyed_generator(*self._key, epoch, _EPOCH).permutation(len(self._pieces.sizes))
        ends = np.cumsum(self._pieces.sizes[permuted])
        last = np.arange(self._window - 1, len(ends) + self._window - 1, self._window).clip(max=len(ends) - 1)
        return permuted, ends[np.unique(last)]


def domain_order(
    shard_sizes: Sequence[int], seed: int, domain: int, *, window: int = 8, partitions: int = 1
) -> list[PartitionOrder]:
    """The order of each partition of a domain; a partition has the same samples in all epochs.

    Args:
        shard_sizes: number of samples in each shard; in all at least as many samples as partitions.
        seed: seed of the run.
        domain: number of the domain, so that domains differ in their order.
        window: number of shards whose samples are shuffled together.
        partitions: number of partitions.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    dealt = keyed_generator(seed, domain, _LANES).permutation(len(sizes))
    ends = np.cumsum(sizes[dealt])
    begins, total = ends - sizes[dealt], int(sizes.sum())
    found = []
    for partition in range(partitions):
        low, high = total * partition // partitions, total * (partition + 1) // partitions
        first, last = np.searchsorted(ends, low, side="right"), np.searchsorted(begins, high, side="left")
        inside = slice(int(first), int(last))
        cut_low, cut_high = np.maximum(begins[inside], low), np.minimum(ends[inside], high)
        pieces = _Pieces(dealt[inside], cut_low - begins[inside], cut_high - cut_low)
        found.append(PartitionOrder(pieces, (seed, domain, partition), window))
    return found
