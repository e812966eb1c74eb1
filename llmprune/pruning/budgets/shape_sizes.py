"""How many parameters and bytes a model of another shape has, without building it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmprune.models.families import Parameter, Shape, family_of
from llmprune.models.stored_weights import parameter_names


class ShapeSizes:
    """The sizes of models with one config but for their shape; exact for every family."""

    def __init__(self, config: PretrainedConfig) -> None:
        """Look at a model of this config, without memory for its weights."""
        self.config, self.family = config, family_of(config)
        self.source = self.family.shape(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        located = {name: self.family.locate(name) for name in parameter_names(dict(model.named_parameters()), config)}
        # One block is like another, one expert like another.
        self._parts: list[tuple[Parameter, tuple[int, ...]]] = [
            (parameter, shapes[name])
            for name, parameter in located.items()
            if parameter.block in (None, 0) and parameter.expert in (None, 0)
        ]

    def parameters(self, shape: Shape) -> int:
        """The number of parameters of a model of ``shape``; a tied output layer counts once."""
        return sum(
            prod(self._axis(parameter, axis, size, shape) for axis, size in enumerate(sizes))
            * (1 if parameter.block is None else shape.layers)
            * (1 if parameter.expert is None else shape.experts or 1)
            for parameter, sizes in self._parts
        )

    def _axis(self, parameter: Parameter, axis: int, size: int, shape: Shape) -> int:
        meaning = parameter.axes[axis]
        if not meaning.dimensions:
            return size
        return sum(prod(shape.units(dimension)) * meaning.repeat for dimension in meaning.dimensions)

    def cache_bytes(self, shape: Shape, blocks: Sequence[int], *, batch: int, context: int, itemsize: int) -> int:
        """The bytes of a full key/value cache; blocks with a sliding window keep one token less than it.

        Args:
            shape: of the model.
            blocks: the source's number of each of its blocks' attention, [shape.layers].
            batch: sequences.
            context: tokens of each.
            itemsize: bytes of a number in it.
        """
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if kinds is None:
            kinds = ["full_attention" if window is None else "sliding_attention"] * self.source.layers
        tokens = sum(min(context, (window or context + 1) - 1) if "sliding" in kinds[b] else context for b in blocks)
        return 2 * tokens * batch * shape.kv_heads * shape.head_dim * itemsize


def prunable_dimensions(config: PretrainedConfig) -> tuple[str, ...]:
    """What of a model's shape can shrink, beside ``layers``: hidden, kv_heads, and intermediate or experts."""
    shape = family_of(config).shape(config)
    return ("hidden", "kv_heads", "intermediate" if shape.experts is None else "experts")


def of_size(source: Shape, sizes: Mapping[str, int]) -> Shape:
    """The shape with these sizes; query heads follow their groups."""
    heads = sizes.get("kv_heads", source.kv_heads) * source.heads_per_group
    return replace(source, **{**sizes, "heads": heads})  # type: ignore[arg-type]
