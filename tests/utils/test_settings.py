"""Settings that say which values they take."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from llmprune.config.schema import Config, IterationConfig, ScoringConfig, SearchConfig
from llmprune.config.section_registry import with_sections
from llmprune.utils.errors import UserError
from llmprune.utils.settings import Range, check_settings, limited, meanings_of, words_of


@dataclass
class _Inner:
    share: float = limited(0.5, least=0, below=1)


@dataclass
class _Settings:
    """What a test sets.

    Attributes:
        count: how many.
        word: one of
            two words.
    """

    count: int = limited(1, least=1)
    rate: float | None = limited(None, above=0)
    word: Literal["one", "two"] = "one"
    words: list[Literal["one", "two"]] | None = None
    weights: dict[str, float] = limited(make=dict, least=0)
    size: int | Literal["auto"] = limited(1, least=1, most=10)
    inner: _Inner = field(default_factory=_Inner)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "a.count is 0; it must be positive$"),
        ({"count": math.nan}, "a.count is nan; it must be positive"),
        ({"rate": 0.0}, "a.rate is 0.0; it must be positive, or null"),
        ({"rate": math.inf}, "a.rate is inf; it must be positive, or null"),
        ({"word": "tow"}, "a.word 'tow' is unknown; valid: one, two"),
        ({"word": 5}, "a.word '5' is unknown; valid: one, two"),
        ({"word": ["one"]}, "a.word .* is unknown; valid: one, two"),
        ({"word": None}, "a.word 'None' is unknown"),
        ({"size": "4"}, "a.size '4' is unknown; valid: auto, or a number"),
        ({"words": ["one", "tree"]}, r"a.words\[1\] 'tree' is unknown"),
        ({"weights": {"x": 1.0, "y": -1.0}}, "a.weights.y is -1.0; it must be zero or positive"),
        ({"size": 11}, "a.size is 11; it must lie between 1 and 10, or auto"),
        ({"inner": _Inner(1.0)}, r"a.inner.share is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_values_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(_Settings(**changes), "a")


def test_values_that_are_taken() -> None:
    check_settings(_Settings(10**9, 1e-9, "two", ["one"], {"x": 0.0}, "auto", _Inner(0.0)))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Range(least=1), "be positive"),
        (Range(least=2), "be at least 2"),
        (Range(above=1), "be more than 1"),
        (Range(most=5), "be at most 5"),
        (Range(below=5), "be smaller than 5"),
        (Range(above=0, most=1), "lie in (0, 1]"),
    ],
)
def test_ranges_in_words(limits: Range, words: str) -> None:
    assert str(limits) == words


def test_meanings_come_from_the_docstring() -> None:
    assert meanings_of(_Settings) == {"count": "how many.", "word": "one of two words."}
    assert words_of(Literal["a"] | int | None) == ("a",)


@pytest.mark.parametrize("schema", [with_sections(Config), ScoringConfig, IterationConfig, SearchConfig])
def test_every_default_is_a_value_that_is_taken(schema: Any) -> None:
    settings = schema()
    for section in ("run", "data", "train", "model", "optimizer", "scheduler", "checkpoint", "layer_scoring", "plan"):
        for name in getattr(getattr(settings, section, None), "__dataclass_fields__", {}):
            if getattr(getattr(settings, section), name) == "???":  # must be set
                setattr(getattr(settings, section), name, 8)
    check_settings(settings)
