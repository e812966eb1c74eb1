"""All gates of a model: their parameters, their values and the plan made from them."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from llmprune.models.families import Shape
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.gates import hard_concrete
from llmprune.pruning.gates.factors import Factors
from llmprune.pruning.gates.goals import Goal
from llmprune.pruning.gates.kinds import ATTENTION, HEAD, HIDDEN, INTERMEDIATE, KV_GROUP, LAYER, MLP, gate_sizes
from llmprune.pruning.gates.lagrangian import lagrangian, warmed_up
from llmprune.utils.errors import UserError


class GateSet(nn.Module):
    """The gates that prune a model to a goal, and their Lagrange multipliers.

    Parameters (float32): ``log_alpha.KIND`` of the kind's size; ``linear.CONSTRAINT`` and ``quadratic.CONSTRAINT`` (λ1
    and λ2) with one entry per row. They are not part of a model; the owner of the set trains them.

    Attributes:
        source: shape of the model.
        goal: shape or sparsity that the gates should reach.
        chosen: number of gates of every row that stay in the pruned model, by kind; None = the goal's number.
    """

    def __init__(self, source: Shape, goal: Goal, seed: int = 0) -> None:
        """Create gates that are all open.

        Args:
            source: shape of the model.
            goal: shape or sparsity that the gates should reach.
            seed: seed of the initial log α, N(5, 0.01).
        """
        super().__init__()
        self.source, self.goal = source, goal
        self.chosen: dict[str, int] | None = None
        self.sizes = {kind: gate_sizes(source)[kind] for kind in goal.kinds}
        generator = torch.Generator().manual_seed(seed)
        self.log_alpha = nn.ParameterDict()
        for kind, size in self.sizes.items():
            start = torch.randn(size, generator=generator) * hard_concrete.LOG_ALPHA_SPREAD
            self.log_alpha[kind] = nn.Parameter(start + hard_concrete.LOG_ALPHA_START)
        self.linear = nn.ParameterDict({name: nn.Parameter(torch.zeros(rows)) for name, rows in goal.rows.items()})
        self.quadratic = nn.ParameterDict({name: nn.Parameter(torch.zeros(rows)) for name, rows in goal.rows.items()})

    def sample(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A random sample of every gate; the noise is made on the CPU by ``generator``, so that all devices agree."""
        return {
            name: hard_concrete.sample(
                log_alpha, torch.rand(log_alpha.shape, generator=generator).to(log_alpha.device, non_blocking=True)
            )
            for name, log_alpha in self.log_alpha.items()
        }

    @torch.no_grad()
    def at_target(self) -> dict[str, Tensor]:
        """The deterministic gates with exactly the goal's number of zeros in every row.

        If the goal allows several shapes, the ``chosen`` one is used, else the first.
        """
        counts = self.chosen or self.goal.counts(self.keep_probability())[0]
        zeros = {kind: size[-1] - counts[kind] for kind, size in self.sizes.items()}
        log_alpha: dict[str, Tensor] = {kind: value.detach() for kind, value in self.log_alpha.items()}
        if LAYER in zeros:  # sub-layers of removed blocks are removed first
            gone = hard_concrete.deterministic(log_alpha[LAYER], zeros[LAYER]) == 0
            log_alpha |= {
                kind: log_alpha[kind].masked_fill(gone, -torch.inf) for kind in (ATTENTION, MLP) if kind in zeros
            }
        return {kind: hard_concrete.deterministic(value, zeros[kind]) for kind, value in log_alpha.items()}

    @torch.no_grad()
    def as_expected(self) -> dict[str, Tensor]:
        """The deterministic gates with the currently expected number of zeros in every row."""
        return {
            kind: hard_concrete.deterministic(
                self.log_alpha[kind].detach(), ((1 - keep.mean(-1)) * keep.shape[-1]).round().long()
            )
            for kind, keep in self.keep_probability().items()
        }

    def keep_probability(self) -> dict[str, Tensor]:
        """P(z > 0) of every gate, by kind."""
        return {kind: hard_concrete.keep_probability(value) for kind, value in self.log_alpha.items()}

    def sparsity(self) -> dict[str, Tensor]:
        """Expected sparsity of every constraint, one for each row."""
        return self.goal.sparsity(self.keep_probability())

    def targets(self, start: float, progress: float) -> dict[str, float]:
        """The target sparsity of every constraint after ``progress`` (0 … 1) of a warm-up from ``start``."""
        return {name: warmed_up(target, min(start, target), progress) for name, target in self.goal.targets.items()}

    def constraint(self, targets: Mapping[str, float]) -> Tensor:
        """The Lagrangian term, summed over constraints: minimised by the gates, maximised by the multipliers."""
        terms = [
            lagrangian(sparsity, targets[name], self.linear[name], self.quadratic[name])
            for name, sparsity in self.sparsity().items()
        ]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep every log α within ± log 100."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(-hard_concrete.LOG_ALPHA_LIMIT, hard_concrete.LOG_ALPHA_LIMIT)

    def factors(self, gates: Mapping[str, Tensor]) -> Factors:
        """The factors of ``gates`` (values of every kind) in the model."""
        hidden, heads = gates.get(HIDDEN), self._heads(gates)
        device = next(iter(gates.values())).device
        residual: dict[str, Tensor] = {}
        for kind in (ATTENTION, MLP):
            sublayer = _product(gates.get(LAYER), gates.get(kind))
            if hidden is not None or sublayer is not None:
                per_block = torch.ones(self.source.layers, device=device) if sublayer is None else sublayer
                per_dimension = torch.ones(self.source.hidden, device=device) if hidden is None else hidden
                residual[kind] = per_block[:, None] * per_dimension
        return Factors.of(
            hidden=hidden,
            attention=residual.get(ATTENTION),
            mlp=residual.get(MLP),
            heads=heads,
            channel=gates.get(INTERMEDIATE),
            kv_heads=self.source.kv_heads,
            head_dim=self.source.head_dim,
        )

    def _heads(self, gates: Mapping[str, Tensor]) -> Tensor | None:
        """The gate of every query head, [blocks, heads]: its group's gate times its own."""
        group, head = gates.get(KV_GROUP), gates.get(HEAD)
        if head is None:
            return None if group is None else group.repeat_interleave(self.source.heads_per_group, dim=1)
        return cast(Tensor, _product(head, None if group is None else group[..., None])).flatten(1)

    def plan(self, family: str, model: str) -> Plan:
        """The plan of the current gates, with soft gates folded in.

        If only one sub-layer of a block is removed, the block is removed with it where the kept sub-layers before and
        after it can share a block; otherwise the sub-layer stays in its block with a factor of zero, because no config
        can leave it out.

        Args:
            family: name of the model's family.
            model: fingerprint of the model's weights.
        """
        gates = {name: value.cpu() for name, value in self.at_target().items()}
        heads, channels, hidden = self._heads(gates), gates.get(INTERMEDIATE), None
        factors: dict[str, Tensor] = {}
        if HIDDEN in gates:
            hidden = tuple(_kept(gates[HIDDEN]))
            factors["hidden"] = gates[HIDDEN][list(hidden)]
        ones = torch.ones(self.source.layers)
        of_attention, of_mlp = (gates.get(LAYER, ones) * gates.get(kind, ones) for kind in (ATTENTION, MLP))
        pairs = _pair(_kept(of_attention), _kept(of_mlp))
        if {LAYER, ATTENTION, MLP} & gates.keys():
            factors["attention"] = of_attention[[attention for attention, _ in pairs]]
            factors["mlp"] = of_mlp[[mlp for _, mlp in pairs]]
        blocks = []
        for attention, mlp in pairs:
            block = KeptBlock(
                attention,
                mlp,
                heads=None if heads is None else tuple(_kept(heads[attention])),
                channels=None if channels is None else tuple(_kept(channels[mlp])),
            )
            if heads is not None:
                factors[f"heads.{attention}"] = heads[attention][list(block.heads or ())]
            if channels is not None:
                factors[f"channels.{mlp}"] = channels[mlp][list(block.channels or ())]
            blocks.append(block)
        return Plan(
            family=family, model=model, source=self.source, blocks=tuple(blocks), hidden=hidden, factors=factors
        )


