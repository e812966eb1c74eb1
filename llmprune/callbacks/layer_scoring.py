"""Scoring of blocks as a Composer callback."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from llmprune.models.causal_lm import composer_model
from llmprune.pruning.scoring.scorer import Scorer
from llmprune.pruning.scoring.settings import LayerScoringConfig

CALIBRATION = "calibration"


class LayerScoring(Callback):
    """Scores the blocks of a model while the evaluator called ``calibration`` runs.

    The criteria observe the evaluation's own forward pass. Every rank reads its share of the samples; sums are added up
    over ranks at the end, so any number of ranks gives the same scores.
    """

    def __init__(self, config: LayerScoringConfig, told: Callable[[int], object] = lambda passes: None) -> None:
        """Store the settings; the next calibration evaluation scores the model.

        Args:
            config: criteria and their settings.
            told: function that is called with the number of passes through blocks that were made, see ``Scorer``.
        """
        self._config, self._told = config, told
        self._scorer: Scorer | None = None
        self._watching = ExitStack()
        self.scores: Mapping[str, Mapping[str, Any]] = {}
        self.perplexity: float | None = None

    def eval_start(self, state: State, logger: Logger) -> None:
        """Start with empty sums.

        Raises:
            UserError: a setting is unknown, or a criterion does not fit this model.
        """
        if state.dataloader_label != CALIBRATION:
            return
        model, config = composer_model(state), self._config
        self._scorer = Scorer(
            model.model,
            config.names(model.model.config),
            config.job(model.model.config, next(model.parameters()).device),
            batch_size=config.batch_size,
            told=self._told,
        )

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        """Observe the forward pass of the batch."""
        if self._scorer is not None:
            self._watching.enter_context(self._scorer.watching(state.batch["input_ids"]))

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Stop observing, and complete the computations for the batch."""
        self._watching.close()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Add up the sums over ranks, and compute the scores."""
        if self._scorer is not None:
            self.scores = self._scorer.scores(_add_up)
            self.perplexity = self._scorer.perplexity()
            self._scorer = None

    def state_dict(self) -> dict[str, Any]:
        """The scores: plain numbers."""
        return {"scores": self.scores, "perplexity": self.perplexity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore saved scores."""
        self.scores, self.perplexity = state["scores"], state["perplexity"]


def _add_up(sums: Tensor) -> None:
    if dist.get_world_size() > 1:
        dist.all_reduce(sums, reduce_operation="SUM")
