"""Saving and leaving when the machine is about to be taken away."""

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

from llmprune.utils.processes import Termination


class Preempted(BaseException):
    """The job was asked to end and can go on; it is no error of the job's, so nothing else should catch it."""

    def __init__(self, kept: str) -> None:
        """Say what is kept."""
        super().__init__(f"asked to end: {kept}; run.autoresume=true goes on")


class Preemption(Callback):
    """Ends the run after the batch in which any rank got SIGTERM, once its checkpoint is written.

    Nothing else happens on the way: no evaluation that the undisturbed run would not have had, so that the run which
    goes on ends as that one. A run that is asked before its first batch ends there.
    """

    def __init__(self, termination: Termination) -> None:
        """Watch ``termination``."""
        self._termination = termination
        self._leaving = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Let the checkpoint saver save at other times, too."""
        for callback in state.callbacks:
            if isinstance(callback, CheckpointSaver):
                usual = callback.save_interval
                callback.save_interval = lambda state, event, usual=usual: (
                    (self._leaving and event == Event.BATCH_CHECKPOINT) or usual(state, event)
                )

    def batch_start(self, state: State, logger: Logger) -> None:
        """Leave, if the last batch was the last."""
        if self._leaving:
            dist.barrier()  # the launcher ends all ranks as soon as one has ended: none may still be writing
            raise Preempted(f"the run is saved after batch {state.timestamp.batch.value}")

    def batch_end(self, state: State, logger: Logger) -> None:
        """Agree with the other ranks on whether to leave."""
        asked = state.device.tensor_to_device(torch.tensor(int(self._termination.asked)))
        dist.all_reduce(asked, reduce_operation="MAX")
        self._leaving = bool(asked.item())
