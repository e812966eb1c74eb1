"""Letting a model compute with gates, by swapping the classes of the modules that they touch."""

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.families import AXES, NORMS, Family, Role
from llmprune.gates.gate_set import Factors
from llmprune.gates.linear import gated_linear


@dataclass
class GateSlot:
    """Where the gated modules look up the current factors; shared by all of a model's modules."""

    factors: Factors = dataclasses.field(default_factory=Factors)


@dataclass(frozen=True)
class _Binding:
    """What one gated module needs to know: its slot, its block, and its role's factors."""

    slot: GateSlot
    block: int | None
    rows: str | None
    columns: str | None
    epsilon: float = 0.0

    def factor(self, name: str | None) -> Tensor | None:
        value = None if name is None else getattr(self.slot.factors, name)
        return value if value is None or name == "hidden" else value[self.block]


class _GatedLinear(nn.Linear):
    _gate: _Binding

    def forward(self, input: Tensor) -> Tensor:
        gate = self._gate
        return gated_linear(input, self.weight, self.bias, gate.factor(gate.rows), gate.factor(gate.columns))


class _GatedEmbedding(nn.Embedding):
    """Gated at its output: gating the whole table would cost more than gating the rows that are looked up."""

    _gate: _Binding

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        factor = self._gate.factor("hidden")
        return rows if factor is None else (rows * factor).to(rows.dtype)


class _GatedRMSNorm(nn.Module):
    """An RMS norm over the kept dimensions.

    A gated residual stream is zero wherever its gate is, so the sum of squares over all dimensions is the sum over the
    kept ones, and only the divisor changes: no gather is needed.
    """

    _gate: _Binding
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate = self._gate
        x = hidden_states.float()
        factor, kept = gate.factor("hidden"), gate.slot.factors.kept_hidden
        if factor is None or kept is None:
            mean_square, weight = x.square().mean(-1, keepdim=True), self.weight
        else:
            mean_square = x.square().sum(-1, keepdim=True) / kept
            weight = (self.weight * factor).to(self.weight.dtype)
        normalised = x * torch.rsqrt(mean_square + gate.epsilon)
        return weight * normalised.to(hidden_states.dtype)


def attach(model: PreTrainedModel, family: Family, factors: set[str]) -> GateSlot:
    """Make ``model`` compute with gates; parameters, their names and the state dict stay as they are.

    Args:
        model: the dense model, not yet sharded.
        family: its family.
        factors: names of the factors (fields of ``Factors``) that the gates have; modules that none of them touches
            are left alone.

    Returns:
        The slot: set its ``factors`` before a forward pass. Until then the model computes as before.
    """
    slot = GateSlot()
    layers = family.shape(model.config).layers
    for name, role, block in family.modules(layers):
        touched = [axis.factor if axis.factor in factors else None for axis in AXES[role]]
        if not any(touched):
            continue
        module = model.get_submodule(name)
        if role in NORMS:
            epsilon = getattr(module, family.norm.epsilon)
            _swap(module, _GatedRMSNorm, _Binding(slot, block, "hidden", None, epsilon))
        else:
            gated = _GatedEmbedding if role is Role.EMBEDDING else _GatedLinear
            _swap(module, gated, _Binding(slot, block, touched[0], touched[1]))
    return slot


def _swap(module: nn.Module, gated: type[nn.Module], binding: _Binding) -> None:
    module.__class__ = cast(type[nn.Module], type(f"Gated{type(module).__name__}", (gated, type(module)), {}))
    module._gate = binding  # type: ignore[assignment]
