"""Batches: the pictures of a step, decoded and cropped by threads ahead of need.

Threads and not processes: reading, decoding and scaling release the interpreter's lock, and nothing is copied between
processes. How many there are decides nothing but the speed.

Legend: n pictures, s side in pixels, m labels a picture at the most.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Config
from pipeline.data import mix
from pipeline.data.ahead import Ahead
from pipeline.data.augment import change, random_changes
from pipeline.data.cache import HOME, Cache, Verified
from pipeline.data.corpus import Corpus
from pipeline.data.decode import cut_from
from pipeline.data.image import Crops, central_crops, placed_crops, random_crops
from pipeline.data.plan import AnyOrder, Picks, needed, order, part_of_step
from pipeline.data.read import Reader, Rows, at
from pipeline.data.refused import Refused
from pipeline.world import World
from shards import retry

AHEAD = 4  # batches in the making while one is used, or as many as there are threads

Made = TypeVar("Made")


@dataclass(frozen=True)
class Batch:
    """n pictures: `images` (n, s, s, 3) uint8, `labels` (n, m) with -1 where there are fewer, `samples` (n)."""

    images: Tensor
    labels: Tensor
    samples: Tensor
    """Number of each picture in the corpus."""
    weights: Tensor
    """(n) 1, or 0 for what only fills the batch: at the end of an evaluation, or for a picture that cannot be used."""
    epochs: Tensor
    """(n) In which of its rounds each picture is; 0 in an evaluation."""
    draws: mix.Draws | None = None
    """What is still to be done to the pictures, on the device."""
    keys: tuple[str, ...] = ()
    """Names of the pictures; of evaluations only, where what only fills the batch has an empty one."""


class Encoded(NamedTuple):
    """n pictures as they are stored; `labels` (n, m), `samples` (n)."""

    data: list[bytes]
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]


class Measures(NamedTuple):
    """Totals since a feed was made."""

    waited: float = 0.0
    """Seconds in which whoever takes the batches had to wait for one."""
    read: int = 0
    """Bytes of encoded pictures."""
    hits: int = 0
    """Shards that were in the cache when they were asked for."""
    misses: int = 0
    """Shards that had to be fetched."""
    fetched: int = 0
    """Bytes that were fetched into the cache."""
    retries: int = 0
    """Requests to stores that were made once more, of the whole process."""


class Feed:
    """Makes batches of a corpus for one process of a run."""

    def __init__(
        self,
        corpus: Corpus,
        config: Config,
        world: World | None = None,
        *,
        refused: Refused | None = None,
        pinned: bool = False,
    ) -> None:
        self.corpus, self.config, self.world, self.pinned = corpus, config, world or World(), pinned
        data = config.data
        self.refused = refused or Refused(None, data.refused_limit)
        retry.wait_for(data.patience_seconds)
        folder = Path(data.cache or HOME)
        remote = any(not one.tars.local for one in corpus.sets)
        limit, wait = int(data.cache_gigabytes * 1e9), data.wait_seconds
        self.cache = Cache(folder, limit, wait_seconds=wait) if remote and limit else None
        lanes = len(self.world.share(data.lanes))
        windows = lanes * (2 + data.window * len(corpus.counts) // max(1, corpus.samples))
        self.reader = Reader(corpus, self.cache, Verified(folder / "verified"), kept=2 * windows + 16)
        self.pool = ThreadPoolExecutor(data.threads, thread_name_prefix="decode")
        self._waited, self._read, self._counting = 0.0, 0, Lock()
        self._ahead_of: Ahead | None = None

    def training(self, start: int, steps: int) -> Iterator[Batch]:
        """The micro-batches of this process from step `start` to `steps`, pass by pass."""
        return self._of_steps(self._train, start, steps)

    def encoded(self, start: int, steps: int) -> Iterator[Encoded]:
        """The same pictures as `training` gives, not decoded."""
        return self._of_steps(self._encode, start, steps)

    def evaluation(self, batch: int) -> Iterator[Batch]:
        """This process's share of the corpus, every picture once, in order, with keys.

        All processes get equally many batches of equal shape; what only fills them weighs nothing. ValueError names a
        picture that cannot be decoded: an evaluation that leaves one out is another evaluation.
        """
        return self.looked_at(range(self.corpus.samples), batch, refuse=False)

    def looked_at(self, samples: Sequence[int], batch: int, *, refuse: bool) -> Iterator[Batch]:
        """This process's share of pictures by their numbers, each once, in order, cut as in every evaluation.

        As of `evaluation`; with `refuse` a picture that cannot be decoded is named like one of training, and weighs
        nothing.
        """
        mine = self.world.share(len(samples))
        most = -(-len(samples) // self.world.size)
        batch = min(batch, most)
        starts = range(mine.start, mine.start + most, batch)
        chosen = (np.array(samples[first : min(first + batch, mine.stop)], np.int64) for first in starts)
        return self._in_order(partial(self._evaluate, numbers, batch, refuse=refuse) for numbers in chosen)

    def measures(self) -> Measures:
        """What has been measured so far."""
        counts = (self.cache.hits, self.cache.misses, self.cache.fetched) if self.cache else (0, 0, 0)
        return Measures(self._waited, self._read, *counts, retry.again())

    def close(self) -> None:
        """Stop the threads; what they were making is lost."""
        if self._ahead_of:
            self._ahead_of.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _of_steps(self, make: Callable[[Picks], Made], start: int, steps: int) -> Iterator[Made]:
        config, data = self.config, self.config.data
        order, lanes = order_of(self.corpus, config), self.world.share(data.lanes)
        each, micro, share = config.batch // data.lanes, config.micro(self.world.size), config.batch // self.world.size
        begin = lanes.start * each
        ahead = self._prepare_ahead(order, lanes, start * each)

        def one(step: int, first: int) -> Made:
            ahead.reached(step * each)
            return make(part_of_step(order, step, config.batch, begin + first, micro))

        places = ((step, first) for step in range(start, steps) for first in range(0, share, micro))
        return self._in_order(partial(one, *place) for place in places)

    def _prepare_ahead(self, order: AnyOrder, lanes: range, position: int) -> Ahead:
        """Begin to make the shards ready that the lanes will need."""
        data, cache, world = self.config.data, self.cache, self.world
        room = cache.limit / world.local if cache else float("inf")
        if cache:
            windows = (order.window_at(lane, position).shards for lane in order.reads(lanes))
            least = sum(self._size(shard) for shard in np.unique(np.concatenate(list(windows))).tolist())
            if least > room:
                raise ValueError(
                    f"the windows of this process's {len(lanes)} lanes lie in {least / 1e9:.1f} GB of shards, its "
                    f"share of the cache is {room / 1e9:.1f} GB: data.cache_gigabytes of "
                    f"{least * world.local / 1e9 + 0.1:.1f} would do, or a smaller data.window, or 0 gigabytes to "
                    f"read from the store directly"
                )
        if self._ahead_of:
            self._ahead_of.close()
        self._ahead_of = Ahead(
            needed(order, lanes, position),
            size=self._size,
            prepare=self._prepare,
            used=self._used,
            room=room,
            threads=data.fetches,
            position=position,
            reach=min(data.window, self.corpus.samples // data.lanes) * self.config.augment.repeats,
        )
        return self._ahead_of

    def _size(self, shard: int) -> int:
        return 0 if self.corpus.tars(shard).local else self.corpus.about(shard).bytes

    def _prepare(self, shard: int) -> None:
        if not self.reader.direct(shard):
            self.reader.prepare(shard)

    def _used(self, shard: int) -> None:
        if self.cache and not self.corpus.tars(shard).local:
            about = self.corpus.about(shard)
            self.cache.used(self.cache.target(about.name, about.sha256))

    def _in_order(self, makers: Iterable[Callable[[], Made]]) -> Iterator[Made]:
        """What the makers make, in order, each made by one thread, some in the making while one is used."""
        making: deque[Future[Made]] = deque()
        for make in makers:
            making.append(self.pool.submit(make))
            if len(making) > max(AHEAD, self.config.data.threads):
                yield self._finished(making.popleft())
        while making:
            yield self._finished(making.popleft())

    def _finished(self, made: "Future[Made]") -> Made:
        began, limit = time.perf_counter(), self.config.data.wait_seconds
        try:
            return made.result(limit)
        except TimeoutError as error:
            if made.done():
                raise
            at_it = ", ".join(sorted(self.reader.opening)) or "nothing that is being fetched"
            raise TimeoutError(f"no batch for {limit:g} s (data.wait_seconds); it waits for {at_it}") from error
        finally:
            self._waited += time.perf_counter() - began

    def _train(self, picks: Picks) -> Batch:
        data, augment, seed = self.config.data, self.config.augment, self.config.seed
        rows, samples = self.reader.rows(picks), self._samples(picks)
        given: dict[str, Any] = {"seed": seed, "flip": data.flip}
        sizes = (rows.width, rows.height, samples, picks.epoch)
        if data.crop_side:
            crops = placed_crops(*sizes, share=data.crop_side, **given)
        else:
            crops = random_crops(*sizes, area=data.crop_area, **given)
        images, weights = self._cut(picks, rows, crops, refuse=True)
        if augment.layers:
            changes = random_changes(samples, picks.epoch, seed=seed, augment=augment)
            for i, image in enumerate(images.numpy()):
                change(image, changes, i)
        draws = mix.draw(augment, samples, picks.epoch, seed=seed, side=self.config.model.image_size)
        labels, epochs = torch.from_numpy(rows.labels), torch.from_numpy(picks.epoch)
        return Batch(images, labels, torch.from_numpy(samples), weights, epochs, draws)

    def _encode(self, picks: Picks) -> Encoded:
        rows = self.reader.rows(picks)
        self._count(rows)
        return Encoded(self.reader.bytes(picks, rows), rows.labels, self._samples(picks))

    def _evaluate(self, numbers: NDArray[np.int64], batch: int, *, refuse: bool) -> Batch:
        side = self.config.model.image_size
        samples, labels = np.full(batch, -1, np.int64), np.full((batch, 1), -1, np.int64)
        images, weights = torch.zeros((batch, side, side, 3), dtype=torch.uint8), torch.zeros(batch)
        count, keys, share = len(numbers), [""] * batch, self.config.data.eval_crop
        if count:
            samples[:count] = numbers
            picks = at(self.corpus, numbers)
            rows = self.reader.rows(picks)
            crops = central_crops(rows.width, rows.height, share=share) if share else whole(rows.width, rows.height)
            images[:count], weights[:count] = self._cut(picks, rows, crops, refuse=refuse)
            labels = np.pad(rows.labels, ((0, batch - count), (0, 0)), constant_values=-1)
            keys[:count] = self.corpus.keys(numbers)
        epochs = torch.zeros(batch, dtype=torch.int64)
        return Batch(images, torch.from_numpy(labels), torch.from_numpy(samples), weights, epochs, keys=tuple(keys))

    def _cut(self, picks: Picks, rows: Rows, crops: Crops, *, refuse: bool) -> tuple[Tensor, Tensor]:
        """The crops, and the weight of each: 0, and no pixels, where a picture cannot be decoded and may be refused."""
        side, data = self.config.model.image_size, self.config.data
        images = torch.empty((len(picks.shard), side, side, 3), dtype=torch.uint8, pin_memory=self.pinned)
        weights, pixels = torch.ones(len(images)), images.numpy()
        self._count(rows)
        for i, encoded in self.reader.each(picks, rows):
            try:
                cut_from(encoded, crops, i, pixels[i], antialiased=data.scaling == "antialiased")
            except ValueError as error:
                self._refuse(picks.shard.item(i), picks.place.item(i), error, refuse)
                pixels[i], weights[i] = 0, 0.0
        return images, weights

    def _refuse(self, shard: int, place: int, error: ValueError, may: bool) -> None:
        """Name a picture that cannot be decoded; ValueError where its shard is at fault, or none may be left out."""
        if why := self.reader.changed(shard):
            raise ValueError(why) from error
        sample, name = int(self.corpus.first[shard]) + place, self.reader.name(shard)
        key = self.corpus.keys(np.array([sample]))[0]
        if not may:
            raise ValueError(f"{name}: picture {key}: {error}") from error
        self.refused.add(sample, key, name, str(error))

    def _count(self, rows: Rows) -> None:
        with self._counting:
            self._read += int(rows.size.sum())

    def _samples(self, picks: Picks) -> NDArray[np.int64]:
        return self.corpus.first[picks.shard] + picks.place


def whole(width: NDArray[np.int64], height: NDArray[np.int64]) -> Crops:
    """All of each picture, not mirrored."""
    nothing = np.zeros_like(width)
    return Crops(nothing, nothing, width, height, np.zeros(len(width), np.bool_))


def order_of(corpus: Corpus, config: Config) -> AnyOrder:
    """The order in which a run goes through a corpus; ValueError where its lanes or weights do not fit."""
    data, repeats = config.data, config.augment.repeats
    return order(corpus.parts, data.weights, lanes=data.lanes, window=data.window, seed=config.seed, repeats=repeats)
