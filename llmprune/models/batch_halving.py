"""Processing of batches in smaller parts after memory runs out."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Work = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From a batch to results, both with the samples along the first axis."""

log = logging.getLogger(__name__)


class Halving:
    """Runs a function on whole batches, and on halves of them after memory runs out; the size that fits is kept.

    It can't be used with sharded models, whose ranks wait for each other in every forward pass.
    """

    def __init__(self) -> None:
        """Start with whole batches."""
        self._most: int | None = None

    def __call__(self, work: Work, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The results of ``work`` for a batch.

        Raises:
            RuntimeError: memory is not enough for one sample.
        """
        samples = len(next(iter(batch.values())))
        while True:
            size = min(samples, self._most or samples)
            parts = self._tried(work, batch, size, samples)
            if parts is not None:
                return parts[0] if len(parts) == 1 else {key: torch.cat([p[key] for p in parts]) for key in parts[0]}
            self._most = -(-size // 2)
            log.warning("out of memory with batches of %d samples: going on with %d", size, self._most)

    def _tried(
        self, work: Work, batch: Mapping[str, Tensor], size: int, samples: int
    ) -> list[dict[str, Tensor]] | None:
        """The results of parts of ``size`` samples; None if memory ran out."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        try:
            return [
                work({key: value[first : first + size] for key, value in batch.items()})
                for first in range(0, samples, size)
            ]
        except RuntimeError as error:
            ran_out = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
            if size == 1 or not ran_out:
                raise
        clear_device_cache(garbage_collection=True)  # after the error, which refers to the computed tensors
        return None
