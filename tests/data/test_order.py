"""The order of a domain's samples."""

import pytest

from llmprune.data.order import domain_order


@pytest.mark.parametrize("sizes", [[1], [7], [5, 3, 9, 1, 4, 8, 2, 6, 7, 5, 3], [10] * 8, [10] * 9])
def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(sizes: list[int]) -> None:
    order, total = domain_order(sizes, 1, 0, window=4)[0], sum(sizes)
    everything = {(shard, i) for shard, size in enumerate(sizes) for i in range(size)}
    epochs = [[order.locate(epoch * total + n) for n in range(total)] for epoch in range(3)]
    for epoch in epochs:
        assert set(epoch) == everything
    if total > 20:
        assert epochs[0] != epochs[1] != epochs[2]


def test_any_place_can_be_asked_for_in_any_sequence() -> None:
    sizes = [6, 4, 9, 3, 5]
    forward = [domain_order(sizes, 3, 1, window=2)[0].locate(n) for n in range(60)]
    order = domain_order(sizes, 3, 1, window=2)[0]
    assert [order.locate(n) for n in reversed(range(60))] == forward[::-1]


def test_seeds_and_domains_differ() -> None:
    orders = [
        [domain_order([40], seed, domain)[0].locate(n) for n in range(40)] for seed, domain in ((1, 0), (2, 0), (1, 1))
    ]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_neighbours_come_from_one_window_of_shards() -> None:
    order = domain_order([10] * 12, 0, 0, window=3)[0]
    for window in range(4):
        assert len({order.locate(window * 30 + n)[0] for n in range(30)}) == 3


@pytest.mark.parametrize("partitions", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [[7], [5, 3, 9, 1, 4, 8, 2, 6, 7, 5, 3], [10] * 9])
def test_lanes_share_no_sample_and_hardly_a_shard(sizes: list[int], partitions: int) -> None:
    orders = domain_order(sizes, 1, 0, window=2, partitions=partitions)
    epochs = [[{order.locate(e * order.samples + n) for n in range(order.samples)} for e in (0, 1)] for order in orders]
    assert all(first == second for first, second in epochs)  # a partition keeps its samples
    everything = {(shard, i) for shard, size in enumerate(sizes) for i in range(size)}
    assert set.union(*(first for first, _ in epochs)) == everything
    assert sum(order.samples for order in orders) == sum(sizes)
    assert max(order.samples for order in orders) - min(order.samples for order in orders) <= 1
    shards = [{shard for shard, _ in first} for first, _ in epochs]
    assert sum(map(len, shards)) <= len(sizes) + partitions - 1


def test_what_is_read_next_is_known() -> None:
    (order,) = domain_order([4] * 10, 5, 0, window=3)
    for number in range(120):
        order.locate(number)
        upcoming = order.upcoming()
        place = order.place
        (other,) = domain_order([4] * 10, 5, 0, window=3)
        after = number
        while True:  # until two windows on
            shard, _ = other.locate(after)
            if other.place != place and shard not in upcoming:
                break
            after += 1
        assert after - number > 4 and len(upcoming) <= 6
        (last,) = domain_order([4] * 10, 5, 0, window=3)
        last.locate(after)
        assert last.place[0] > place[0] or last.place[1] >= place[1] + 2
