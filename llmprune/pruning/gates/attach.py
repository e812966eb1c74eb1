"""Attaching gates to a model, by replacing the classes of the modules that they affect."""

import dataclasses
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.models.families import AXES, EMBEDDINGS, NORMS, Family
from llmprune.pruning.gates.factors import Factors
from llmprune.pruning.gates.gated_linear import gated_linear


@dataclass
class GateSlot:
    """The place where gated modules read the current factors; all gated modules of a model share it."""

    factors: Factors = dataclasses.field(default_factory=Factors)

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, no gate has an effect."""
        factors, self.factors = self.factors, Factors()
        try:
            yield
        finally:
            self.factors = factors


@dataclass(frozen=True)
class _Binding:
    """The data that a gated module reads: its slot, its block, its role's factors and its norm's settings.

    Attributes:
        slot: place of the current factors, see ``GateSlot``.
        block: number of the module's block; None outside the blocks.
        rows: name of the factor along the first axis; None = no factor.
        columns: name of the factor along the second axis; None = no factor.
        dimension: dimension over which a norm's statistics are computed.
        epsilon: number that a norm adds to the mean square or variance.
        offset: number that a norm adds to its weight.
    """

    slot: GateSlot
    block: int | None
    rows: str | None
    columns: str | None = None
    dimension: str = "hidden"
    epsilon: float = 0.0
    offset: float = 0.0

    def factor(self, name: str | None) -> Tensor | None:
        value = None if name is None else getattr(self.slot.factors, name)
        return value if value is None or name == "hidden" else value[self.block]

    def kept(self) -> Tensor | None:
        mask = self.slot.factors.kept.get(self.dimension)
        return mask if mask is None or self.dimension == "hidden" else mask[self.block]


class _GatedLinear(nn.Linear):
    _gate: _Binding

    def forward(self, input: Tensor) -> Tensor:
        gate = self._gate
        return gated_linear(input, self.weight, self.bias, gate.factor(gate.rows), gate.factor(gate.columns))


class _GatedEmbedding(nn.Embedding):
    """An embedding with gates on its output, because gating the rows that are read costs less than the whole table."""

    _gate: _Binding

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        rows = super().forward(*args, **kwargs)
        factor = self._gate.factor("hidden")
        return rows if factor is None else (rows * factor).to(rows.dtype)


class _GatedRMSNorm(nn.Module):
    """An RMS norm over the kept dimensions.

    A gated residual stream is zero wherever its gate is zero, so the sum of squares over all dimensions is the sum over
    the kept ones. Only the divisor changes; no gather is needed.
    """

    _gate: _Binding
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate = self._gate
        x = hidden_states.float()
        kept, factor = gate.kept(), gate.factor(gate.rows)
        if kept is None:
            mean_square = x.square().mean(-1, keepdim=True)
        else:
            gated = x if gate.dimension == "hidden" else x * kept
            mean_square = gated.square().sum(-1, keepdim=True) / kept.sum().clamp(min=1)
        normalised = x * torch.rsqrt(mean_square + gate.epsilon)
        if gate.offset:
            weight = self.weight.float() + gate.offset
            return (normalised * (weight if factor is None else weight * factor)).to(hidden_states.dtype)
        weight = self.weight if factor is None else (self.weight * factor).to(self.weight.dtype)
        return weight * normalised.to(hidden_states.dtype)


class _GatedLayerNorm(nn.Module):
    """A LayerNorm over the kept dimensions, with their mean and variance."""

    _gate: _Binding
    weight: Tensor
    bias: Tensor | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate = self._gate
        x = hidden_states.float()
        kept, factor = gate.kept(), gate.factor(gate.rows)
        if kept is None:
            centred = x - x.mean(-1, keepdim=True)
            variance = centred.square().mean(-1, keepdim=True)
        else:
            count = kept.sum().clamp(min=1)
            centred = (x - x.sum(-1, keepdim=True) / count) * kept
            variance = centred.square().sum(-1, keepdim=True) / count
        y = centred * torch.rsqrt(variance + gate.epsilon) * self.weight
        if self.bias is not None:
            y = y + self.bias
        return (y if factor is None else y * factor).to(hidden_states.dtype)


def attach(model: PreTrainedModel, family: Family, factors: Set[str]) -> GateSlot:
    """Make ``model`` compute with gates; parameters, their names and the state dict stay as they are.

    Args:
        model: dense model, not yet sharded.
        family: family of the model.
        factors: names of the factors (fields of ``Factors``) that the gates have; modules without any of them do not
            change.

    Returns:
        The slot: set its ``factors`` before a forward pass. As long as they are not set, the model computes as before.
    """
    slot = GateSlot()
    masked = {"hidden": "hidden", "query": "query", "key_value": "query"}  # dimension → name of its gates' factor
    for name, role, block in family.modules(model.config):
        axes = AXES[role]
        touched = [axis.factor if axis.factor in factors else None for axis in axes]
        module = model.get_submodule(name)
        if role in NORMS:
            dimension = axes[0].dimensions[0] if axes[0].dimensions else None
            if dimension is None or not (touched[0] or masked[dimension] in factors):
                continue
            norm = family.norm
            epsilon = getattr(module, norm.epsilon)
            binding = _Binding(slot, block, touched[0], None, dimension, epsilon, norm.offset)
            _swap(module, _GatedLayerNorm if norm.centred else _GatedRMSNorm, binding)
        elif any(touched):
            gated = _GatedEmbedding if role in EMBEDDINGS else _GatedLinear
            _swap(module, gated, _Binding(slot, block, touched[0], touched[1]))
    return slot


def _swap(module: nn.Module, gated: type[nn.Module], binding: _Binding) -> None:
    module.__class__ = cast(type[nn.Module], type(f"Gated{type(module).__name__}", (gated, type(module)), {}))
    module._gate = binding  # type: ignore[assignment]
