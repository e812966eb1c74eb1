"""Saving a checkpoint and ending the run before the machine is taken away."""

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

from llmprune.utils.processes import Preempted, Termination


class Preemption(Callback):
    """Ends the run after the batch in which any rank got SIGTERM, after its checkpoint is written.

    It causes no additional evaluation, so the resumed run ends with the same result as an uninterrupted one. A run that
    gets SIGTERM before its first batch ends there.
    """

    def __init__(self, termination: Termination) -> None:
        """Store the object that records a request to end."""
        self._termination = termination
        self._leaving = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Make the checkpoint saver save also when the run is asked to end."""
        for callback in state.callbacks:
            if isinstance(callback, CheckpointSaver):
                usual = callback.save_interval
                callback.save_interval = lambda state, event, usual=usual: (
                    (self._leaving and event == Event.BATCH_CHECKPOINT) or usual(state, event)
                )

    def batch_start(self, state: State, logger: Logger) -> None:
        """End the run, if the previous batch was the last."""
        if self._leaving:
            dist.barrier()  # the launcher ends all ranks when the first one has ended: wait until all have written
            raise Preempted(f"the run is saved after batch {state.timestamp.batch.value}")

    def batch_end(self, state: State, logger: Logger) -> None:
        """Exchange with the other ranks whether to end."""
        asked = state.device.tensor_to_device(torch.tensor(int(self._termination.asked)))
        dist.all_reduce(asked, reduce_operation="MAX")
        self._leaving = bool(asked.item())
