"""Filling a sharded model from disk, each rank with its own part."""

from collections.abc import Callable
from typing import cast

from composer.core import Callback, State
from composer.loggers import Logger

from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.sharded import fill
from llmprune.models.source import Model
from llmprune.models.stored_weights import StoredWeights


class LoadShards(Callback):
    """Reads the weights of a model that was built empty: no rank ever holds more than its part.

    Use it with ``empty_model``. It acts after Composer has sharded the model and before it loads a checkpoint.
    """

    def __init__(self, model: Model, stored_name: Callable[[str], str | None] = lambda name: name) -> None:
        """Prepare.

        Args:
            model: a folder or hub name.
            stored_name: what a parameter is called there; None = it was added to the model and stays as it is.
        """
        self._source, self._stored_name = model, stored_name

    def before_load(self, state: State, logger: Logger) -> None:
        """Fill every parameter."""
        fill(cast(ComposerCausalLM, state.model).model, StoredWeights(self._source), self._stored_name)
