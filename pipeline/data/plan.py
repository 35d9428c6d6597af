"""Which pictures are in which step: arithmetic, with no network, rank, clock or state.

Each epoch puts the shards in an order of its own and cuts their pictures, laid end to end, into as many streams as
there are lanes. A lane shuffles its stream window by window, and goes on with its stream of the next epoch. A step
takes equally many pictures from each lane. So the pictures of a step depend neither on the number of processes nor on
that of threads, and a position is one integer: the step.

Several shard sets are laid end to end as well, or, where they have weights, each gets lanes of its own: then the share
of a set is that of its lanes, in every step. Where pictures are repeated, the copies of one go to lanes side by side.

Legend: N pictures of the corpus, L lanes, e epoch, l lane.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.seed import mixed, number, permutation, shuffled

Numbers = NDArray[np.int64]


class Picks(NamedTuple):
    """Pictures in the order of a batch: epoch, shard and place within the shard of each."""

    epoch: Numbers
    shard: Numbers
    place: Numbers


class Need(NamedTuple):
    """Shards that a lane reads between two positions of its stream."""

    start: int
    end: int
    shards: Numbers


@dataclass(frozen=True)
class Order:
    """The order of a corpus whose shard i holds `counts[i]` pictures, in `lanes` streams."""

    counts: tuple[int, ...]
    lanes: int
    window: int
    seed: int
    _epoch: object = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.samples < self.lanes:
            raise ValueError(f"{self.samples} pictures are too few for {self.lanes} lanes: use fewer data.lanes")
        if self.window < 1:
            raise ValueError(f"data.window is {self.window}; at least 1 is needed")
        # A step looks at two epochs at the most.
        object.__setattr__(self, "_epoch", lru_cache(maxsize=4)(self._lay_out))

    @cached_property
    def samples(self) -> int:
        """N."""
        return sum(self.counts)

    def at(self, lane: Numbers, position: Numbers) -> Picks:
        """The pictures at these positions (n) of the endless streams of these lanes (n)."""
        epoch = ((position + 1) * self.lanes - lane - 1) // self.samples  # the inverse of _given
        shard, place = np.empty_like(position), np.empty_like(position)
        for one in np.unique(epoch).tolist():
            here = epoch == one
            shard[here], place[here] = self._of_epoch(one, lane[here], position[here] - self._given(one, lane[here]))
        return Picks(epoch, shard, place)

    def reads(self, lanes: range) -> list[int]:
        """The streams that lanes read, in the numbers that `window_at` takes: their own."""
        return list(lanes)

    def window_at(self, lane: int, position: int) -> Need:
        """The window that a lane is in at `position` of its stream."""
        epoch = ((position + 1) * self.lanes - lane - 1) // self.samples
        given = (epoch * self.samples + lane) // self.lanes
        shards, ends, starts = self._epoch(epoch)  # type: ignore[operator]
        begin, length, offset = starts.item(lane), starts.item(lane + 1) - starts.item(lane), position - given
        windows = -(-length // self.window)
        window = ((offset + 1) * windows - 1) // length
        first, end = window * length // windows, (window + 1) * length // windows
        touched = np.searchsorted(ends, [begin + first, begin + end - 1], side="right")
        return Need(given + first, given + end, shards[touched[0] : touched[1] + 1])

    def _given(self, epoch: int, lane: Numbers) -> Numbers:
        """Pictures that a lane gives before an epoch begins: floor((e N + l) / L).

        Summed over the lanes that is e N (Hermite's identity), so an epoch is given out to the last picture and no
        lane is ever more than one picture ahead of another.
        """
        return (epoch * self.samples + lane) // self.lanes

    def _of_epoch(self, epoch: int, lane: Numbers, offset: Numbers) -> tuple[Numbers, Numbers]:
        """Shard and place of the pictures at `offset` of the lanes' shuffled streams of an epoch."""
        shards, ends, starts = self._epoch(epoch)  # type: ignore[operator]
        length = starts[lane + 1] - starts[lane]
        windows = -(-length // self.window)
        window = ((offset + 1) * windows - 1) // length  # windows of equal length, to within one picture
        first, end = window * length // windows, (window + 1) * length // windows
        key = mixed(mixed(number("window", self.seed, epoch), lane), window)
        line = starts[lane] + first + shuffled(offset - first, end - first, key)  # among the epoch's, laid end to end
        which = np.searchsorted(ends, line, side="right")
        return shards[which], line - np.where(which > 0, ends[which - 1], 0)

    def _lay_out(self, epoch: int) -> tuple[Numbers, Numbers, Numbers]:
        """The shards of an epoch in order, where each ends, and where each lane's stream begins."""
        shards = permutation(len(self.counts), "shards", self.seed, epoch)
        ends = np.cumsum(np.asarray(self.counts, np.int64)[shards])
        lanes = np.arange(self.lanes, dtype=np.int64)
        lengths = self._given(epoch + 1, lanes) - self._given(epoch, lanes)
        return shards, ends, np.concatenate([[0], np.cumsum(lengths)])


@dataclass(frozen=True)
class Mixture:
    """Several orders at once: lane l is lane `within[l]` of `parts[of[l]]`. Shards are numbered through the parts."""

    parts: tuple[Order, ...]
    of: Numbers
    within: Numbers

    @property
    def lanes(self) -> int:
        """Of all parts together."""
        return len(self.of)

    @property
    def samples(self) -> int:
        """Pictures in all parts: as many make an epoch, though a part may come round more often than another."""
        return sum(part.samples for part in self.parts)

    @cached_property
    def _first(self) -> list[int]:
        """Number of the first shard of each part."""
        return [0, *accumulate(len(part.counts) for part in self.parts)]

    def at(self, lane: Numbers, position: Numbers) -> Picks:
        """As of `Order`; the epoch is that of the part."""
        of, within = self.of[lane], self.within[lane]
        found = Picks(*(np.empty_like(position) for _ in Picks._fields))
        for part in np.unique(of).tolist():
            here = of == part
            picks = self.parts[part].at(within[here], position[here])
            picks = picks._replace(shard=picks.shard + self._first[part])
            for column, values in zip(found, picks, strict=True):
                column[here] = values
        return found

    def reads(self, lanes: range) -> list[int]:
        """As of `Order`."""
        return list(lanes)

    def window_at(self, lane: int, position: int) -> Need:
        """As of `Order`."""
        part = self.of.item(lane)
        need = self.parts[part].window_at(self.within.item(lane), position)
        return need._replace(shards=need.shards + self._first[part])


@dataclass(frozen=True)
class Repeated:
    """An order whose every picture comes `times` times, each time as in a round of its own (Hoffer et al. 2020).

    The draws of all lanes, position by position and in a position lane by lane, are the pictures of `once` in the same
    manner, each `times` times in a row: that is how DeiT's sampler deals them to its processes (Touvron et al. 2021,
    section 6). So copies are in the same step, but for one picture at the end of a step, and in lanes side by side.
    An epoch is still as many draws as there are pictures: the lanes pass through `times` of them until every picture
    has come `times` times.
    """

    once: Order | Mixture
    times: int

    @property
    def lanes(self) -> int:
        """As many as without repetition."""
        return self.once.lanes

    @property
    def samples(self) -> int:
        """As many as without repetition."""
        return self.once.samples

    def at(self, lane: Numbers, position: Numbers) -> Picks:
        """As of `Order`; `epoch` counts how often the picture came before, in this pass and in others."""
        draw, copy = np.divmod(position * self.lanes + lane, self.times)
        picks = self.once.at(draw % self.lanes, draw // self.lanes)
        return picks._replace(epoch=picks.epoch * self.times + copy)

    def reads(self, lanes: range) -> list[int]:
        """The lanes of `once` that lanes read: about as many, at the same ones again after `times` positions."""
        drawn = np.arange(self.times)[:, None] * self.lanes + np.arange(lanes.start, lanes.stop)
        return np.unique(drawn // self.times % self.lanes).tolist()

    def window_at(self, lane: int, position: int) -> Need:
        """The window that a lane of `once` is in when the lanes are at `position`, between their positions."""
        draw = position * self.lanes - self.times + 1 - lane * self.times  # of the first picture not yet passed
        need = self.once.window_at(lane, max(0, -(-draw // (self.lanes * self.times))))
        start, end = ((at * self.lanes + lane) * self.times // self.lanes for at in (need.start, need.end))
        return Need(start, end, need.shards)


AnyOrder = Order | Mixture | Repeated


def stretch(order: AnyOrder, lanes: range, start: int, count: int) -> Picks:
    """For every one of `lanes`, its pictures from position `start` of its endless stream, `count` of them."""
    lane = np.repeat(np.arange(lanes.start, lanes.stop, dtype=np.int64), count)
    return order.at(lane, np.tile(np.arange(start, start + count, dtype=np.int64), len(lanes)))


def part_of_step(order: AnyOrder, step: int, batch: int, first: int, count: int) -> Picks:
    """Pictures `first` to `first + count` of the `batch` pictures of a step, which lie lane by lane."""
    each = batch // order.lanes
    lanes = range(first // each, -(-(first + count) // each))
    skipped = first - lanes.start * each
    return Picks(*(column[skipped : skipped + count] for column in stretch(order, lanes, step * each, each)))


def order(
    parts: Sequence[tuple[int, ...]], weights: Sequence[float], *, lanes: int, window: int, seed: int, repeats: int = 1
) -> AnyOrder:
    """The order of several sets, the shards of each of which hold so many pictures.

    Without weights they are one corpus, each picture of which comes once an epoch. With weights the share of each set
    in every step is its weight, rounded to lanes; ValueError where a set would get none. With repeats each picture
    comes so many times in a row.
    """
    once = _once(parts, weights, lanes, window, seed)
    return once if repeats == 1 else Repeated(once, repeats)


def _once(
    parts: Sequence[tuple[int, ...]], weights: Sequence[float], lanes: int, window: int, seed: int
) -> Order | Mixture:
    if not weights:
        return Order(tuple(count for part in parts for count in part), lanes, window, seed)
    if len(weights) != len(parts) or min(weights) <= 0:
        raise ValueError(f"data.weights needs a number above 0 for each of the {len(parts)} sets, not {list(weights)}")
    shares = _allotted(weights, lanes)
    orders = [
        Order(part, n, window, number("part", seed, i)) for i, (part, n) in enumerate(zip(parts, shares, strict=True))
    ]
    # The lanes of a set lie evenly among the others', so that the processes have equal shares, too.
    ranked = sorted(((k + 0.5) / n, i, k) for i, n in enumerate(shares) for k in range(n))
    of, within = (np.array([each[column] for each in ranked], np.int64) for column in (1, 2))
    return Mixture(tuple(orders), of, within)


def _allotted(weights: Sequence[float], lanes: int) -> list[int]:
    """Lanes of each set: its share rounded down or up, the largest remainders up (Hamilton's method)."""
    quotas = [weight * lanes / sum(weights) for weight in weights]
    shares = [int(quota) for quota in quotas]
    for i in sorted(range(len(quotas)), key=lambda i: (shares[i] - quotas[i], i))[: lanes - sum(shares)]:
        shares[i] += 1
    if 0 in shares:
        least = sum(weights) / min(weights)
        raise ValueError(
            f"{lanes} lanes are too few for data.weights {list(weights)}: set {shares.index(0) + 1} would get none; "
            f"data.lanes of {int(-(-least // 1))} or more would do"
        )
    return shares


def needed(order: AnyOrder, lanes: range, position: int) -> Iterator[Need]:
    """What the lanes read from `position` of their streams on, in the order of the first need, without an end."""
    ahead = [(position, lane) for lane in order.reads(lanes)]
    heapify(ahead)
    while True:
        start, lane = ahead[0]
        need = order.window_at(lane, start)
        yield need._replace(start=start)
        heapreplace(ahead, (need.end, lane))


def ends_epoch(step: int, batch: int, samples: int) -> bool:
    """Whether the step after which `step` steps are done completes a pass over the corpus."""
    return step * batch // samples > (step - 1) * batch // samples
