"""What a search tries."""

import pytest

from llmprune.pruning.budgets.candidates import CandidatesConfig
from llmprune.pruning.budgets.settings import BudgetConfig
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.errors import UserError

NARROW, BOTH = {"hidden": 24}, {"layers": 3, "intermediate": 32}


def words(**settings: object) -> list[str]:
    config = CandidatesConfig(**settings)  # type: ignore[arg-type]
    return [candidate.words for candidate in config.candidates(PlanConfig())]


def test_every_combination_once() -> None:
    found = CandidatesConfig(
        criteria=["perplexity", "cosine", "greedy"],
        remove=[0, 1, 2],
        unit_criteria=["unit_taylor", "unit_random"],
        shapes=[{}, NARROW, BOTH],
        under_budget=False,
    ).candidates(PlanConfig())
    # Depth alone: 3 criteria × 2 counts; narrow: 2 criteria, with every depth; both: 3 × 2.
    assert len(found) == len({candidate.words for candidate in found}) == 6 + (2 + 6 * 2) + 6
    ways = {(c.config.criterion, c.config.method) for c in found}
    assert ways == {("perplexity", "lowest"), ("cosine", "span"), (None, "greedy"), (None, "lowest")}
    for candidate in found:
        config = candidate.config
        assert (config.unit_criterion is not None) == (config.shape is not None)
        assert config.remove is None or not (config.shape or {}).get("layers")
        assert config.remove or config.shape


def test_what_a_budget_chooses() -> None:
    found = words(criteria=["perplexity"], unit_criteria=["unit_taylor"])
    assert found == [
        "unit_taylor, by the budget",
        "perplexity, by the budget",
        "perplexity and unit_taylor, by the budget",
    ]


def test_scores_that_are_needed() -> None:
    settings = CandidatesConfig(criteria=["greedy", "magnitude_l1"], unit_criteria=["unit_random"])
    # block_influence reads the calibration samples, on which candidates are compared.
    assert settings.scored(PlanConfig()) == ["magnitude_l1", "unit_random", "block_influence"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "the search has no candidates"),
        ({"criteria": ["perplexity"], "under_budget": False}, "the search has no candidates"),
        ({"criteria": ["perplexity"], "budget": BudgetConfig("0.5", depth_share=0.5)}, "depth_share needs"),
        ({"remove": [2]}, "search.criteria is empty"),
        ({"shapes": [NARROW], "criteria": ["perplexity"]}, "search.unit_criteria is empty"),
        ({"criteria": ["perplexity"], "best": 0}, "search.best is 0"),
        ({"criteria": ["perplexity"], "remove": [-1]}, "search.remove.0. is -1; it must be zero or positive"),
        ({"criteria": ["perplexty"], "remove": [1]}, "did you mean 'perplexity'"),
    ],
)
def test_mistakes(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        words(**settings)
