"""Surgery applies a plan; only this module changes the shapes of weights.

Surgery computes one named tensor at a time, so the same code cuts a model in memory and a model that is read from disk
shard by shard.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmprune.models.families import OUTPUTS, Axis, Family, Parameter, Role, family_of, module_name, skipped_of
from llmprune.models.own_model_types import with_richer_heads, with_skipped
from llmprune.models.smaller_tokenizer import renumbered
from llmprune.plans.plan import Plan
from llmprune.utils.errors import UserError


class Surgery:
    """Cuts the tensors of one model by one plan.

    Attributes:
        config: config of the pruned model.
    """

    def __init__(self, config: PretrainedConfig, plan: Plan) -> None:
        """Prepare to cut a model with ``config``.

        Raises:
            UserError: the plan is for another family or another shape, or no config can describe its result.
        """
        self.family: Family = family_of(config)
        shape = self.family.shape(config)
        if plan.family != self.family.name or not plan.source.agrees(shape):
            raise UserError(
                f"the plan is for a {plan.family} model with {plan.source}; this is a {self.family.name} "
                f"model with {shape}"
            )
        if self.family.is_parallel(config) and any(block.attention != block.mlp for block in plan.blocks):
            raise UserError(
                f"attention and MLP of this {self.family.name} model's blocks read the same input: they can't come "
                "from two blocks"
            )
        self.plan = plan
        self.config = self.family.with_shape(config, plan.shape, [block.attention for block in plan.blocks])
        if plan.vocabulary is not None:
            before = self.config.to_dict()
            for name, value in renumbered(before, plan.vocabulary).items():
                if value != before[name]:
                    setattr(self.config, name, value)
        skipped = self._skipped(config)
        if skipped or skipped_of(config):
            self.config = with_skipped(self.config, skipped)
        if plan.richer_heads is not None:
            self.config = with_richer_heads(self.config, plan.richer_heads)
        self._tied = self.family.tied(config)
        # (sub-layer, the source's block) → the block of the pruned model.
        self._position = {
            (sublayer, number): position
            for position, block in enumerate(plan.blocks)
            for sublayer, number in (("attention", block.attention), ("mlp", block.mlp))
        }
        self._kept = self._kept_units()
        self._factor = self._factors()

    def new_name(self, name: str) -> str | None:
        """The name of the parameter ``name`` in the pruned model.

        None if the parameter is removed: its block is removed, or it is the output layer of a tied model, which is
        stored as the embedding.
        """
        parameter = self.family.locate(name)
        if self._tied and parameter.role is Role.OUTPUT:
            return None
        if parameter.block is None:
            return name
        assert parameter.sublayer is not None
        position = self._position.get((parameter.sublayer, parameter.block))
        if position is None or (parameter.sublayer, parameter.block) in self.plan.skipped:
            return None
        if parameter.expert is not None:
            kept = self.plan.experts(self.plan.blocks[position])
            if parameter.expert not in kept:
                return None
            name = self.family.of_expert(name, kept.index(parameter.expert))
        return self._in_block(name, parameter.block, position)

    def _skipped(self, config: PretrainedConfig) -> dict[str, list[int]]:
        """The blocks of the pruned model that lack a sub-layer, by sub-layer: the plan's, and those of the source."""
        before = {(name, number) for name, numbers in skipped_of(config).items() for number in numbers}
        gone = before | set(self.plan.skipped)
        places = {
            name: [place for place, block in enumerate(self.plan.blocks) if (name, getattr(block, name)) in gone]
            for name in ("attention", "mlp")
        }
        return {name: found for name, found in places.items() if found}

    def added(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters, all zero, that the pruned model has in addition to the source's, by name."""
        if self.plan.richer_heads is None:
            return {}
        shape, shared = self.plan.shape, self.plan.richer_heads.shared
        rows = shape.head_dim if shared else shape.heads * shape.head_dim
        sizes = {"weight": (rows, shape.head_dim), "bias": (rows,)}
        places = [f"{self.family.blocks}.{block}.{module_name(self.family)}" for block in range(shape.layers)]
        return {f"{place}.{name}": size for place in places for name, size in sizes.items()}

    def cut(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """The parameter of the pruned model made from the source's parameter ``name``, which must be one that stays.

        Args:
            name: name of the parameter in the source.
            weights: weights of the source, by name; only ``name`` and the parameters that are merged into it or correct
                it are read.

        Returns:
            A tensor of the same dtype; factors, merges and corrections are computed in float32.
        """
        parameter = self.family.locate(name)
        tensor = self.whole(name, weights)
        dtype = tensor.dtype
        for axis, meaning in enumerate(parameter.axes):
            index = self._index(meaning, parameter)
            if index is not None:
                tensor = tensor.index_select(axis, index.to(tensor.device))
        factors = [
            (axis, self._factor[key])
            for axis, factor in enumerate(self.family.scaled_axes(parameter, self._tied))
            if (key := (factor, self._scope(parameter, factor))) in self._factor
        ]
        constant = self._constant(parameter)
        if factors or constant != 1:
            scaled = tensor.float() + parameter.offset
            for axis, factor in factors:
                view = [-1 if a == axis else 1 for a in range(tensor.ndim)]
                scaled = scaled * factor.to(tensor.device).view(view)
            tensor = scaled * constant - parameter.offset
        return tensor.to(dtype)

    def whole(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """The source's parameter ``name`` with merges and corrections, but not cut; see ``cut``."""
        parameter = self.family.locate(name)
        tensor = self._merged(name, parameter, weights)
        if parameter.role not in OUTPUTS or parameter.expert is not None:
            return tensor
        assert parameter.sublayer is not None and parameter.block is not None
        block = self.plan.blocks[self._position[parameter.sublayer, parameter.block]]
        place = f"{parameter.sublayer}.{parameter.block}"
        mean, linear, across = (self.plan.corrections.get(f"{kind}.{place}") for kind in ("mean", "linear", "across"))
        if mean is None and linear is None and across is None:
            return tensor
        kept, gone = self.plan.inputs(block, parameter.sublayer)
        if tensor.ndim == 2:
            corrected, index = tensor.float(), torch.tensor(kept, device=tensor.device)
            if linear is not None:
                corrected = corrected.index_add(1, index, corrected[:, gone] @ linear.to(tensor.device))
            if across is not None:
                corrected = corrected.index_add(1, index, across.to(tensor.device))
            return corrected.to(tensor.dtype)
        if mean is not None and tensor.ndim == 1:
            weight_name = name.removesuffix("bias") + "weight"
            weight = self._merged(weight_name, self.family.locate(weight_name), weights).float()
            return (tensor.float() + weight[:, gone] @ mean.to(tensor.device)).to(tensor.dtype)
        return tensor

    def cut_all(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the pruned model as (new name, tensor), each computed when it is requested."""
        for name in weights:
            if (new := self.new_name(name)) is not None:
                yield new, self.cut(name, weights)

    def _in_block(self, name: str, block: int, other: int) -> str:
        prefix = f"{self.family.blocks}.{block}."
        return f"{self.family.blocks}.{other}.{name[len(prefix) :]}"

    def _merged(self, name: str, parameter: Parameter, weights: Mapping[str, Tensor]) -> Tensor:
        """The tensor ``name``, or the weighted sum of its block's merge."""
        if parameter.block is None:
            return weights[name]
        assert parameter.sublayer is not None
        merge = self.plan.blocks[self._position[parameter.sublayer, parameter.block]].merge
        if merge is None:
            return weights[name]
        parts = ((weights[self._in_block(name, parameter.block, block)], weight) for block, weight in merge)
        first, weight = next(parts)
        total = first.float() * weight
        for part, weight in parts:
            total += part.float() * weight
        return total.to(first.dtype)

    def _constant(self, parameter: Parameter) -> float:
        """The factor that compensates the scaling of embeddings by the square root of the hidden size."""
        if not self.family.scaled_embedding:
            return 1.0
        ratio = math.sqrt(self.plan.source.hidden / self.plan.shape.hidden)
        if parameter.role is Role.EMBEDDING:
            return ratio
        return 1 / ratio if parameter.role is Role.FINAL_NORM and self._tied else 1.0

    @staticmethod
    def _scope(parameter: Parameter, what: str | None) -> int | None:
        """The block of a parameter's units; None for units of the whole model: hidden dimensions and tokens."""
        return None if what == "hidden" else parameter.block

    def _index(self, axis: Axis, parameter: Parameter) -> Tensor | None:
        """The rows or columns along an axis that stay; None = all."""
        if not any((dimension, self._scope(parameter, dimension)) in self._kept for dimension in axis.dimensions):
            return None
        rows, start = [], 0
        for dimension in axis.dimensions:
            count, size = self.plan.source.units(dimension)
            kept = self._kept.get((dimension, self._scope(parameter, dimension)), range(count))
            rows.append(start + _rows(kept, size * axis.repeat))
            start += count * size * axis.repeat
        return torch.cat(rows)

    def _kept_units(self) -> dict[tuple[str, int | None], Iterable[int]]:
        """The units that stay, by (dimension, block); absent = all."""
        plan = self.plan
        kept: dict[tuple[str, int | None], Iterable[int]] = {}
        if plan.hidden is not None:
            kept["hidden", None] = plan.hidden
        if plan.vocabulary is not None:
            kept["token", None] = plan.vocabulary
        for block in plan.blocks:
            if block.heads is not None:
                kept["query", block.attention] = block.heads
                kept["key_value", block.attention] = plan.heads_by_group(block)
            if block.channels is not None:
                kept["channel", block.mlp] = block.channels
            if block.experts is not None:
                kept["expert", block.mlp] = block.experts
        return kept

    def _factors(self) -> dict[tuple[str | None, int | None], Tensor]:
        """The factors of the kept rows or columns, by (factor, block); absent = one."""
        plan = self.plan
        factors: dict[tuple[str | None, int | None], Tensor] = {}
        hidden = plan.factors.get("hidden")
        if hidden is not None:
            factors["hidden", None] = hidden
        for position, block in enumerate(plan.blocks):
            for sublayer, index in (("attention", block.attention), ("mlp", block.mlp)):
                whole = plan.factors.get(sublayer)
                if hidden is not None or whole is not None:
                    dimensions = torch.ones(plan.shape.hidden) if hidden is None else hidden
                    factors[sublayer, index] = dimensions if whole is None else dimensions * whole[position]
            if (heads := plan.factors.get(f"heads.{block.attention}")) is not None:
                factors["query", block.attention] = heads.repeat_interleave(plan.source.head_dim)
            if (channels := plan.factors.get(f"channels.{block.mlp}")) is not None:
                factors["channel", block.mlp] = channels
        return factors


def _rows(units: Iterable[int], size: int) -> Tensor:
    """The row numbers of whole units: unit u has the rows u·size … (u+1)·size − 1."""
    return (torch.tensor(list(units))[:, None] * size + torch.arange(size)).flatten()
