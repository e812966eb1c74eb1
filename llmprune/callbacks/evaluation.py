"""Tasks and texts beside the evaluation losses, as a Composer callback."""

from collections.abc import Callable

from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.models.causal_lm import composer_model

Measure = Callable[[PreTrainedModel, Callable[[dict[str, Tensor]], Tensor]], dict[str, float]]


class Evaluation(Callback):
    """Measures the model at the end of every evaluation, once for each batch that is evaluated at.

    It stands before ``L0Pruning`` among the callbacks, so that gates are still those of the evaluation.
    """

    def __init__(self, measure: Measure) -> None:
        """Prepare.

        Args:
            measure: from the model and its forward pass to metrics by name.
        """
        self._measure = measure
        self._measured_at: int | None = None

    def eval_end(self, state: State, logger: Logger) -> None:
        """Measure and log."""
        batch = state.timestamp.batch.value
        if batch == self._measured_at:
            return
        self._measured_at = batch
        wrapped = composer_model(state)
        with get_precision_context(state.precision, state.precision_config):
            found = self._measure(wrapped.model, wrapped.logits)
        logger.log_metrics({f"metrics/eval/{name}": value for name, value in found.items()})
