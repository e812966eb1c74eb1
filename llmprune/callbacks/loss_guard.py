"""Watching the loss: stop on what is no number, and notice jumps."""

import logging
import math
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from llmprune.utils.errors import BrokenModelError

WINDOW, LEAST = 100, 20  # batches that a jump is measured against: at most, and at least

log = logging.getLogger(__name__)


class LossGuard(Callback):
    """Looks at every batch's loss, averaged over ranks, before any parameter is changed by it.

    A loss that is NaN or infinite ends the run; the last checkpoint is kept and the batch is named. A loss of more than
    ``factor`` times the mean of the last batches is a spike: it is logged, and on request the batch is skipped, which
    means that all gradients are dropped, so that neither the model nor its optimiser (nor gates) move.
    """

    def __init__(self, factor: float | None = None, *, skip: bool = False) -> None:
        """Prepare.

        Args:
            factor: loss / mean of the last batches from which on it is a spike; None = never.
            skip: whether a batch with a spike is skipped.
        """
        self._factor, self._skip = factor, skip
        self._sum: Tensor | None = None
        self._samples = 0
        self._recent = torch.full((WINDOW,), torch.nan, dtype=torch.float64)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Start a batch."""
        self._sum, self._samples = None, 0

    def after_loss(self, state: State, logger: Logger) -> None:
        """Add a microbatch."""
        samples = state.batch["input_ids"].shape[0]
        loss = torch.as_tensor(state.loss).detach().double() * samples
        self._sum = loss if self._sum is None else self._sum + loss
        self._samples += samples

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Judge the batch."""
        assert self._sum is not None
        total = torch.stack([self._sum, torch.as_tensor(float(self._samples), device=self._sum.device)])
        dist.all_reduce(total, reduce_operation="SUM")
        loss = (total[0] / total[1]).item()
        batch, first = state.timestamp.batch.value, state.timestamp.sample.value
        named = f"batch {batch} (samples {first} to {first + round(total[1].item()) - 1})"
        if not math.isfinite(loss):
            raise BrokenModelError(
                f"the loss is {loss} at {named}: the last checkpoint before it is kept; resume from it with "
                "run.autoresume=true and a lower optimizer.lr"
            )
        known = self._recent[self._recent.isfinite()]
        if self._factor is not None and len(known) >= LEAST and loss > self._factor * known.mean().item():
            logger.log_metrics({"loss/spike": loss})
            what = "skipped" if self._skip else "not skipped (train.loss_spike=skip would)"
            log.warning("the loss jumps from %.4f to %.4f at %s: %s", known.mean().item(), loss, named, what)
            if self._skip:
                state.model.zero_grad(set_to_none=True)
            return
        self._recent = torch.cat([self._recent[1:], torch.tensor([loss], dtype=torch.float64)])

    def state_dict(self) -> dict[str, Any]:
        """The last batches' losses."""
        return {"recent": self._recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._recent = state["recent"].clone()
