"""Carrying out a plan: the only place that changes shapes.

Surgery works on one named tensor at a time, so the same code cuts a model in memory and one that is streamed from disk
shard by shard.
"""

from collections.abc import Iterable, Iterator

import torch
from transformers import PretrainedConfig

from llmprune.errors import UserError
from llmprune.families import Family, Parameter, Role, family_of
from llmprune.plans import Plan


class Surgery:
    """Cuts the tensors of one model by one plan.

    Attributes:
        config: the cut model's config.
    """

    def __init__(self, config: PretrainedConfig, plan: Plan) -> None:
        """Prepare to cut a model with ``config``.

        Raises:
            UserError: the plan is for another family or another shape.
        """
        self.family: Family = family_of(config)
        shape = self.family.shape(config)
        if plan.family != self.family.name or plan.source != shape:
            raise UserError(
                f"the plan is for a {plan.family} model with {plan.source}; this is a {self.family.name} "
                f"model with {shape}"
            )
        self.plan = plan
        self.config = self.family.with_shape(config, plan.shape, [block.attention for block in plan.blocks])
        self._tied = self.family.tied(config)
        self._position = {
            **{("attention", block.attention): position for position, block in enumerate(plan.blocks)},
            **{("mlp", block.mlp): position for position, block in enumerate(plan.blocks)},
        }
        self._index = self._indices()
        self._factor = self._factors()

    def new_name(self, name: str) -> str | None:
        """The name of the parameter ``name`` in the cut model.

        None if it goes: its block is removed, or it is the output layer of a tied model, which is stored as the
        embedding.
        """
        parameter = self.family.locate(name)
        if self._tied and parameter.role is Role.OUTPUT:
            return None
        if parameter.block is None:
            return name
        assert parameter.sublayer is not None
        position = self._position.get((parameter.sublayer, parameter.block))
        if position is None:
            return None
        prefix = f"{self.family.blocks}.{parameter.block}."
        return f"{self.family.blocks}.{position}.{name[len(prefix) :]}"

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Cut the parameter ``name``, which must be one that stays.

        Returns:
            A tensor of the same dtype; factors are multiplied in float32.
        """
        parameter = self.family.locate(name)
        for axis, dimension in enumerate(parameter.axes):
            index = self._index.get((dimension.dimension, self._scope(parameter, dimension.dimension)))
            if index is not None:
                tensor = tensor.index_select(axis, index.to(tensor.device))
        factors = [
            (axis, self._factor[key])
            for axis, factor in enumerate(self.family.scaled_axes(parameter, self._tied))
            if (key := (factor, self._scope(parameter, factor))) in self._factor
        ]
        if factors:
            scaled = tensor.float()
            for axis, factor in factors:
                view = [-1 if a == axis else 1 for a in range(tensor.ndim)]
                scaled = scaled * factor.to(tensor.device).view(view)
            tensor = scaled.to(tensor.dtype)
        return tensor

    def cut_all(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Cut every tensor that stays, lazily: (new name, tensor)."""
        for name, tensor in tensors:
            if (new := self.new_name(name)) is not None:
                yield new, self.cut(name, tensor)

    @staticmethod
    def _scope(parameter: Parameter, what: str | None) -> int | None:
        """Hidden dimensions are the model's; all other units are their block's."""
        return None if what == "hidden" else parameter.block

    def _indices(self) -> dict[tuple[str | None, int | None], torch.Tensor]:
        """Kept rows or columns by (dimension, block); absent = all."""
        plan, head_dim = self.plan, self.plan.source.head_dim
        indices: dict[tuple[str | None, int | None], torch.Tensor] = {}
        if plan.hidden is not None:
            indices["hidden", None] = torch.tensor(plan.hidden)
        for block in plan.blocks:
            if block.heads is not None:
                indices["query", block.attention] = _rows_of_heads(block.heads, head_dim)
                indices["key_value", block.attention] = _rows_of_heads(plan.heads_by_group(block), head_dim)
            if block.channels is not None:
                indices["channel", block.mlp] = torch.tensor(block.channels)
        return indices

    def _factors(self) -> dict[tuple[str | None, int | None], torch.Tensor]:
        """What multiplies the kept rows or columns, by (factor, block); absent = one."""
        plan = self.plan
        factors: dict[tuple[str | None, int | None], torch.Tensor] = {}
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


def _rows_of_heads(heads: Iterable[int], head_dim: int) -> torch.Tensor:
    """Row numbers of whole heads: head h owns rows h·head_dim … (h+1)·head_dim − 1."""
    return (torch.tensor(list(heads))[:, None] * head_dim + torch.arange(head_dim)).flatten()
