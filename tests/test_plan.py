"""The order of samples: arithmetic that holds whatever the lanes, the shards and the processes."""

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.data.plan import Mixture, Order, Picks, Repeated, ends_epoch, needed, order, part_of_step, stretch
from pipeline.world import World

counts = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(counts)
    lanes = draw(st.integers(1, min(sum(sizes), 16)))
    return Order(sizes, lanes, window=draw(st.integers(1, 50)), seed=draw(st.integers(0, 3)))


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    parts = draw(st.lists(counts, min_size=2, max_size=4))
    weights = draw(st.lists(st.floats(0.3, 1), min_size=len(parts), max_size=len(parts)))
    lanes = draw(st.integers(14, 24))
    parts = [part if sum(part) >= lanes else (*part, lanes) for part in parts]
    made = order(parts, weights, lanes=lanes, window=draw(st.integers(1, 50)), seed=draw(st.integers(0, 3)))
    assert isinstance(made, Mixture)
    return made


@st.composite
def repetitions(draw: st.DrawFn) -> Repeated:
    return Repeated(draw(orders() | mixtures()), draw(st.integers(2, 5)))


def pictures(picks: Picks) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in picks), strict=True))


@given(orders())
@settings(deadline=None)
def test_an_epoch_holds_every_picture_once_whatever_the_lanes(order: Order) -> None:
    longest = -(-2 * order.samples // order.lanes) + 1
    seen = pictures(stretch(order, range(order.lanes), 0, longest))
    for epoch in (0, 1):
        once = sorted((shard, place) for e, shard, place in seen if e == epoch)
        assert once == [(shard, place) for shard, count in enumerate(order.counts) for place in range(count)]


@given(orders() | mixtures() | repetitions(), st.integers(0, 60), st.integers(1, 20))
@settings(deadline=None)
def test_to_skip_pictures_is_to_have_read_them_whatever_the_position(order: Order, start: int, count: int) -> None:
    for lane in range(order.lanes):
        read = pictures(stretch(order, range(lane, lane + 1), 0, start + count))
        assert pictures(stretch(order, range(lane, lane + 1), start, count)) == read[start:]


@pytest.mark.slow
@given(orders() | mixtures() | repetitions(), st.integers(0, 30), st.integers(1, 3))
@settings(deadline=None)
def test_the_cluster_does_not_change_the_pictures_of_a_step(
    order: Order | Mixture | Repeated, step: int, each: int
) -> None:
    batch = each * order.lanes
    alone = pictures(part_of_step(order, step, batch, 0, batch))
    assert alone == pictures(stretch(order, range(order.lanes), step * each, each))
    for size in [n for n in range(1, order.lanes + 1) if order.lanes % n == 0]:
        share = batch // size
        for micro in [m for m in range(1, share + 1) if share % m == 0]:
            firsts = range(0, batch, micro)
            assert [p for f in firsts for p in pictures(part_of_step(order, step, batch, f, micro))] == alone


@given(orders() | mixtures(), st.integers(0, 100), st.data())
@settings(deadline=None)
def test_what_is_needed_is_what_is_read_whatever_the_position(
    order: Order | Mixture, position: int, data: st.DataObject
) -> None:
    lanes = World(data.draw(st.integers(0, 1)), 2).share(order.lanes) if order.lanes > 1 else range(1)
    needs, known, last = needed(order, lanes, position), dict[int, list[tuple[int, int, set[int]]]](), position
    for _ in range(3 * len(lanes)):
        need = next(needs)
        assert need.start >= last
        last = need.start
        lane = next(lane for lane in lanes if known.get(lane, [(0, position, set())])[-1][1] == need.start)
        known.setdefault(lane, []).append((need.start, need.end, set(need.shards.tolist())))
    for lane, stretches in known.items():
        for start, end, shards in stretches:
            read = stretch(order, range(lane, lane + 1), start, end - start)
            assert set(read.shard.tolist()) <= shards
            if start > position:  # a whole window
                assert set(read.shard.tolist()) == shards


@given(repetitions(), st.integers(0, 100), st.integers(0, 1), st.integers(1, 30))
@settings(deadline=None)
def test_what_is_read_of_repeated_pictures_was_needed_before_and_is_until_then(
    order: Repeated, position: int, rank: int, count: int
) -> None:
    lanes = World(rank, 2).share(order.lanes) if order.lanes % 2 == 0 else range(order.lanes)
    known = list(takewhile(lambda need: need.start < position + count, needed(order, lanes, position)))
    assert [need.start for need in known] == sorted(need.start for need in known)
    read = stretch(order, lanes, position, count).shard.reshape(len(lanes), count)
    for i in range(count):
        held = [need.shards for need in known if need.start <= position + i < need.end]
        assert {*read[:, i].tolist()} <= {*np.concatenate(held).tolist()}
    assert len(order.reads(lanes)) <= len(lanes) + 2 * order.times


@given(repetitions().filter(lambda made: isinstance(made.once, Order)))
@settings(deadline=None)
def test_every_picture_comes_so_many_times_in_a_row_in_lanes_side_by_side(order: Repeated) -> None:
    assert isinstance(order.once, Order)
    positions = order.times * (-(-order.samples // order.lanes) + 1)
    lane, position = np.tile(np.arange(order.lanes), positions), np.repeat(np.arange(positions), order.lanes)
    dealt = pictures(order.at(lane, position))
    for first in range(0, order.times * order.samples, order.times):
        copies = dealt[first : first + order.times]
        assert len({copy[1:] for copy in copies}) == 1
        assert [epoch % order.times for epoch, _, _ in copies] == list(range(order.times))
    first_pass = sorted((shard, place) for epoch, shard, place in dealt if epoch < order.times)
    held = [(shard, place) for shard, count in enumerate(order.once.counts) for place in range(count)]
    assert first_pass == sorted(order.times * held)


@given(repetitions(), st.integers(0, 30), st.integers(2, 5))
@settings(deadline=None)
def test_no_picture_is_paired_with_a_copy_of_its_own(order: Repeated, step: int, each: int) -> None:
    assume(order.lanes >= order.times and each * order.lanes % 2 == 0)
    picks = part_of_step(order, step, each * order.lanes, 0, each * order.lanes)
    same = [(column[::2] == column[1::2]) for column in (picks.epoch // order.times, picks.shard, picks.place)]
    assert not np.logical_and.reduce(same).any()


@given(st.lists(counts, min_size=1, max_size=4), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_of_several_sets_holds_every_picture_once(parts: list[tuple[int, ...]], seed: int) -> None:
    laid = order(parts, (), lanes=1, window=7, seed=seed)
    seen = pictures(stretch(laid, range(1), 0, laid.samples))
    shards = [count for part in parts for count in part]
    assert sorted(seen) == [(0, shard, place) for shard, count in enumerate(shards) for place in range(count)]


@given(mixtures(), st.integers(0, 20), st.integers(1, 4))
@settings(deadline=None)
def test_every_step_holds_each_set_by_its_weight_to_within_a_lane(order: Mixture, step: int, each: int) -> None:
    picks = part_of_step(order, step, each * order.lanes, 0, each * order.lanes)
    first = np.cumsum([0] + [len(part.counts) for part in order.parts])
    for part in range(len(order.parts)):
        here = (picks.shard >= first[part]) & (picks.shard < first[part + 1])
        assert here.sum() == each * (order.of == part).sum()


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 300))
def test_the_share_of_every_set_is_less_than_a_lane_from_its_weight(weights: list[float], lanes: int) -> None:
    try:
        made = order([(1000,)] * len(weights), weights, lanes=lanes, window=7, seed=0)
    except ValueError as error:
        assert "would get none" in str(error)
        return
    assert isinstance(made, Mixture)
    for part, weight in enumerate(weights):
        assert abs((made.of == part).sum() - lanes * weight / sum(weights)) < 1


@given(mixtures())
@settings(deadline=None)
def test_every_part_of_a_mixture_goes_through_its_own_epochs(order: Mixture) -> None:
    """Each set comes round at its own pace, every picture once each time."""
    for part, of in enumerate(order.parts):
        lanes = np.flatnonzero(order.of == part).tolist()
        longest = -(-of.samples // of.lanes)
        seen = [p for lane in lanes for p in pictures(stretch(order, range(lane, lane + 1), 0, longest))]
        first = [(shard, place) for epoch, shard, place in seen if epoch == 0]
        assert len(first) == len(set(first)) == of.samples


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((1.0,), "needs a number above 0 for each of the 2 sets"),
        ((1.0, 0.0), "needs a number above 0 for each of the 2 sets"),
        ((1.0, 0.001), "set 2 would get none; data.lanes of 1001 or more would do"),
    ],
)
def test_weights_that_cannot_hold_are_refused_with_a_way_out(weights: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        order([(50,), (50,)], weights, lanes=4, window=1, seed=0)


@given(orders(), st.integers(0, 200))
@settings(deadline=None)
def test_no_lane_is_ever_more_than_one_picture_ahead_of_another(order: Order, position: int) -> None:
    epochs = [pictures(stretch(order, range(lane, lane + 1), position, 2)) for lane in range(order.lanes)]
    begun = max(first[0] for first, _ in epochs)
    assert all(second[0] >= begun for _, second in epochs)


def test_every_epoch_has_an_order_of_its_own() -> None:
    order = Order((50, 60, 70), lanes=4, window=20, seed=0)
    seen = pictures(stretch(order, range(4), 0, 90))
    first = [(s, p) for e, s, p in seen if e == 0]
    second = [(s, p) for e, s, p in seen if e == 1]
    assert sorted(first) == sorted(second) and first != second


def test_neighbours_of_a_shard_are_spread_as_far_as_the_window_reaches() -> None:
    order = Order((1000,) * 8, lanes=2, window=2000, seed=0)
    stream = stretch(order, range(1), 0, 4000)
    where = {(int(s), int(p)): i for i, (s, p) in enumerate(zip(stream.shard, stream.place, strict=True))}
    apart = [abs(where[s, p] - where[s, p + 1]) for s, p in where if (s, p + 1) in where]
    full = 2000 / 3  # the mean distance of two places drawn from a window
    assert np.mean(apart) == pytest.approx(full, rel=0.1)


def test_a_billion_pictures_cost_no_more_than_their_shards() -> None:
    order = Order((10_000,) * 100_000, lanes=512, window=16_384, seed=0)
    picks = part_of_step(order, 123_456, 4096, 0, 4096)
    assert len(picks.shard) == 4096 and len(set(pictures(picks))) == 4096


@given(st.integers(1, 50), st.integers(1, 300))
def test_as_many_epochs_end_as_there_are_in_the_steps(batch: int, samples: int) -> None:
    ends = sum(ends_epoch(step, batch, samples) for step in range(1, 101))
    assert ends == min(100, 100 * batch // samples) if batch <= samples else ends == 100


def test_too_few_pictures_for_the_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 pictures are too few for 4 lanes"):
        Order((3,), lanes=4, window=1, seed=0)
