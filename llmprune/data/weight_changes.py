"""Changes of domain weights that the training process sends to loader workers."""

from collections.abc import Sequence

import torch

WORKERS = 64  # largest number of loader processes per rank
ROWS = 1024  # largest number of changes in flight; each takes effect within a few dozen batches


class WeightChanges:
    """Changes of weights with the slots at which they take effect, in memory shared with loader workers.

    The shared memory has no name, so a killed process can't leave it allocated. One process writes changes; workers
    only read them, and write which slot they have reached.
    """

    def __init__(self, domains: int) -> None:
        """Reserve memory for changes of the weights of ``domains`` domains."""
        self._rows = torch.zeros(ROWS, domains + 1, dtype=torch.int64).share_memory_()
        self._written = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._reached = torch.zeros(WORKERS, dtype=torch.int64).share_memory_()

    def add(self, slot: int, weights: Sequence[int]) -> None:
        """Add weights that take effect at ``slot``; slots must be in ascending order.

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
        """All changes after the first ``seen``, as (slot, weights).

        Raises:
            RuntimeError: some of these changes are already overwritten.
        """
        written = int(self._written)
        if written - seen > ROWS:
            raise RuntimeError(f"{written - seen} changes of weights were not read in time; {ROWS} are kept")
        rows = (self._rows[number % ROWS].tolist() for number in range(seen, written))
        return [(slot, weights) for slot, *weights in rows]

    def reach(self, worker: int, slot: int) -> None:
        """Record that a worker begins the batch that ends before ``slot``."""
        self._reached[worker] = slot
