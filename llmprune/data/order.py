"""In which order the samples of one domain come: computed, not stored.

Each epoch permutes the shards and shuffles samples within a window of consecutive permuted shards. Memory and time
grow with the number of shards and the size of one window, never with the number of samples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def keyed_generator(*key: int) -> np.random.Generator:
    """A random generator that depends on ``key`` alone."""
    return np.random.default_rng(np.random.SeedSequence([part & 0xFFFFFFFF for part in key]))


class DomainOrder:
    """The endless order of a domain's samples: sample number n → (shard, index within the shard)."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, domain: int, window: int = 8) -> None:
        """Prepare the order of one domain.

        Args:
            shard_sizes: samples per shard; at least one sample in all.
            seed: of the run.
            domain: the domain's number, so that domains differ in their order.
            window: shards whose samples are shuffled together.
        """
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(self._sizes.sum())
        self._key = (seed, domain)
        self._window = window
        self._epoch = -1
        self._shards: NDArray[np.int64] = np.empty(0, np.int64)
        self._ends: NDArray[np.int64] = np.empty(0, np.int64)
        self._window_at = -1
        self._shuffled: NDArray[np.int64] = np.empty(0, np.int64)

    def locate(self, number: int) -> tuple[int, int]:
        """Where the domain's sample ``number`` (from 0, over all epochs) lies: (shard, index)."""
        epoch, position = divmod(number, self.samples)
        if epoch != self._epoch:
            self._start_epoch(epoch)
        window = int(np.searchsorted(self._ends, position, side="right"))
        start = int(self._ends[window - 1]) if window else 0
        if window != self._window_at:
            self._window_at = window
            size = int(self._ends[window]) - start
            self._shuffled = keyed_generator(*self._key, epoch, 1, window).permutation(size)
        offset = int(self._shuffled[position - start])
        shards = self._shards[window * self._window : (window + 1) * self._window]
        ends = np.cumsum(self._sizes[shards])
        within = int(np.searchsorted(ends, offset, side="right"))
        return int(shards[within]), offset - (int(ends[within - 1]) if within else 0)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._window_at = epoch, -1
        self._shards = keyed_generator(*self._key, epoch, 0).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[self._shards])
        last = np.arange(self._window - 1, len(ends) + self._window - 1, self._window).clip(max=len(ends) - 1)
        self._ends = ends[np.unique(last)]
