"""Filling a sharded model from disk, each rank with its own part."""

from pathlib import Path
from typing import cast

from composer.core import Callback, State
from composer.loggers import Logger

from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.sharded import fill
from llmprune.models.stored_weights import StoredWeights


class LoadShards(Callback):
    """Reads the weights of a model that was built empty: no rank ever holds more than its part.

    Use it with ``empty_model``. It acts after Composer has sharded the model and before it loads a checkpoint.
    """

    def __init__(self, model: str | Path) -> None:
        """Read from ``model``, a folder or hub name."""
        self._source = model

    def before_load(self, state: State, logger: Logger) -> None:
        """Fill every parameter."""
        fill(cast(ComposerCausalLM, state.model).model, StoredWeights(self._source))
