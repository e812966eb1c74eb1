"""All gates of a model: what is learned, what it should come to, and what it decides."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmprune.families import Shape
from llmprune.gates import hard_concrete
from llmprune.gates.lagrangian import lagrangian, warmed_up
from llmprune.plans import KeptBlock, Plan

HIDDEN, KV_GROUP, HEAD, INTERMEDIATE, LAYER = "hidden", "kv_group", "head", "intermediate", "layer"


class GateKind(NamedTuple):
    """One kind of gate.

    Attributes:
        size: of its tensor; the last dimension is what is counted, the others are rows with a constraint each.
        keep: how many gates of every row stay at the target shape.
    """

    size: tuple[int, ...]
    keep: int

    @property
    def target(self) -> float:
        """Target sparsity."""
        return 1 - self.keep / self.size[-1]

    @property
    def zeros(self) -> int:
        """Gates of every row that are zero at the target shape."""
        return self.size[-1] - self.keep


def gate_kinds(source: Shape, target: Shape) -> dict[str, GateKind]:
    """The gates that lead from ``source`` to ``target``: one kind for every dimension that shrinks.

    ``kv_group`` removes a key/value group with all its queries (in models without grouped queries: a head); ``head``
    removes the same number of query heads in every group.
    """
    blocks, groups, queries = source.layers, source.kv_heads, source.heads_per_group
    every = {
        HIDDEN: GateKind((source.hidden,), target.hidden),
        KV_GROUP: GateKind((blocks, groups), target.kv_heads),
        HEAD: GateKind((blocks, groups, queries), target.heads_per_group),
        INTERMEDIATE: GateKind((blocks, source.intermediate), target.intermediate),
        LAYER: GateKind((blocks,), target.layers),
    }
    return {name: kind for name, kind in every.items() if kind.zeros}


@dataclasses.dataclass
class Factors:
    """What the gates multiply, float32; None = nothing.

    Attributes:
        hidden: [hidden], on the embedding's output and every norm's weight.
        residual: [blocks, hidden], on the rows of the matrices that write to the residual stream.
        query: [blocks, heads · head size], on the columns of the attention output.
        channel: [blocks, intermediate], on the columns of the MLP output.
        kept_hidden: [], how many hidden gates are not zero: the norms' statistics are over these.
    """

    hidden: Tensor | None = None
    residual: Tensor | None = None
    query: Tensor | None = None
    channel: Tensor | None = None
    kept_hidden: Tensor | None = None

    def trainable(self) -> dict[str, Tensor]:
        """The factors that gradients flow to, by name."""
        names = ("hidden", "residual", "query", "channel")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def detached(self) -> "Factors":
        """The same values as leaves that collect their own gradients."""
        leaves = {name: value.detach().contiguous().requires_grad_() for name, value in self.trainable().items()}
        return dataclasses.replace(self, **leaves)


class GateSet(nn.Module):
    """The gates that lead a model from one shape to another, and their Lagrange multipliers.

    Parameters (float32): ``log_alpha.KIND`` of the kind's size, ``linear.KIND`` and ``quadratic.KIND`` (λ1 and λ2)
    with one entry per row. They belong to no model: whoever owns the set trains it.
    """

    def __init__(self, source: Shape, target: Shape, seed: int = 0) -> None:
        """Gates that are all open.

        Args:
            source: shape of the model.
            target: shape to reach; at least one dimension smaller.
            seed: of the gates' start, N(5, 0.01).
        """
        super().__init__()
        self.source, self.target = source, target
        self.kinds = gate_kinds(source, target)
        generator = torch.Generator().manual_seed(seed)
        self.log_alpha = nn.ParameterDict()
        self.linear = nn.ParameterDict()
        self.quadratic = nn.ParameterDict()
        for name, kind in self.kinds.items():
            start = torch.randn(kind.size, generator=generator) * hard_concrete.LOG_ALPHA_SPREAD
            self.log_alpha[name] = nn.Parameter(start + hard_concrete.LOG_ALPHA_START)
            self.linear[name] = nn.Parameter(torch.zeros(kind.size[:-1]))
            self.quadratic[name] = nn.Parameter(torch.zeros(kind.size[:-1]))

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """One draw of every gate; the noise comes from ``generator`` (on the CPU, so that devices agree)."""
        return {
            name: hard_concrete.sample(
                log_alpha, torch.rand(log_alpha.shape, generator=generator).to(log_alpha.device, non_blocking=True)
            )
            for name, log_alpha in self.log_alpha.items()
        }

    def at_target(self) -> dict[str, Tensor]:
        """The deterministic gates with exactly the target shape's zeros."""
        return {
            name: hard_concrete.deterministic(self.log_alpha[name].detach(), kind.zeros)
            for name, kind in self.kinds.items()
        }

    def as_expected(self) -> dict[str, Tensor]:
        """The deterministic gates with as many zeros in every row as are expected of it now."""
        return {
            name: hard_concrete.deterministic(
                self.log_alpha[name].detach(), (self.sparsity(name).detach() * kind.size[-1]).round().long()
            )
            for name, kind in self.kinds.items()
        }

    def sparsity(self, kind: str) -> Tensor:
        """Expected share of zero gates of every row."""
        return 1 - hard_concrete.keep_probability(self.log_alpha[kind]).mean(-1)

    def targets(self, start: float, progress: float) -> dict[str, float]:
        """Target sparsity of every kind after ``progress`` (0 … 1) of the warm-up that begins at ``start``."""
        return {name: warmed_up(kind.target, min(start, kind.target), progress) for name, kind in self.kinds.items()}

    def constraint(self, targets: Mapping[str, float]) -> Tensor:
        """The Lagrangian term, summed over kinds: minimised by the gates, maximised by the multipliers."""
        terms = [
            lagrangian(self.sparsity(name), targets[name], self.linear[name], self.quadratic[name])
            for name in self.kinds
        ]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep every log α within ± log 100."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(-hard_concrete.LOG_ALPHA_LIMIT, hard_concrete.LOG_ALPHA_LIMIT)

    def factors(self, gates: Mapping[str, Tensor]) -> Factors:
        """What ``gates`` (values of every kind) multiply in the model."""
        blocks, head_dim = self.source.layers, self.source.head_dim
        hidden, layer = gates.get(HIDDEN), gates.get(LAYER)
        residual = None
        if hidden is not None or layer is not None:
            per_block = torch.ones(blocks, device=next(iter(gates.values())).device) if layer is None else layer
            per_dimension = torch.ones(self.source.hidden, device=per_block.device) if hidden is None else hidden
            residual = per_block[:, None] * per_dimension
        heads = self._heads(gates)
        return Factors(
            hidden=hidden,
            residual=residual,
            query=None if heads is None else heads.repeat_interleave(head_dim, dim=1),
            channel=gates.get(INTERMEDIATE),
            kept_hidden=None if hidden is None else hidden.detach().count_nonzero().clamp(min=1),
        )

    def _heads(self, gates: Mapping[str, Tensor]) -> Tensor | None:
        """The gate of every query head, [blocks, heads]: its group's times its own."""
        group, head = gates.get(KV_GROUP), gates.get(HEAD)
        if group is None and head is None:
            return None
        if group is not None and head is not None:
            return (group[..., None] * head).flatten(1)
        return head.flatten(1) if group is None else group.repeat_interleave(self.source.heads_per_group, dim=1)  # type: ignore[union-attr]

    def plan(self, family: str, model: str) -> Plan:
        """The plan to the target shape, soft gates folded in.

        Args:
            family: name of the model's family.
            model: fingerprint of the model's weights.
        """
        gates = {name: value.cpu() for name, value in self.at_target().items()}
        kept_layers = _kept(gates[LAYER]) if LAYER in gates else list(range(self.source.layers))
        heads, channels = self._heads(gates), gates.get(INTERMEDIATE)
        factors: dict[str, Tensor] = {}
        hidden = None
        if HIDDEN in gates:
            hidden = tuple(_kept(gates[HIDDEN]))
            factors["hidden"] = gates[HIDDEN][list(hidden)]
        if LAYER in gates:
            factors["layers"] = gates[LAYER][kept_layers]
        blocks = []
        for index in kept_layers:
            block = KeptBlock(
                index,
                heads=None if heads is None else tuple(_kept(heads[index])),
                channels=None if channels is None else tuple(_kept(channels[index])),
            )
            if heads is not None:
                factors[f"blocks.{index}.heads"] = heads[index][list(block.heads or ())]
            if channels is not None:
                factors[f"blocks.{index}.channels"] = channels[index][list(block.channels or ())]
            blocks.append(block)
        return Plan(
            family=family, model=model, source=self.source, blocks=tuple(blocks), hidden=hidden, factors=factors
        )


def _kept(gates: Tensor) -> list[int]:
    return gates.nonzero().flatten().tolist()
