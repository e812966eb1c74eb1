"""Filling a sharded model from disk, each rank with its own part."""

from pathlib import Path
from typing import cast

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.loading import StoredWeights


class LoadShards(Callback):
    """Reads the weights of a model that was built empty: no rank ever holds more than its part.

    Use it with ``empty_model``. It acts after Composer has sharded the model and before it loads a checkpoint.
    """

    def __init__(self, model: str | Path) -> None:
        """Read from ``model``, a folder or hub name."""
        self._source = model

    @torch.no_grad()
    def before_load(self, state: State, logger: Logger) -> None:
        """Fill every parameter."""
        weights = StoredWeights(self._source)
        for name, parameter in cast(ComposerCausalLM, state.model).model.named_parameters():
            stored = name.replace("_checkpoint_wrapped_module.", "")
            assert isinstance(parameter, DTensor), name
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            rows = weights.rows(stored, offset[0], offset[0] + shape[0])
            parameter.to_local().copy_(rows)
