"""The comparison of ways to prune: the plan with the lowest loss on samples that decided nothing."""

import dataclasses
from typing import Any

import torch
from torch.utils.data import default_collate

from llmprune.data.dataset import EvalDataset
from llmprune.data.prepared import PreparedData
from llmprune.jobs.prune.recipe import DEPTH_SHARE, ways_of
from llmprune.models.causal_lm import Batch
from llmprune.models.families import family_of
from llmprune.models.loading import load_model_config
from llmprune.plans.plan import Plan
from llmprune.pruning.budgets.choose import NoShapeError
from llmprune.pruning.budgets.limits import Latency, costs_of, limits_of
from llmprune.pruning.budgets.plan_losses import RuinousPlanError
from llmprune.pruning.budgets.settings import BudgetConfig
from llmprune.pruning.budgets.shape_sizes import ShapeSizes
from llmprune.pruning.budgets.trial import Trial, plan_hash
from llmprune.pruning.planning import best_under, default_device, describe, open_scored
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.selection.correction import corrected, is_correctable
from llmprune.pruning.selection.methods import ScoredModel
from llmprune.utils.errors import UserError
from llmprune.utils.logs import tell


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The plans that were compared.

    Attributes:
        plan: plan with the lowest held-out loss.
        chosen: name of its way.
        rows: facts of every plan, by the name of its way.
    """

    plan: Plan
    chosen: str
    rows: dict[str, dict[str, Any]]


def compare_ways(scores: Scores, model: str, method: str, budget: BudgetConfig, held_out: Batch) -> Comparison:
    """Find the best plan of every way under the budget, and compare these plans on held-out samples.

    A plan is tried with refitted matrices too; it keeps them only if they lower the held-out loss.

    Args:
        scores: scores of the model, with its calibration samples.
        model: folder or hub name of the model.
        method: way of pruning, or ``auto``; see ``ways_of``.
        budget: limits on the cost of the pruned model.
        held_out: samples that neither scores nor plans have seen.

    Raises:
        UserError: no way keeps to the budget.
    """
    if budget.depth_share is None:
        budget = dataclasses.replace(budget, depth_share=DEPTH_SHARE)
    sizes = ShapeSizes(load_model_config(model))
    costs = costs_of(budget, sizes, default_device())
    scored = open_scored(scores, model)
    trial = Trial(scored)
    plans: dict[str, tuple[float, Plan]] = {}
    rows: dict[str, dict[str, Any]] = {}
    known: dict[str, str] = {}
    for name, way in ways_of(method).items():
        fresh = [Latency(cost.table, budget.latency) if isinstance(cost, Latency) else cost for cost in costs]
        limits = limits_of(fresh, sizes.source)  # each way corrects its own table
        try:
            plan, choice = best_under(limits, scores, way.plan, trial, budget, model=model)
        except (NoShapeError, RuinousPlanError) as error:
            rows[name] = {"impossible": str(error)}
            tell(f"prune:   {name}: {error}")
            continue
        content = plan_hash(plan)
        if content in known:
            rows[name] = {"same_as": known[content]}
            tell(f"prune:   {name}: the same as {known[content]}")
            continue
        known[content] = name
        for words, one in ((name, plan), (f"{name} with refit", _refitted(plan, scored))):
            if one is None:
                continue
            loss = trial.loss(one, held_out)
            plans[words] = loss, one
            facts = {**choice.facts(), **({} if one is plan else {"loss": None})}  # of calibration: without refit
            rows[words] = {**facts, "held_out_loss": loss, "goes": describe(one)}
            tell(f"prune:   {words}: held-out loss {loss:.4f}; {describe(one)}")
    if not plans:
        raise UserError(f"no way keeps to the budget: {'; '.join(row['impossible'] for row in rows.values())}")
    chosen = min(plans, key=lambda words: plans[words][0])
    return Comparison(plans[chosen][1], chosen, rows)


def held_out_samples(data: PreparedData, per_domain: int) -> Batch:
    """Evaluation samples of every domain, in one batch: tokens and, of conversations, labels and positions.

    Raises:
        UserError: the data have none.
    """
    dataset = EvalDataset(data, per_domain)
    return {
        name: values
        for name, values in default_collate([dataset[place] for place in range(len(dataset))]).items()
        if name != "domain"
    }


def _refitted(plan: Plan, scored: ScoredModel) -> Plan | None:
    """The plan with its matrices fitted again; None if there are none to fit, or too few samples for a fit."""
    if not is_correctable(plan, "refit", family_of(scored.model.config)):
        return None
    try:
        found = corrected(plan, "refit", scored)
        return found if found.corrections else None
    except (UserError, torch.OutOfMemoryError) as error:
        tell(f"prune:   without refit: {error}")
        return None
