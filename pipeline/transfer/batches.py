"""Pictures on their way into a model: which ones a step sees, what is cut out of them, and the cutting ahead of need.

What is decided is a function of (recipe, seed, epoch, picture), and so are the pixels, whatever the number of threads.

Legend: n pictures, s side in pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.augment import Changes, change, random_changes
from pipeline.data.image import Crops, Pixels, cut, placed_crops, random_crops
from pipeline.seed import keys, permutation, uniform
from pipeline.transfer.protocols import Recipe

Numbers = NDArray[np.int64]

AHEAD = 2  # batches in the making while one is computed with
JUDGED_BATCH = 256


class Source(Protocol):
    """Pictures, as `pipeline.transfer.pictures` has them."""

    @property
    def sizes(self) -> tuple[Numbers, Numbers]:
        """Width and height of each."""
        ...

    def image(self, i: int) -> Pixels:
        """The whole picture, from any thread."""
        ...


@dataclass(frozen=True, eq=False)
class Some:
    """Some of the pictures, in the order of `which`."""

    pictures: Source
    which: Numbers

    @property
    def sizes(self) -> tuple[Numbers, Numbers]:
        """Width and height of each."""
        width, height = self.pictures.sizes
        return width[self.which], height[self.which]

    def image(self, i: int) -> Pixels:
        """The whole picture, from any thread."""
        return self.pictures.image(self.which.item(i))


class Cut(NamedTuple):
    """What a batch is made of."""

    chosen: Numbers
    """(n) which pictures."""
    epoch: Numbers
    """(n) of each."""
    crops: Crops
    changes: Changes | None
    """What RandAugment does to them."""


def turn(count: int, step: int, batch: int, seed: int, repeats: int = 1) -> tuple[Numbers, Numbers]:
    """The pictures of a step and the epoch of each: every picture once an epoch, short steps run into the next.

    With repeats each comes so many times in a row, each time as in an epoch of its own, and in an even batch of twice
    as many or more no two of a pair, which are mixed with each other, are the same.
    """
    place = np.arange(batch)
    if repeats > 1 and batch % 2 == 0:
        place = place.reshape(2, -1).T.reshape(-1)
    position, copy = np.divmod(step * batch + place, repeats)
    epoch = position // count
    chosen = np.empty_like(position)
    for one in np.unique(epoch).tolist():
        here = epoch == one
        chosen[here] = permutation(count, "finetune", seed, one)[position[here] % count]
    return chosen, epoch * repeats + copy


def training_cuts(pictures: Source, recipe: Recipe, seed: int) -> Iterator[Cut]:
    """What each step sees, step by step."""
    width, height = pictures.sizes
    for step in range(recipe.steps):
        chosen, epoch = turn(len(width), step, recipe.batch, seed, recipe.repeats)
        crops = training_crops(recipe, width[chosen], height[chosen], chosen, epoch, seed)
        some = random_changes(chosen, epoch, seed=seed, augment=recipe.augment) if recipe.layers else None
        yield Cut(chosen, epoch, crops, some)


def judged_cuts(pictures: Source, recipe: Recipe) -> Iterator[Cut]:
    """All pictures, each once, in their order."""
    width, height = pictures.sizes
    for first in range(0, len(width), JUDGED_BATCH):
        chosen = np.arange(first, min(first + JUDGED_BATCH, len(width)))
        crops = judged_crops(recipe, width[chosen], height[chosen])
        yield Cut(chosen, np.zeros_like(chosen), crops, None)


def training_crops(
    recipe: Recipe, width: Numbers, height: Numbers, sample: Numbers, epoch: Numbers, seed: int
) -> Crops:
    """The box of each picture that is trained on: a function of (seed, epoch, sample)."""
    match recipe.training:
        case "inception":
            return random_crops(width, height, sample, epoch, seed=seed, area=recipe.area, flip=recipe.flip)
        case "resmall":
            return _placed_squares(width, height, sample, epoch, seed=seed, share=recipe.share, flip=recipe.flip)
        case "crop" | "resize":
            share = recipe.share if recipe.crop else 1.0
            return placed_crops(width, height, sample, epoch, seed=seed, share=share, flip=recipe.flip)


def judged_crops(recipe: Recipe, width: Numbers, height: Numbers) -> Crops:
    """The box of each picture that is judged: the same each time, never mirrored."""
    if recipe.evaluation == "central":
        width_of_box = height_of_box = _share(np.minimum(width, height), recipe.judged)
    else:
        width_of_box, height_of_box = _share(width, recipe.judged), _share(height, recipe.judged)
    left, top = (width - width_of_box) // 2, (height - height_of_box) // 2
    return Crops(left, top, width_of_box, height_of_box, np.zeros(len(width), np.bool_))


def _placed_squares(
    width: Numbers, height: Numbers, sample: Numbers, epoch: Numbers, *, seed: int, share: float, flip: bool
) -> Crops:
    """A square at a uniform place, with `share` of the shorter side."""
    draws = uniform(keys("place", seed, epoch, sample)[:, None], np.arange(3))  # n, 3
    side = _share(np.minimum(width, height), share)
    left = (draws[:, 1] * (width - side + 1)).astype(np.int64)
    top = (draws[:, 2] * (height - side + 1)).astype(np.int64)
    return Crops(left, top, side, side, (draws[:, 0] < 0.5) & flip)


def _share(side: Numbers, share: float) -> Numbers:
    return np.maximum(1, np.rint(side * share)).astype(np.int64)


def made_ahead(
    pictures: Source, cuts: Iterable[Cut], size: int, threads: int, *, pinned: bool = False
) -> Iterator[tuple[Cut, Tensor]]:
    """Each cut with its pictures, uint8 (n, s, s, 3), decoded and cut by so many threads while others are used.

    An error of a thread is raised where its batch would be.
    """
    waiting: deque[tuple[Cut, Tensor, list[Future[None]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="cut") as pool:
        try:
            for one in cuts:
                images = torch.empty(len(one.chosen), size, size, 3, dtype=torch.uint8, pin_memory=pinned)
                shares = np.array_split(np.arange(len(one.chosen)), threads)
                made = [pool.submit(_make, pictures, one, here.tolist(), images.numpy()) for here in shares]
                waiting.append((one, images, made))
                if len(waiting) > AHEAD:
                    yield _ready(*waiting.popleft())
            while waiting:
                yield _ready(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _make(pictures: Source, one: Cut, which: list[int], out: Pixels) -> None:
    for i in which:
        cut(pictures.image(one.chosen.item(i)), one.crops, i, out[i])
        if one.changes is not None:
            change(out[i], one.changes, i)


def _ready(one: Cut, images: Tensor, made: list[Future[None]]) -> tuple[Cut, Tensor]:
    for future in made:
        future.result()
    return one, images
