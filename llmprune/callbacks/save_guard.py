"""Looking at a model before it is saved: a checkpoint that can't be resumed from is not written."""

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

LARGEST = 1e10  # of a weight
EXPLODED = 10  # loss over that of a uniform guess, which no model that learns comes near


class SaveGuard(Callback):
    """Ends the run instead of saving weights that are not finite or absurdly large, or with which the loss is.

    The loss is that of the last microbatch, computed once more with the weights that are to be saved: after a step with
    far too large a learning rate weights may be finite, and nothing of use comes out of the model. A checkpoint that
    is being written has a note beside it, so that one which a kill has cut off is known as such.
    """

    def __init__(self, checkpoints: CheckpointFolder) -> None:
        """Prepare.

        Args:
            checkpoints: where they are written.
        """
        self._checkpoints = checkpoints
        self._batch: Batch | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Be asked whenever the checkpoint saver is about to save; whoever changes its interval does so before."""
        for callback in state.callbacks:
            if isinstance(callback, CheckpointSaver):
                due = callback.save_interval
                callback.save_interval = lambda state, event, due=due: due(state, event) and self._approve(state)

    def after_loss(self, state: State, logger: Logger) -> None:
        """Keep the last microbatch."""
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
        """What is wrong with this rank's part of the model; nothing = empty."""
        model = cast(ComposerCausalLM, getattr(state.model, "module", state.model))
        name = first_beyond(model.named_parameters(), LARGEST)
        assert self._batch is not None
        training = model.training
        # Also where a weight is broken already: the ranks of a sharded model wait for each other.
        with get_precision_context(state.precision, state.precision_config):
            found = model.eval().eval_forward(self._batch)
        model.train(training)
        if name is not None:
            return f"the weights have exploded ('{name.removeprefix('model.')}' is not below {LARGEST:g})"
        loss, uniform = float(found["loss"].sum() / found["tokens"].sum()), math.log(model.model.config.vocab_size)
        if loss < EXPLODED * uniform or not found["tokens"].any():
            return ""
        return f"the loss of the last samples is {loss:.3g} (a uniform guess has {uniform:.3g})"
