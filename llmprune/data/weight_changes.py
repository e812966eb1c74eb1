"""Changes of weights on their way from the training process to loader workers."""

from collections.abc import Sequence

import torch

WORKERS = 64  # of a rank
ROWS = 1024  # changes that may be under way at a time; each takes effect within a few dozen batches


class WeightChanges:
    """Weights by the slot that they take effect at, in memory that loader workers share.

    The memory has no name that a killed process could leave behind. One process writes; workers only read, and say how
    far they have come.
    """

    def __init__(self, domains: int) -> None:
        """Make room for changes of so many domains."""
        self._rows = torch.zeros(ROWS, domains + 1, dtype=torch.int64).share_memory_()
        self._written = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._reached = torch.zeros(WORKERS, dtype=torch.int64).share_memory_()

    def add(self, slot: int, weights: Sequence[int]) -> None:
        """Announce weights from ``slot`` on; slots must come in ascending order.

        Raises:
            ValueError: a worker has passed the slot.
        """
        reached = int(self._reached.max())
        if slot < reached:
            raise ValueError(f"weights for slot {slot} come too late: slots up to {reached} are loaded")
        written = int(self._written)
        self._rows[written % ROWS] = torch.tensor([slot, *weights])
        self._written[0] = written + 1

    def since(self, seen: int) -> list[tuple[int, list[int]]]:
        """Every change but the first ``seen``: (slot, weights).

        Raises:
            RuntimeError: some of them are not there any more.
        """
        written = int(self._written)
        if written - seen > ROWS:
            raise RuntimeError(f"{written - seen} changes of weights were not read in time; {ROWS} are kept")
        rows = (self._rows[number % ROWS].tolist() for number in range(seen, written))
        return [(slot, weights) for slot, *weights in rows]

    def reach(self, worker: int, slot: int) -> None:
        """A worker begins the batch that ends before ``slot``."""
        self._reached[worker] = slot
