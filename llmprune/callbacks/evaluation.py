"""Evaluation on tasks and texts in addition to the losses, as a Composer callback."""

from collections.abc import Callable

from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.models.causal_lm import composer_model

Measure = Callable[[PreTrainedModel, Callable[[dict[str, Tensor]], Tensor]], dict[str, float]]


class Evaluation(Callback):
    """Measures the model at the end of every evaluation, at most once per batch number.

    Place it before ``L0Pruning`` in the list of callbacks, so that the gates still have the values of the evaluation.
    """

    def __init__(self, measure: Measure) -> None:
        """Store the measurement function.

        Args:
            measure: function of the model and its forward pass that returns metrics by name.
        """
        self._measure = measure
        self._measured_at: int | None = None

    def eval_end(self, state: State, logger: Logger) -> None:
        """Measure the model and log the metrics."""
        batch = state.timestamp.batch.value
        if batch == self._measured_at:
            return
        self._measured_at = batch
        wrapped = composer_model(state)
        with get_precision_context(state.precision, state.precision_config):
            found = self._measure(wrapped.model, wrapped.logits)
        logger.log_metrics({f"metrics/eval/{name}": value for name, value in found.items()})
