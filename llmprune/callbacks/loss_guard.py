"""Stopping a run whose loss is no number."""

import math

from composer.core import Callback, State
from composer.loggers import Logger

from llmprune.errors import UserError


class LossGuard(Callback):
    """Stops on a NaN or infinite loss, before anything is saved, and names the batch."""

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look at the batch's loss, which Composer has averaged over all ranks."""
        loss = state.total_loss_dict["loss/train/total"]
        if not math.isfinite(loss):
            batch = state.timestamp.batch.value - 1
            samples = state.previous_timestamp.sample.value if state.previous_timestamp else 0
            raise UserError(
                f"the loss is {loss} at batch {batch} (samples {samples} to "
                f"{state.timestamp.sample.value - 1}): the last "
                "checkpoint before it is kept; resume from it with autoresume=true and a lower optimizer.lr"
            )
