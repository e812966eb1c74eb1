"""The plans in the folder of a model that llmprune wrote."""

from dataclasses import replace
from pathlib import Path

from llmprune.plans.plan import Plan

APPLIED = Path("llmprune", "plan.json")  # what was removed when the folder was written
EARLIER = Path("llmprune", "cut.json")  # what was removed before, from a model that was only trained since


def recorded_plans(model: Path) -> list[Plan]:
    """The plans of a model, the newest first."""
    return [Plan.load(path) for name in (APPLIED, EARLIER) if (path := model / name).is_file()]


def earlier_cut(source: Path, trained: Plan) -> Plan | None:
    """The plan by which a model was cut before it was trained, without the corrections, which its weights contain.

    Args:
        source: folder of the model that was trained.
        trained: plan that keeps everything of the trained model.

    Returns:
        None if nothing was removed, or the folder is gone or has a model of another shape.
    """
    plans = (plan for plan in recorded_plans(source) if plan.shape.agrees(trained.source))
    cut = next((plan for plan in plans if plan.shape != plan.source or plan.skipped), None)
    return None if cut is None else replace(cut, corrections={})
