"""The mixing of domains is exact at every prefix."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.data.mixing import PARTS, Mixer, domain_weights, integer_weights

weights = st.lists(st.just(0.0) | st.floats(1e-4, 1), min_size=1, max_size=9).filter(any)


@settings(max_examples=60, deadline=None)
@given(weights)
def test_every_prefix_is_within_one_sample(raw: list[float]) -> None:
    parts = integer_weights(raw)
    mixer, seen = Mixer(parts), [0] * len(parts)
    for n in range(1, 600):
        domain, number = mixer.next()
        assert number == seen[domain]  # samples of a domain are numbered without gaps
        seen[domain] += 1
        assert all(abs(count - n * part / PARTS) < 1 for count, part in zip(seen, parts, strict=True))


@settings(max_examples=60, deadline=None)
@given(weights)
def test_integer_weights_sum_to_a_million_and_are_nearest(raw: list[float]) -> None:
    parts = integer_weights(raw)
    assert sum(parts) == PARTS
    assert all(abs(part - w / sum(raw) * PARTS) < 1 for part, w in zip(parts, raw, strict=True))


@pytest.mark.parametrize("slots", [0, 1, 27, 10, 1003])
def test_skipping_equals_taking(slots: int) -> None:
    a, b = Mixer([3, 5, 2]), Mixer([3, 5, 2])
    a.skip(slots)
    for _ in range(slots):
        b.next()
    assert [a.next() for _ in range(20)] == [b.next() for _ in range(20)]


def test_a_domain_of_weight_zero_never_comes() -> None:
    mixer = Mixer(domain_weights(["a", "b", "c"], {"a": 1.0, "c": 3.0}, [5, 5, 5]))
    assert {mixer.next()[0] for _ in range(200)} == {0, 2}


def test_without_weights_samples_decide() -> None:
    assert domain_weights(["a", "b"], None, [1, 3]) == [250_000, 750_000]


@pytest.mark.parametrize("raw", [[], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_impossible_weights_are_refused(raw: list[float]) -> None:
    with pytest.raises(ValueError, match="non-negative"):
        integer_weights(raw)


@pytest.mark.parametrize("raw", [[1e-9, 1.0], [0.0, 1.0, 4e-7]])
def test_a_weight_too_small_ever_to_be_drawn_is_refused(raw: list[float]) -> None:
    with pytest.raises(ValueError, match="never be drawn, the smallest possible share is 1e-06"):
        integer_weights(raw)
    assert integer_weights([1e-6, 1 - 1e-6]) == [1, PARTS - 1]
