"""Checks of a model before it is saved: a checkpoint that can't be resumed from is not written."""

import math
from typing import cast

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist

from llmprune.checkpoints.checkpoint_folder import CheckpointFolder
from llmprune.models.causal_lm import Batch, ComposerCausalLM
from llmprune.models.finite import first_beyond
from llmprune.utils.errors import BrokenModelError

LARGEST = 1e10  # upper limit of a weight's absolute value
EXPLODED = 10  # limit of the loss over the loss of a uniform guess; a model that learns is far below it


class SaveGuard(Callback):
    """Ends the run instead of saving a model whose weights or loss are not finite or are extremely large.

    The loss is that of the last microbatch, computed again with the weights that are to be saved: after a step with a
    far too large learning rate, weights may be finite although the model is useless. While a checkpoint is being
    written, a note in its folder marks it as incomplete, so that an interrupted checkpoint is recognised.
    """

    def __init__(self, checkpoints: CheckpointFolder) -> None:
        """Store the folder of the checkpoints.

        Args:
            checkpoints: folder where checkpoints are written.
        """
        self._checkpoints = checkpoints
        self._batch: Batch | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Check the model before every save; callbacks that change the save interval must do so before this one."""
        for callback in state.callbacks:
            if isinstance(callback, CheckpointSaver):
                due = callback.save_interval
                callback.save_interval = lambda state, event, due=due: due(state, event) and self._approve(state)

    def after_loss(self, state: State, logger: Logger) -> None:
        """Store the last microbatch."""
        self._batch = state.batch

    def _approve(self, state: State) -> bool:
        """Check the model and note that its checkpoint is being written.

        Raises:
            BrokenModelError: on all ranks, if the model is broken.
        """
        batch = state.timestamp.batch.value
        found = [reason for reason in dist.all_gather_object(self._broken(state)) if reason]
        if found:
            raise BrokenModelError(
                f"{found[0]} after batch {batch}, so no checkpoint is written: the one before it is kept; resume from "
                "it with run.autoresume=true and a lower optimizer.lr"
            )
        if dist.get_global_rank() == 0:
            self._checkpoints.note_writing(batch)
        return True

    @torch.no_grad()
    def _broken(self, state: State) -> str:
        """Description of the error in this rank's part of the model; empty = no error."""
        model = cast(ComposerCausalLM, getattr(state.model, "module", state.model))
        name = first_beyond(model.named_parameters(), LARGEST)
        assert self._batch is not None
        training = model.training
        # This runs even if a weight is already broken, because the ranks of a sharded model wait for each other.
        with get_precision_context(state.precision, state.precision_config):
            found = model.eval().eval_forward(self._batch)
        model.train(training)
        if name is not None:
            return f"the weights have exploded ('{name.removeprefix('model.')}' is not below {LARGEST:g})"
        loss, uniform = float(found["loss"].sum() / found["tokens"].sum()), math.log(model.model.config.vocab_size)
        if loss < EXPLODED * uniform or not found["tokens"].any():
            return ""
        return f"the loss of the last samples is {loss:.3g} (a uniform guess has {uniform:.3g})"
