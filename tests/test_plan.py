"""The order of samples: arithmetic that holds whatever the lanes, the shards and the processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.plan import Order, Picks, ends_epoch
from pipeline.world import World

counts = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(counts)
    lanes = draw(st.integers(1, min(sum(sizes), 16)))
    return Order(sizes, lanes, window=draw(st.integers(1, 50)), seed=draw(st.integers(0, 3)))


def pictures(picks: Picks) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in picks), strict=True))


@given(orders())
@settings(deadline=None)
def test_an_epoch_holds_every_picture_once_whatever_the_lanes(order: Order) -> None:
    longest = -(-2 * order.samples // order.lanes) + 1
    seen = pictures(order.stretch(range(order.lanes), 0, longest))
    for epoch in (0, 1):
        once = sorted((shard, place) for e, shard, place in seen if e == epoch)
        assert once == [(shard, place) for shard, count in enumerate(order.counts) for place in range(count)]


@given(orders(), st.integers(0, 60), st.integers(1, 20))
@settings(deadline=None)
def test_to_skip_pictures_is_to_have_read_them_whatever_the_position(order: Order, start: int, count: int) -> None:
    for lane in range(order.lanes):
        read = pictures(order.stretch(range(lane, lane + 1), 0, start + count))
        assert pictures(order.stretch(range(lane, lane + 1), start, count)) == read[start:]


@given(orders(), st.integers(0, 30), st.integers(1, 3))
@settings(deadline=None)
def test_the_cluster_does_not_change_the_pictures_of_a_step(order: Order, step: int, each: int) -> None:
    batch = each * order.lanes
    alone = pictures(order.step(step, batch, range(order.lanes)))
    for size in [n for n in range(1, order.lanes + 1) if order.lanes % n == 0]:
        shares = [World(rank, size).share(order.lanes) for rank in range(size)]
        assert [p for share in shares for p in pictures(order.step(step, batch, share))] == alone


@given(orders(), st.integers(0, 200))
@settings(deadline=None)
def test_no_lane_is_ever_more_than_one_picture_ahead_of_another(order: Order, position: int) -> None:
    epochs = [pictures(order.stretch(range(lane, lane + 1), position, 2)) for lane in range(order.lanes)]
    begun = max(first[0] for first, _ in epochs)
    assert all(second[0] >= begun for _, second in epochs)


def test_every_epoch_has_an_order_of_its_own() -> None:
    order = Order((50, 60, 70), lanes=4, window=20, seed=0)
    seen = pictures(order.stretch(range(4), 0, 90))
    first = [(s, p) for e, s, p in seen if e == 0]
    second = [(s, p) for e, s, p in seen if e == 1]
    assert sorted(first) == sorted(second) and first != second


def test_neighbours_of_a_shard_are_spread_as_far_as_the_window_reaches() -> None:
    order = Order((1000,) * 8, lanes=2, window=2000, seed=0)
    stream = order.stretch(range(1), 0, 4000)
    where = {(int(s), int(p)): i for i, (s, p) in enumerate(zip(stream.shard, stream.place, strict=True))}
    apart = [abs(where[s, p] - where[s, p + 1]) for s, p in where if (s, p + 1) in where]
    full = 2000 / 3  # the mean distance of two places drawn from a window
    assert np.mean(apart) == pytest.approx(full, rel=0.1)


def test_a_billion_pictures_cost_no_more_than_their_shards() -> None:
    order = Order((10_000,) * 100_000, lanes=512, window=16_384, seed=0)
    picks = order.step(123_456, 4096, range(512))
    assert len(picks.shard) == 4096 and len(set(pictures(picks))) == 4096


@given(st.integers(1, 50), st.integers(1, 300))
def test_as_many_epochs_end_as_there_are_in_the_steps(batch: int, samples: int) -> None:
    ends = sum(ends_epoch(step, batch, samples) for step in range(1, 101))
    assert ends == min(100, 100 * batch // samples) if batch <= samples else ends == 100


def test_too_few_pictures_for_the_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 pictures are too few for 4 lanes"):
        Order((3,), lanes=4, window=1, seed=0)