def _kept(gates: Tensor) -> list[int]:
    return gates.nonzero().flatten().tolist()


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


def _pair(attentions: list[int], mlps: list[int]) -> list[tuple[int, int]]:
    """The fewest blocks that contain these sub-layers in the source's order: (attention's, MLP's number) of each.

    An attention shares a block with the next sub-layer that stays if that is an MLP. A sub-layer without such a partner
    is paired with the other sub-layer of its own block, which does not stay.
    """
    order = sorted([(index, 0) for index in attentions] + [(index, 1) for index in mlps])
    pairs = []
    for position, (index, is_mlp) in enumerate(order):
        following = order[position + 1] if position + 1 < len(order) else (index, 0)
        if not is_mlp:
            pairs.append((index, following[0] if following[1] else index))
        elif position == 0 or order[position - 1][1]:
            pairs.append((index, index))
    return pairs


def load_gates(gates: GateSet, saved: Mapping[str, Tensor]) -> None:
    """Load gates from the ``gates`` in the state of an ``L0Pruning`` callback.

    Raises:
        UserError: they were saved by a run with another target or from another model.
    """
    own = {name: tuple(value.shape) for name, value in gates.state_dict().items()}
    found = {name: tuple(saved[name].shape) for name in saved}
    if found != own:
        differing = sorted(set(found.items()) ^ set(own.items()))
        raise UserError(
            f"the checkpoint's gates are of another shape ({differing[0][0]}): "
            "resume with the target shape and the model of the run that saved it"
        )
    gates.load_state_dict({name: saved[name] for name in saved})
