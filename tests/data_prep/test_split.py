"""Which documents are kept for evaluation."""

import random

import pytest

from data_prep.split import exceptions_for, rank_of, split_of


def test_the_hash_decides_and_shares_are_right() -> None:
    splits = [split_of(rank_of(f"text {n}", 17), 0.25, {}) for n in range(4000)]
    assert splits == [split_of(rank_of(f"text {n}", 17), 0.25, {}) for n in range(4000)]
    assert splits.count("eval") / 4000 == pytest.approx(0.25, abs=0.03)
    assert splits != [split_of(rank_of(f"text {n}", 18), 0.25, {}) for n in range(4000)]


@pytest.mark.parametrize("seed", range(200))
def test_domains_of_four_samples_have_both_sides_where_documents_allow(seed: int) -> None:
    draw = random.Random(seed)
    length, fraction = 10, draw.choice([1e-6, 0.01, 0.3, 0.9, 0.999])
    ranks = [rank_of(f"{seed} {draw.randrange(30)}", 17) for _ in range(draw.randrange(1, 60))]
    sizes = [draw.randrange(1, 12) for _ in ranks]
    exceptions = exceptions_for(ranks, sizes, fraction, length)
    held_out = sum(s for r, s in zip(ranks, sizes, strict=True) if split_of(r, fraction, exceptions) == "eval")
    total = sum(sizes)
    by_hash = sum(s for r, s in zip(ranks, sizes, strict=True) if split_of(r, fraction, {}) == "eval")
    if length <= by_hash <= total - length:
        assert exceptions == {}
    if total >= length:
        assert total - held_out >= length
    largest = max(sum(s for r, s in zip(ranks, sizes, strict=True) if r == rank) for rank in ranks)
    if total >= 4 * length and largest <= length:  # documents that are small enough to choose among
        assert held_out >= length


def test_documents_too_large_to_hold_out_stay_in_training() -> None:
    assert exceptions_for([2**63, 2**63 + 1], [100, 1], 0.0001, 10) == {}
