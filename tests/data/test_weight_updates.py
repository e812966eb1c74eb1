"""Weights that follow losses, against the formula worked out by hand and against its properties."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.data.mixing import PPM, integer_weights
from llmprune.data.weight_updates import (
    DynamicLoadingConfig,
    Measured,
    bounded,
    check_updates,
    drawable,
    first_weights,
    new_weights,
    read_references,
)
from llmprune.utils.errors import UserError

DOMAINS = ["a", "b", "c"]
EVEN = dict.fromkeys(DOMAINS, 1 / len(DOMAINS))
HALF = math.log(0.5)


def update(config: DynamicLoadingConfig, weights: list[float], excess: list[float], at: float = 0) -> list[float]:
    found = new_weights(Measured(weights, excess, at), config, DOMAINS)
    assert found is not None
    return found


def test_doremi_by_hand() -> None:
    """Excess log 2 doubles a weight before all are scaled: (.5, .25·2, .25) / 1.25."""
    config = DynamicLoadingConfig(smoothing=0.0)
    assert update(config, [0.5, 0.25, 0.25], [0.0, math.log(2), 0.0]) == pytest.approx([0.4, 0.4, 0.2])
    assert update(config, [0.5, 0.25, 0.25], [-9.0, math.log(2), -1.0]) == pytest.approx([0.4, 0.4, 0.2])
    config = DynamicLoadingConfig(smoothing=0.3, clamp=False)
    wanted = [0.7 * w / 1.5 + 0.1 for w in (0.25, 1.0, 0.25)]
    assert update(config, [1 / 3, 1 / 3, 1 / 3], [HALF, math.log(2), HALF]) == pytest.approx(wanted)


def test_bandit_by_hand() -> None:
    config = DynamicLoadingConfig(update="bandit", smoothing=0.0)
    powers = np.exp([0.2 + 1.0, 0.3 + 0.0, 0.5 + 0.5])
    assert update(config, [0.2, 0.3, 0.5], [1.0, -2.0, 0.5]) == pytest.approx((powers / powers.sum()).tolist())


def test_a_schedule() -> None:
    points: list[dict[str, Any]] = [
        {"at": 0.2, "weights": {"a": 1}},
        {"at": 0.6, "weights": {"b": 3, "c": 1}},
    ]
    config = DynamicLoadingConfig(update="schedule", schedule=points)
    nan = [math.nan] * 3
    for at, wanted in ((0, [1, 0, 0]), (0.2, [1, 0, 0]), (0.4, [0.5, 0.375, 0.125]), (1, [0, 0.75, 0.25])):
        assert update(config, [1.0, 0.0, 0.0], nan, at) == pytest.approx(wanted)


def test_a_domain_of_weight_zero_stays_out() -> None:
    for kind in ("doremi", "bandit"):
        found = update(DynamicLoadingConfig(update=kind), [0.5, 0.0, 0.5], [0.1, math.nan, 0.3])
        assert found[1] == 0 and sum(found) == pytest.approx(1)


def test_what_is_no_number_changes_nothing() -> None:
    for bad in (math.nan, math.inf):
        assert new_weights(Measured([0.5, 0.5, 0.0], [0.1, bad, 0.1], 0), DynamicLoadingConfig(), DOMAINS) is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1), min_size=3, max_size=3),
    st.lists(st.floats(-50, 50), min_size=3, max_size=3),
    st.floats(0, 0.33),
    st.floats(0.34, 1),
    st.sampled_from(["doremi", "bandit"]),
    st.booleans(),
)
def test_bounds_hold_whatever_the_losses(
    raw: list[float], excess: list[float], floor: float, ceiling: float, kind: str, clamp: bool
) -> None:
    config = DynamicLoadingConfig(update=kind, floor=floor, ceiling=ceiling, clamp=clamp)
    found = update(config, [w / sum(raw) for w in raw], excess)
    assert sum(found) == pytest.approx(1)
    assert all(floor - 1e-9 <= w <= ceiling + 1e-9 for w in found)


def test_bounded_keeps_proportions_where_it_can() -> None:
    assert bounded([6, 3, 1], [0, 0, 0.2], [1, 1, 1]) == pytest.approx([8 / 15, 4 / 15, 0.2])
    assert bounded([6, 3, 1], [0, 0, 0], [0.5, 1, 1]) == pytest.approx([0.5, 0.375, 0.125])
    assert bounded([1, 0, 0], [0, 0, 0], [0.5, 1, 0.2]) == pytest.approx([0.5, 0.3, 0.2])  # what is left goes evenly
    assert bounded([1, 1, 0], [0, 0, 0.1], [1, 1, 1]) == pytest.approx([0.45, 0.45, 0.1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update": "doremy"}, "did you mean 'doremi'"),
        ({"references": None}, "needs dynamic_loading.references"),
        ({"references": {"a": 1.0, "b": 2.0}}, "no loss for the domain 'c'"),
        ({"references": {"x": 1.0}}, "names 'x'"),
        ({"references": {"a": math.nan, "b": 2.0, "c": 1.0}}, "must hold numbers"),
        ({"floor": 0.4}, "sum to at most 1"),
        ({"ceiling": {"a": 0.1, "b": 0.1, "c": 0.1}}, "at least 1"),
        ({"floor": {"a": 0.5}, "ceiling": 0.4}, "floor ≤"),
        ({"floor": "much"}, "must be a number"),
        ({"smoothing": 2.0}, "must lie between 0 and 1"),
        ({"eta": math.nan}, "must be zero or positive"),
        ({"update_delay": -1}, "update_delay is -1"),
        ({"update": "schedule"}, "needs points"),
        ({"update": "schedule", "schedule": [{"at": 0, "weights": {"z": 1}}]}, "no domain 'z'"),
        ({"update": "schedule", "schedule": [{"at": 0, "weights": {"a": 0}}]}, "must be points"),
        ({"update": "schedule", "schedule": [{"at": 1, "weights": {"a": 1}}, {"at": 0, "weights": {"a": 1}}]}, "rises"),
        ({"update": "schedule", "schedule": [{"weights": {"a": 1}}]}, "must be points"),
        ({"update": "schedule", "schedule": [{"at": 0, "weights": {"a": 1}}], "ceiling": 0.6}, "gives 'a' 1 at 0"),
        ({"update": "schedule", "schedule": [{"at": 0, "weights": {"a": 1}}], "floor": {"b": 0.1}}, "gives 'b' 0 at 0"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    config = DynamicLoadingConfig(**{"references": dict.fromkeys(DOMAINS, 1.0), **changes})
    with pytest.raises(UserError, match=message):
        check_updates(config, DOMAINS, EVEN, DOMAINS)


def test_a_domain_without_evaluation_samples_keeps_its_weight() -> None:
    config = DynamicLoadingConfig(references={"a": 1.0, "c": 1.0}, smoothing=0.0, floor={"c": 0.2})
    start = {"a": 0.3, "b": 0.4, "c": 0.3}
    check_updates(config, DOMAINS, start, ["a", "c"])
    with pytest.raises(UserError, match=r"floors of the domains that change must sum to at most 0.6"):
        check_updates(replace(config, floor={"c": 0.61}), DOMAINS, start, ["a", "c"])
    found = new_weights(Measured([0.3, 0.4, 0.3], [math.log(2), math.nan, 0.0], 0), config, DOMAINS, {"b"})
    assert found == pytest.approx([0.4, 0.4, 0.2])
    found = new_weights(Measured([0.3, 0.4, 0.3], [math.log(9), math.nan, 0.0], 0), config, DOMAINS, {"b"})
    assert found == pytest.approx([0.4, 0.4, 0.2])  # the floor is a share of everything
    with pytest.raises(UserError, match="needs two domains with evaluation samples"):
        check_updates(config, DOMAINS, start, ["a"])
    with pytest.raises(UserError, match=r"their ceilings to at least 0.6"):
        check_updates(replace(config, floor=0.0, ceiling={"a": 0.2, "c": 0.3}), DOMAINS, start, ["a", "c"])


def test_weights_that_overflow_stay() -> None:
    config = DynamicLoadingConfig(eta=1e308, references=dict.fromkeys(DOMAINS, 1.0))
    assert new_weights(Measured([0.5, 0.3, 0.2], [900.0, 0.0, 0.0], 0), config, DOMAINS) is None


def test_references_are_losses_by_name() -> None:
    for wrong in (5, [1.0, 2.0]):
        with pytest.raises(UserError, match="must be losses by domain"):
            read_references(wrong)


def test_no_domain_drops_out_by_rounding() -> None:
    config = DynamicLoadingConfig(references=dict.fromkeys(DOMAINS, 1.0), smoothing=0.0, clamp=False)
    weights = [0.5, 0.3, 0.2]
    for _ in range(3):
        weights = integer_weights(drawable(new_weights(Measured(weights, [900.0, 0.0, 0.0], 0), config, DOMAINS) or []))
        assert min(weights) >= 1
        weights = [part / PPM for part in weights]
    back = new_weights(Measured(weights, [0.0, 900.0, 0.0], 0), config, DOMAINS)
    assert back is not None and back[1] > 0.99


def test_a_schedule_begins_with_the_run() -> None:
    points = [{"at": 0.0, "weights": {"a": 1, "b": 3}}, {"at": 1.0, "weights": {"c": 1}}]
    assert first_weights(DynamicLoadingConfig("schedule", schedule=points), DOMAINS) == {"a": 0.25, "b": 0.75, "c": 0}
    assert first_weights(DynamicLoadingConfig("constant"), DOMAINS) is None
