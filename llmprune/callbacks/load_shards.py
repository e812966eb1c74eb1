"""Loading the weights of a sharded model from disk: each rank reads its own part."""

from collections.abc import Callable
from typing import cast

from composer.core import Callback, State
from composer.loggers import Logger

from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.sharded import fill
from llmprune.models.source import Model
from llmprune.models.stored_weights import StoredWeights


class LoadShards(Callback):
    """Reads the weights of a model that was built empty: no rank ever has more than its part in memory.

    Use it with ``empty_model``. It acts after Composer has sharded the model and before Composer loads a checkpoint.
    """

    def __init__(self, model: Model, stored_name: Callable[[str], str | None] = lambda name: name) -> None:
        """Store where the weights are.

        Args:
            model: folder or hub name of the model with the weights.
            stored_name: function from a parameter's name to its name in the files; None = the parameter was added to
                the model and is not read.
        """
        self._source, self._stored_name = model, stored_name

    def before_load(self, state: State, logger: Logger) -> None:
        """Read the value of every parameter."""
        fill(cast(ComposerCausalLM, state.model).model, StoredWeights(self._source), self._stored_name)
