"""Batches: the pictures of a step, decoded and cropped by threads ahead of need.

Threads and not processes: decoding and scaling release the interpreter's lock, and nothing is copied between
processes. How many there are decides nothing but the speed.

Legend: n pictures, s side in pixels, m labels a picture at the most.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Config
from pipeline.data.cache import Cache
from pipeline.data.decode import cut_from
from pipeline.data.image import Crops, central_crops, random_crops
from pipeline.data.plan import Order, Picks
from pipeline.data.read import Reader
from pipeline.world import World
from shards.manifest import ShardSet

AHEAD = 4  # batches in the making while one is used, or as many as there are threads


@dataclass(frozen=True)
class Batch:
    """n pictures: `images` (n, s, s, 3) uint8, `labels` (n, m) with -1 where there are fewer, `samples` (n)."""

    images: Tensor
    labels: Tensor
    samples: Tensor
    """Number of each picture in its set."""


@dataclass
class Feed:
    """Makes batches of a shard set."""

    reader: Reader
    size: int
    threads: int
    waited: float = 0.0
    """Seconds in which whoever takes the batches had to wait for one."""
    pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    def training(self, config: Config, order: Order, world: World, start: int, steps: int) -> Iterator[Batch]:
        """The micro-batches of one process from step `start` on, pass by pass."""
        lanes, micro, data = world.share(config.data.lanes), config.micro(world.size), config.data

        def plan(step: int, first: int) -> tuple[Picks, Crops]:
            whole = order.step(step, config.batch, lanes)
            picks = Picks(*(column[first : first + micro] for column in whole))
            sizes = self._sizes(picks)
            samples = self._samples(picks)
            return picks, random_crops(
                *sizes, samples, picks.epoch, seed=config.seed, area=data.crop_area, flip=data.flip
            )

        firsts = range(0, config.batch // world.size, micro)
        return self._ahead(partial(plan, step, first) for step in range(start, steps) for first in firsts)

    def evaluation(self, world: World, batch: int, *, crop: float) -> Iterator[Batch]:
        """This process's share of the set, every picture once, in order; the last batch may be smaller."""
        mine = world.share(self.reader.shards.manifest.samples)
        first = self.reader.shards.first

        def plan(start: int) -> tuple[Picks, Crops]:
            sample = np.arange(start, min(start + batch, mine.stop))
            shard = np.searchsorted(first, sample, side="right") - 1
            picks = Picks(np.zeros_like(sample), shard, sample - first[shard])
            return picks, central_crops(*self._sizes(picks), share=crop)

        return self._ahead(partial(plan, start) for start in range(mine.start, mine.stop, batch))

    def close(self) -> None:
        """Stop the threads; what they were making is lost."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _ahead(self, plans: Iterable[Callable[[], tuple[Picks, Crops]]]) -> Iterator[Batch]:
        """Batches in order, each made by one thread, some in the making while one is used."""
        making: deque[Future[Batch]] = deque()
        for plan in plans:
            making.append(self.pool.submit(self._make, plan))
            if len(making) > max(AHEAD, self.threads):
                yield self._finished(making.popleft())
        while making:
            yield self._finished(making.popleft())

    def _finished(self, batch: "Future[Batch]") -> Batch:
        began = time.perf_counter()
        found = batch.result()
        self.waited += time.perf_counter() - began
        return found

    def _make(self, plan: Callable[[], tuple[Picks, Crops]]) -> Batch:
        picks, crops = plan()
        images = np.empty((len(picks.shard), self.size, self.size, 3), np.uint8)
        for i in range(len(images)):
            shard, place = picks.shard.item(i), picks.place.item(i)
            try:
                cut_from(self.reader.bytes(shard, place), crops, i, images[i])
            except ValueError as error:
                key = self.reader.key(shard, place)
                raise ValueError(f"{self.reader.shards.folder.absolute}: picture {key}: {error}") from error
        return Batch(torch.from_numpy(images), self._labels(picks), torch.from_numpy(self._samples(picks)))

    def _labels(self, picks: Picks) -> Tensor:
        places = zip(picks.shard.tolist(), picks.place.tolist(), strict=True)
        labels = [self.reader.at_hand(shard).labels[place] for shard, place in places]
        most = max(map(len, labels))
        return torch.tensor([one + [-1] * (most - len(one)) for one in labels])

    def _samples(self, picks: Picks) -> NDArray[np.int64]:
        return self.reader.shards.first[picks.shard] + picks.place

    def _sizes(self, picks: Picks) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Width and height of the pictures."""
        width, height = np.empty_like(picks.place), np.empty_like(picks.place)
        for shard in np.unique(picks.shard).tolist():
            here = picks.shard == shard
            found = self.reader.at_hand(shard)
            width[here], height[here] = found.width[picks.place[here]], found.height[picks.place[here]]
        return width, height


def feed(shards: ShardSet, config: Config) -> Feed:
    """A feed of a shard set with the run's size, threads and cache."""
    data = config.data
    cache = None
    if not shards.tars.local:
        folder = Path(data.cache or Path.home() / ".cache" / "vitscale" / "shards")
        cache = Cache(folder, int(data.cache_gigabytes * 1e9))
    return Feed(Reader(shards, cache), config.model.image_size, data.threads)
