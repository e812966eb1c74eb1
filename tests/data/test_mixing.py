"""The mixing of domains is exact at every prefix."""

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.data.mixing import PPM, Mixer, domain_weights, integer_weights
from llmprune.data.sampler_state import Partitions

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
        assert all(abs(count - n * part / PPM) < 1 for count, part in zip(seen, parts, strict=True))


@settings(max_examples=60, deadline=None)
@given(weights)
def test_integer_weights_sum_to_a_million_and_are_nearest(raw: list[float]) -> None:
    parts = integer_weights(raw)
    assert sum(parts) == PPM
    assert all(abs(part - w / sum(raw) * PPM) < 1 for part, w in zip(parts, raw, strict=True))


@pytest.mark.parametrize("domains", [2, 3, 7, 12])
def test_changed_weights_lose_no_share(domains: int) -> None:
    """However often weights change, each domain keeps its due share to about one sample: nothing adds up.

    (Not to less than one: weights chosen against the domain that is behind can put it further behind.)
    """
    random = Random(domains)

    def some() -> list[int]:
        return integer_weights([random.random() ** 3 + 1e-3 for _ in range(domains)])

    mixer, due, worst = Mixer(some()), [0] * domains, 0.0
    for _ in range(300):
        for _ in range(random.choice([1, 2, 8, 30])):
            due = [d + w for d, w in zip(due, mixer.weights, strict=True)]
            mixer.next()
            worst = max(worst, *(abs(c - d / PPM) for c, d in zip(mixer.counts, due, strict=True)))
        mixer.change(some())
    assert worst < 1.2


def test_a_mixer_goes_on_from_its_state() -> None:
    mixer = Mixer([3, 5, 2])
    for slot in range(27):
        mixer.next()
        if slot == 10:
            mixer.change([0, 1, 9])
    other = Mixer.at(json.loads(json.dumps(mixer.state())))
    assert [other.next() for _ in range(20)] == [mixer.next() for _ in range(20)]


def test_a_domain_whose_weight_becomes_zero_stops_at_once() -> None:
    mixer = Mixer([2, 1, 7])
    [mixer.next() for _ in range(3)]
    mixer.change([5, 5, 0])
    assert {mixer.next()[0] for _ in range(50)} == {0, 1}
    assert sum(mixer.owed) == 0 == mixer.owed[2]
    with pytest.raises(ValueError, match="sum to 10"):
        mixer.change([5, 5, 5])


def test_a_domain_of_weight_zero_never_comes() -> None:
    mixer = Mixer(domain_weights({"a": 5, "b": 5, "c": 5}, {"a": 1.0, "c": 3.0}))
    assert {mixer.next()[0] for _ in range(200)} == {0, 2}


def test_without_weights_samples_decide() -> None:
    assert domain_weights({"a": 1, "b": 3}, None) == [250_000, 750_000]


@pytest.mark.parametrize("raw", [[], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_impossible_weights_are_refused(raw: list[float]) -> None:
    with pytest.raises(ValueError, match="non-negative"):
        integer_weights(raw)


@pytest.mark.parametrize("raw", [[1e-9, 1.0], [0.0, 1.0, 4e-7]])
def test_a_weight_too_small_ever_to_be_drawn_is_refused(raw: list[float]) -> None:
    with pytest.raises(ValueError, match="never be drawn, the smallest possible share is 1e-06"):
        integer_weights(raw)
    assert integer_weights([1e-6, 1 - 1e-6]) == [1, PPM - 1]


@pytest.mark.parametrize("seed", range(30))
def test_lanes_get_even_shares_of_every_domain(seed: int) -> None:
    """Of whatever batches, changes of weights included: each partition stays within a few samples of its share."""
    draw = Random(seed)
    domains, partitions, room = draw.randint(1, 9), draw.choice([2, 3, 4, 8, 16]), draw.choice([1, 2, 3, 8])

    def parts() -> list[int]:
        return integer_weights([draw.random() ** 3 + 1e-4 for _ in range(domains)])

    mixer, dealer, seen = Mixer(parts()), Partitions(domains, partitions), [[0] * partitions for _ in range(domains)]
    for _ in range(200):
        if draw.random() < 0.05:
            mixer.change(parts())
        batch = [0] * domains
        for _ in range(partitions * room):
            batch[mixer.next()[0]] += 1
        dealt = dealer.deal(batch)
        assert [partition for _, partition, _ in dealt] == [
            partition for partition in range(partitions) for _ in range(room)
        ]
        for domain, partition, number in sorted(dealt):
            assert number == seen[domain][partition]  # without gaps
            seen[domain][partition] += 1
        assert [sum(counts) for counts in seen] == mixer.counts
        assert all(abs(count - sum(counts) / partitions) < 5 for counts in seen for count in counts)
