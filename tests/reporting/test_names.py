"""Labels and numbers."""

import math
from typing import Any

import pytest

from llmprune.reporting.names import short_names
from llmprune.reporting.numbers import memory, shown


@pytest.mark.parametrize(
    "names, labels",
    [
        (["runs/a", "org/b", "c/"], ["a", "b", "c"]),
        (["x/a/m", "x/b/m", "x/b/n"], ["a/m", "b/m", "n"]),
        (["x/a/m", "y/a/m", "z/c/m"], ["x/a/m", "y/a/m", "c/m"]),
        (["m", "x/m", "y/x/m"], ["m", "x/m", "y/x/m"]),
        (["/m", "m"], ["/m", "m"]),
        (["m", "m", ""], ["m", "m", "."]),
    ],
)
def test_labels_are_as_short_as_they_can_be(names: list[str], labels: list[str]) -> None:
    assert short_names(names) == labels


@pytest.mark.parametrize(
    "value, text",
    [
        (7, "7"), (134515008, "134,515,008"), (0.0, "0"), (13.0, "13.00"), (0.05, "0.05000"), (-4.71905, "-4.719"),
        (123456.7, "123,457"), (3e12, "3.000e+12"), (2.5e-7, "2.500e-07"),
        (math.nan, "no number"), (math.inf, "no number"), (None, "no number"),
    ],
)  # fmt: skip
def test_numbers_have_four_digits(value: Any, text: str) -> None:
    assert shown(value) == text


def test_memory() -> None:
    assert [memory(size) for size in (118.4e6, 4.25e6, 1e9, 13.42e9)] == ["118 MB", "4.25 MB", "1.00 GB", "13.4 GB"]
