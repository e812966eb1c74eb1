"""Means of the terms of a loss over all tokens of a batch."""

from collections.abc import Mapping

import torch
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from llmprune.models.causal_lm import Batch, labels_of
from llmprune.models.objectives import predicting


class LossTerms:
    """Adds up the terms of the loss over microbatches and logs their means over all ranks."""

    def __init__(self, prefix: str) -> None:
        """Set the prefix of the logged names, ``prefix``/TERM."""
        self._prefix = prefix
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor], batch: Batch) -> None:
        """Add a microbatch's terms; each is a mean over the predicted tokens."""
        tokens = predicting(labels_of(batch)).sum()
        for name, value in {**terms, "tokens": torch.ones_like(tokens)}.items():
            self._sums[name] = self._sums.get(name, 0) + (value * tokens).double()

    def log(self, logger: Logger) -> None:
        """Log the means of the batch and reset the sums."""
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        dist.all_reduce(sums, reduce_operation="SUM")
        found = dict(zip(names, sums.tolist(), strict=True))
        tokens = max(found.pop("tokens"), 1)
        logger.log_metrics({f"{self._prefix}/{name}": value / tokens for name, value in found.items()})
        self._sums = {}
