"""Which pictures are in which step: arithmetic, with no network, rank, clock or state.

Each epoch puts the shards in an order of its own and cuts their pictures, laid end to end, into as many streams as
there are lanes. A lane shuffles its stream window by window, and goes on with its stream of the next epoch. A step
takes equally many pictures from each lane. So the pictures of a step depend neither on the number of processes nor on
that of threads, and a position is one integer: the step.

Legend: N pictures of the corpus, L lanes, e epoch, l lane.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
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

    def step(self, step: int, batch: int, lanes: range) -> Picks:
        """The pictures that `lanes` give to a step of `batch` pictures, lane by lane."""
        each = batch // self.lanes
        return self.stretch(lanes, step * each, each)

    def stretch(self, lanes: range, start: int, count: int) -> Picks:
        """For every one of `lanes`, its pictures from position `start` of its endless stream, `count` of them."""
        lane = np.repeat(np.asarray(lanes, np.int64), count)
        position = np.tile(np.arange(start, start + count, dtype=np.int64), len(lanes))
        epoch = ((position + 1) * self.lanes - lane - 1) // self.samples  # the inverse of _given
        shard, place = np.empty_like(position), np.empty_like(position)
        for one in np.unique(epoch).tolist():
            here = epoch == one
            shard[here], place[here] = self._of_epoch(one, lane[here], position[here] - self._given(one, lane[here]))
        return Picks(epoch, shard, place)

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


def ends_epoch(step: int, batch: int, samples: int) -> bool:
    """Whether the step after which `step` steps are done completes a pass over the corpus."""
    return step * batch // samples > (step - 1) * batch // samples
