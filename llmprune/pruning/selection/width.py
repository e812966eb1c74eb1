"""The selection of heads, channels, hidden dimensions and experts: the highest scores, as many in every block."""

from collections.abc import Sequence
from dataclasses import replace

from llmprune.models.families import Shape
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.scoring.scores import Scores
from llmprune.utils.errors import UserError


def narrowed(plan: Plan, target: Shape, scores: Scores, criterion: str | None, expert_criterion: str | None) -> Plan:
    """A plan that also narrows the blocks that it keeps.

    Key/value groups are removed as a whole or, if the target has fewer query heads per group, each loses the same
    number of heads. Hidden dimensions are ranked by their scores summed over the blocks that stay.

    Args:
        plan: plan with the blocks that stay, unchanged.
        target: shape of the pruned model; its number of blocks is the plan's.
        scores: scores of the model.
        criterion: name of the criterion whose scores select units; None = none.
        expert_criterion: name of the criterion whose scores select experts; None = ``criterion``.

    Raises:
        UserError: the scores have no such criterion, or no scores of these units.
    """
    source = scores.source
    if expert_criterion is not None and source.experts is None:
        raise UserError("a criterion of experts was named, and this model has none")
    width = replace(target, layers=source.layers)
    if width == source:
        return plan

    def of(unit: str) -> Sequence[Sequence[float]]:
        name = expert_criterion or criterion if unit == "experts" else criterion
        if name is None:
            known = ", ".join(scores.units) or "none: score again"
            raise UserError(f"name the criterion that ranks {unit} with --unit-criterion; the scores have {known}")
        found = scores.of_units(name)
        if unit not in found:
            raise UserError(f"'{name}' does not score {unit} of this model: choose another criterion")
        return found[unit]

    blocks = list(plan.blocks)
    if (target.heads, target.kv_heads) != (source.heads, source.kv_heads):
        heads, groups = of("heads"), of("kv_groups")
        blocks = [replace(b, heads=_heads(heads[b.attention], groups[b.attention], source, target)) for b in blocks]
    if target.intermediate != source.intermediate:
        if source.experts is not None:
            raise UserError("every expert has channels of its own: a mixture of experts is narrowed by its experts")
        channels = of("channels")
        blocks = [replace(block, channels=highest(channels[block.mlp], target.intermediate)) for block in blocks]
    if target.experts is not None and target.experts != source.experts:
        experts = of("experts")
        blocks = [replace(block, experts=highest(experts[block.mlp], target.experts)) for block in blocks]
    hidden = None
    if target.hidden != source.hidden:
        scored = of("hidden")
        totals = [sum(column) for column in zip(*(scored[block.attention] for block in blocks), strict=True)]
        hidden = highest(totals, target.hidden)
    return replace(plan, blocks=tuple(blocks), hidden=hidden)


def highest(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The places of the highest scores, ascending; among equal scores, the earlier places."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda place: -scores[place])[:count]))


def _heads(heads: Sequence[float], groups: Sequence[float], source: Shape, target: Shape) -> tuple[int, ...]:
    """The query heads of one block that stay: the best heads of each of the best groups."""
    size = source.heads_per_group
    kept: list[int] = []
    for group in highest(groups, target.kv_heads):
        first = group * size
        kept += [first + head for head in highest(heads[first : first + size], target.heads_per_group)]
    return tuple(kept)


def whole(layers: int) -> tuple[KeptBlock, ...]:
    """All blocks, unchanged."""
    return tuple(KeptBlock.whole(block) for block in range(layers))
