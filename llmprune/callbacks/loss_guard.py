"""Checks of the training loss: stop if it is not finite, and detect spikes."""

import logging
import math
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from llmprune.utils.errors import BrokenModelError

WINDOW, LEAST = 100, 20  # largest and smallest number of earlier batches that a spike is measured against

log = logging.getLogger(__name__)


class LossGuard(Callback):
    """Checks every batch's loss, averaged over ranks, before the parameters change.

    A loss that is NaN or infinite ends the run; the error names the batch, and the last checkpoint is kept. A loss of
    more than ``factor`` times the mean of the last batches is a spike: it is logged, and on request the batch is
    skipped: all gradients are dropped, so the model, its optimiser and the gates do not change.
    """

    def __init__(self, factor: float | None = None, *, skip: bool = False) -> None:
        """Store the settings.

        Args:
            factor: ratio of a batch's loss to the mean of the last batches above which it is a spike; None = no check.
            skip: whether a batch with a spike is skipped.
        """
        self._factor, self._skip = factor, skip
        self._sum: Tensor | None = None
        self._samples = 0
        self._recent = torch.full((WINDOW,), torch.nan, dtype=torch.float64)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Reset the sums for a new batch."""
        self._sum, self._samples = None, 0

    def after_loss(self, state: State, logger: Logger) -> None:
        """Add the loss of a microbatch."""
        samples = state.batch["input_ids"].shape[0]
        loss = torch.as_tensor(state.loss).detach().double() * samples
        self._sum = loss if self._sum is None else self._sum + loss
        self._samples += samples

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Check the loss of the batch.

        Raises:
            BrokenModelError: on all ranks, if the loss is NaN or infinite.
        """
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
        """The losses of the last batches."""
        return {"recent": self._recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state."""
        self._recent = state["recent"].clone()
