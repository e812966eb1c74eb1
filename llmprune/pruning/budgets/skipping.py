"""The removal of single attentions and MLPs, one after the other, by the calibration loss."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from llmprune.plans.plan import Plan
from llmprune.pruning.budgets.trial import Trial
from llmprune.utils.errors import UserError
from llmprune.utils.progress import Progress


def without_sublayers(plan: Plan, counts: Mapping[str, int], trial: Trial, samples: Tensor) -> Plan:
    """A plan that also takes sub-layers out of blocks that stay.

    Each time the one goes without which the loss is lowest, as in the second stage of 2SSP (arXiv:2501.17771).

    Args:
        plan: plan.
        counts: number of sub-layers that stay, by kind: ``attention``, ``mlp``.
        trial: calibration runs of the model that the plan is for.
        samples: tokens that losses are computed on, int64 [samples, length].

    Raises:
        UserError: a number is out of range.
    """
    for sublayer, count in counts.items():
        if not 1 <= count <= len(plan.blocks):
            raise UserError(f"{count} {sublayer}_layers can't stay: choose 1 to {len(plan.blocks)}")
    passes = sum(
        sum(range(count + 1, len(plan.blocks) + 1)) for count in counts.values()
    )  # as many as there are candidates, each time
    with Progress(desc="removing sub-layers", total=passes, unit="losses") as progress:
        for sublayer, count in counts.items():
            for _ in range(len(plan.blocks) - count):
                plan = _without_one(plan, sublayer, trial, samples, progress)
    return plan


def _without_one(plan: Plan, sublayer: str, trial: Trial, samples: Tensor, progress: "Progress") -> Plan:
    """The plan without the sub-layer that the loss misses least; a block keeps one of its two parts."""
    losses = {}
    for block in plan.blocks:
        place = (sublayer, getattr(block, sublayer))
        other = ("mlp", block.mlp) if sublayer == "attention" else ("attention", block.attention)
        if {place, other} & set(plan.skipped):
            continue
        losses[place] = trial.loss(replace(plan, skipped=(*plan.skipped, place)), samples)
        progress.update()
    if not losses:
        raise UserError(f"no more {sublayer} can go: a block keeps its attention or its MLP; remove blocks")
    return replace(plan, skipped=(*plan.skipped, min(losses, key=lambda place: losses[place])))
