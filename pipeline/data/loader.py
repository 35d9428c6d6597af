"""Batches: the pictures of a step, decoded and cropped by threads ahead of need.

Threads and not processes: decoding and scaling release the interpreter's lock, and nothing is copied between
processes. How many there are decides nothing but the speed.

Legend: n pictures, s side in pixels, m labels a picture at the most.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.cache import Cache
from pipeline.data.image import Crops, central_crops, cut, decode, random_crops
from pipeline.data.plan import Order, Picks
from pipeline.data.read import Reader
from pipeline.world import World
from shards.manifest import ShardSet

AHEAD = 4  # batches in the making while one is used
CHUNK = 32  # pictures that a thread takes on at a time


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
        lanes, micro = world.share(config.data.lanes), config.micro(world.size)

        def passes() -> Iterator[tuple[Picks, Crops]]:
            for step in range(start, steps):
                whole = order.step(step, config.batch, lanes)
                for first in range(0, len(whole.shard), micro):
                    picks = Picks(*(column[first : first + micro] for column in whole))
                    width, height, sample = self._sizes(picks)
                    crops = random_crops(
                        width, height, sample, picks.epoch,
                        seed=config.seed, area=config.data.crop_area, flip=config.data.flip,
                    )  # fmt: skip
                    yield picks, crops

        return self._ahead(passes())

    def evaluation(self, world: World, batch: int, *, crop: float) -> Iterator[Batch]:
        """This process's share of the set, every picture once, in order; the last batch may be smaller."""
        mine = world.share(self.reader.shards.manifest.samples)
        first = self.reader.shards.first

        def passes() -> Iterator[tuple[Picks, Crops]]:
            for start in range(mine.start, mine.stop, batch):
                sample = np.arange(start, min(start + batch, mine.stop))
                shard = np.searchsorted(first, sample, side="right") - 1
                picks = Picks(np.zeros_like(sample), shard, sample - first[shard])
                width, height, _ = self._sizes(picks)
                yield picks, central_crops(width, height, share=crop)

        return self._ahead(passes())

    def close(self) -> None:
        """Stop the threads; what they were making is lost."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _sizes(self, picks: Picks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Width, height and number of the pictures."""
        width, height = np.empty_like(picks.place), np.empty_like(picks.place)
        for shard in np.unique(picks.shard).tolist():
            here = picks.shard == shard
            found = self.reader.at_hand(shard)
            width[here], height[here] = found.width[picks.place[here]], found.height[picks.place[here]]
        return width, height, self.reader.shards.first[picks.shard] + picks.place

    def _ahead(self, passes: Iterator[tuple[Picks, Crops]]) -> Iterator[Batch]:
        """Batches in order, `AHEAD` of them in the making."""
        making: deque[tuple[Batch, list[Future[None]]]] = deque()
        for picks, crops in passes:
            making.append(self._begin(picks, crops))
            if len(making) > AHEAD:
                yield self._finished(*making.popleft())
        while making:
            yield self._finished(*making.popleft())

    def _begin(self, picks: Picks, crops: Crops) -> tuple[Batch, list["Future[None]"]]:
        count = len(picks.shard)
        images = np.empty((count, self.size, self.size, 3), np.uint8)
        samples = self.reader.shards.first[picks.shard] + picks.place
        chunks = [range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
        futures = [self.pool.submit(self._fill, picks, crops, images, chunk) for chunk in chunks]
        labels = self._labels(picks)
        return Batch(torch.from_numpy(images), labels, torch.from_numpy(samples)), futures

    def _labels(self, picks: Picks) -> Tensor:
        places = zip(picks.shard.tolist(), picks.place.tolist(), strict=True)
        labels = [self.reader.at_hand(shard).labels[place] for shard, place in places]
        most = max(map(len, labels))
        return torch.tensor([one + [-1] * (most - len(one)) for one in labels])

    def _fill(self, picks: Picks, crops: Crops, images: np.ndarray, chunk: range) -> None:
        for i in chunk:
            shard, place = int(picks.shard[i]), int(picks.place[i])
            try:
                cut(decode(self.reader.bytes(shard, place)), crops, i, images[i])
            except ValueError as error:
                key = self.reader.key(shard, place)
                raise ValueError(f"{self.reader.shards.folder.absolute}: picture {key}: {error}") from error

    def _finished(self, batch: Batch, futures: list["Future[None]"]) -> Batch:
        began = time.perf_counter()
        for future in futures:
            future.result()
        self.waited += time.perf_counter() - began
        return batch


def feed(shards: ShardSet, config: Config) -> Feed:
    """A feed of a shard set with the run's size, threads and cache."""
    data = config.data
    cache = None
    if not shards.folder.local:
        folder = Path(data.cache or Path.home() / ".cache" / "vitscale" / "shards")
        cache = Cache(folder, int(data.cache_gigabytes * 1e9))
    return Feed(Reader(shards, cache), config.model.image_size, data.threads)
