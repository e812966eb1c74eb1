"""The numbers of parameters and bytes of models of other shapes, without building them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmprune.models.families import Parameter, Shape, family_of
from llmprune.models.stored_weights import parameter_names


class ShapeSizes:
    """The sizes of models that have one config in all but the shape; exact for every family."""

    def __init__(self, config: PretrainedConfig) -> None:
        """Read the parameters of a model of this config, without memory for its weights."""
        self.config, self.family = config, family_of(config)
        self.source = self.family.shape(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        located = {name: self.family.locate(name) for name in parameter_names(dict(model.named_parameters()), config)}
        # All blocks have the same parameters, and so have all experts.
        self._parts: list[tuple[Parameter, tuple[int, ...]]] = [
            (parameter, shapes[name])
            for name, parameter in located.items()
            if parameter.block in (None, 0) and parameter.expert in (None, 0)
        ]

    def parameters(self, shape: Shape) -> int:
        """The number of parameters of a model of ``shape``; a tied output layer counts once."""
        shape = replace(shape, vocabulary=shape.vocabulary or self.source.vocabulary)
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
        """The bytes of a full key/value cache; blocks with a sliding window store one token less than the window.

        Args:
            shape: shape of the model.
            blocks: number of the source block whose attention each block has, [shape.layers].
            batch: number of sequences.
            context: number of tokens in each sequence.
            itemsize: bytes of a number in the cache.
        """
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if kinds is None:
            kinds = ["full_attention" if window is None else "sliding_attention"] * self.source.layers
        tokens = sum(min(context, (window or context + 1) - 1) if "sliding" in kinds[b] else context for b in blocks)
        return 2 * tokens * batch * shape.kv_heads * shape.head_dim * itemsize


def prunable_dimensions(config: PretrainedConfig) -> tuple[str, ...]:
    """The sizes of a model's shape that can shrink, without ``layers``: hidden, kv_heads, intermediate or experts."""
    shape = family_of(config).shape(config)
    return ("hidden", "kv_heads", "intermediate" if shape.experts is None else "experts")


def of_size(source: Shape, sizes: Mapping[str, int]) -> Shape:
    """The source's shape with other sizes; the number of query heads follows from that of the groups."""
    heads = sizes.get("kv_heads", source.kv_heads) * source.heads_per_group
    return replace(source, **{**sizes, "heads": heads})  # type: ignore[arg-type]
