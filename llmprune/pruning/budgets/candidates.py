"""The candidates of a search: every way of pruning that the settings name."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from llmprune.pruning.budgets.settings import BudgetConfig
from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.criterion import ScoreSection
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.errors import UserError
from llmprune.utils.settings import check_settings, limited

_CORRECTED = {"heads", "kv_heads", "intermediate"}  # dimensions whose removal leaves output matrices to correct
GREEDY = "greedy"  # a way to select blocks that needs no criterion
_SAMPLED = "block_influence"  # very cheap, and records the calibration samples in the scores


@dataclass
class CandidatesConfig:
    """Ways to prune, the budget that candidates must keep to, and how many of them are recovered.

    The job's section ``plan`` contains the settings that all candidates share.

    Attributes:
        criteria: criteria of blocks (the blocks with the lowest scores are removed), criteria of spans (the span with
            the most similar ends is removed), or ``greedy``.
        remove: numbers of blocks to remove, each for its own candidates; 0 = none.
        unit_criteria: criteria of heads, channels and hidden dimensions.
        shapes: sizes of the pruned model, any of hidden, heads, kv_heads, intermediate, experts, and layers in place of
            ``remove``; {} = the source model's own.
        under_budget: also try the shape that ``llmprune plan`` chooses under the budget, for every pair of criteria.
        budget: limits on the cost of a candidate.
        best: number of candidates that are recovered, those with the lowest losses on the calibration samples.
        rungs: shares of ``train.duration``, ascending, of short recoveries before the whole one: after each, the half
            of the candidates with the lower held-out losses goes on (successive halving); [] = none.
    """

    criteria: list[str] = field(default_factory=list)
    remove: list[int] = limited(make=list, least=0)
    unit_criteria: list[str] = field(default_factory=list)
    shapes: list[dict[str, int]] = field(default_factory=list)
    under_budget: bool = True
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    best: int = limited(3, least=1)
    rungs: list[float] = limited(make=list, above=0, below=1)

    def scored(self, shared: PlanConfig) -> list[str]:
        """The criteria whose scores are needed; ``shared`` are the settings of all candidates."""
        named = [*self.criteria, *self.unit_criteria, *([shared.expert_criterion] if shared.expert_criterion else [])]
        return list(dict.fromkeys([name for name in named if name != GREEDY] + [_SAMPLED]))

    def candidates(self, shared: PlanConfig) -> list["Candidate"]:
        """All candidates, each once.

        Args:
            shared: settings of the plan that all candidates share.

        Raises:
            UserError: there are no candidates, or a number is out of range.
        """
        check_settings(self, "search")
        if self.rungs != sorted(set(self.rungs)):
            raise UserError(f"search.rungs {self.rungs} must be ascending shares of train.duration")
        own = (
            "method",
            "criterion",
            "remove",
            "drop",
            "shape",
            "unit_criterion",
            "threshold",
            "merge_size",
            "merge_step",
        )
        shared.refuse("search", *own)
        found = {candidate.words: candidate for candidate in [*self._named(shared), *self._chosen(shared)]}
        if self.budget.depth_share is not None and not (self.under_budget and self.criteria and self.unit_criteria):
            raise UserError("search.budget.depth_share needs search.criteria, search.unit_criteria and under_budget")
        if not found:
            raise UserError(
                "the search has no candidates: name search.criteria with search.remove, search.unit_criteria with "
                "search.shapes, or both"
            )
        return list(found.values())

    def _named(self, shared: PlanConfig) -> Iterator["Candidate"]:
        for shape in self.shapes or [{}]:
            sizes = {name: size for name, size in shape.items() if name != "layers"}
            counts = [None] if "layers" in shape else self.remove or [0]
            for count in counts:
                deep, wide = count != 0, bool(sizes)
                if not deep and not wide:
                    continue  # the unpruned model
                for criterion in self._needed(deep, self.criteria, "criteria"):
                    for unit in self._needed(wide, self.unit_criteria, "unit_criteria"):
                        yield _candidate(shared, criterion, unit, count or None, dict(shape) or None)

    def _chosen(self, shared: PlanConfig) -> Iterator["Candidate"]:
        if not self.under_budget:
            return
        for criterion in [None, *self.criteria]:
            for unit in [None, *self.unit_criteria]:
                if criterion is not None or unit is not None:
                    named = _candidate(shared, criterion, unit, None, None)
                    yield replace(named, words=f"{named.words}, by the budget", under_budget=True)

    def _needed(self, needed: bool, names: list[str], key: str) -> list[str | None]:
        if not needed:
            return [None]
        if not names:
            raise UserError(f"search.{key} is empty: name the criteria that decide")
        return [*names]


@dataclass(frozen=True)
class Candidate:
    """A way of pruning.

    Attributes:
        words: description: the criteria and the sizes of the pruned model.
        config: settings of the candidate's plan.
        under_budget: whether the shape is chosen under a budget.
    """

    words: str
    config: PlanConfig
    under_budget: bool = False


def _method(criterion: str | None) -> str:
    if criterion is None:
        return "lowest"
    if criterion == GREEDY:
        return GREEDY
    return "span" if CRITERIA[criterion].section is ScoreSection.SPANS else "lowest"


def _candidate(
    shared: PlanConfig, criterion: str | None, unit: str | None, remove: int | None, shape: dict[str, int] | None
) -> Candidate:
    narrows = unit is not None and (shape is None or bool(_CORRECTED & set(shape)))
    deep = criterion is not None
    config = replace(
        shared,
        method=_method(criterion),
        criterion=None if criterion == GREEDY else criterion,
        remove=remove,
        shape=shape,
        unit_criterion=unit,
        expert_criterion=shared.expert_criterion if unit is not None else None,
        correction=shared.correction if narrows or (shared.correction == "refit" and deep) else "none",
    )
    sizes = [f"{name} {size}" for name, size in (shape or {}).items()]
    gone = [] if remove is None else [f"without {remove} blocks"]
    deciding = " and ".join(filter(None, (criterion, unit)))
    return Candidate(", ".join([deciding, *gone, *sizes]), config)
