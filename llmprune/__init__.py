"""Prune large language models and train them back.

>>> import llmprune
>>> scores = llmprune.score("base", "text", criteria=["block_influence"])
>>> plan = llmprune.plan(scores, "block_influence", remove=1)
>>> smaller = llmprune.apply("base", plan, "smaller")

Nothing is imported before it is used: ``import llmprune`` takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmprune.api.functions import apply, convert, evaluate, measure, plan, prune, report, score, train, verify
    from llmprune.config.job_files import load_job
    from llmprune.conversion.verify import Difference
    from llmprune.plans.plan import Plan
    from llmprune.pruning.budgets.settings import BudgetConfig
    from llmprune.pruning.scoring.scores import Scores
    from llmprune.utils.errors import UserError

__version__ = "0.2.0"

_FUNCTIONS = "llmprune.api.functions"
_PUBLIC = {
    "prune": _FUNCTIONS,
    "score": _FUNCTIONS,
    "plan": _FUNCTIONS,
    "apply": _FUNCTIONS,
    "train": _FUNCTIONS,
    "convert": _FUNCTIONS,
    "verify": _FUNCTIONS,
    "evaluate": _FUNCTIONS,
    "measure": _FUNCTIONS,
    "report": _FUNCTIONS,
    "load_job": "llmprune.config.job_files",
    "BudgetConfig": "llmprune.pruning.budgets.settings",
    "Difference": "llmprune.conversion.verify",
    "Plan": "llmprune.plans.plan",
    "Scores": "llmprune.pruning.scoring.scores",
    "UserError": "llmprune.utils.errors",
}
__all__ = [
    "BudgetConfig", "Difference", "Plan", "Scores", "UserError", "__version__", "apply", "convert", "evaluate",
    "load_job", "measure", "plan", "prune", "report", "score", "train", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llmprune' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
