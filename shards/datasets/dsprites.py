"""Two tasks of VTAB on dSprites (Zhai et al. 2019, appendix A): where a shape lies, and how it is turned.

VTAB trains on 80 of a hundred pictures, chooses by 10 and tests on 10, in the order in which TensorFlow Datasets keeps
them (`shards.sources.tfds`).
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shards.datasets import Dataset
from shards.sources import Origin, sprites, tfds

COUNT = 737_280
EDGES = {"train": (0, 80), "val": (80, 90), "test": (90, 100)}
"""First and last percent of each split."""

Task = Callable[[NDArray[np.int64]], NDArray[np.int64]]


def numbers(split: str, count: int) -> NDArray[np.int64]:
    """Which of `count` pictures belong to a split, the same for both tasks."""
    first, last = (count * edge // 100 for edge in EDGES[split])
    return tfds.order("train", range(count))[first:last]


def read(task: Task, split: str, origin: Origin) -> sprites.Sprites:
    """The pictures of a split, 64 x 64, labelled by a task."""
    found = every(task, split, origin)
    return found.take(numbers(split, len(found)))


def every(task: Task, split: str, origin: Origin) -> sprites.Sprites:
    """All pictures in the order of the file, whatever the split."""
    bits, factors = sprites.read(origin.source)
    return sprites.Sprites(np.arange(len(bits)), bits, task(factors))


def _names(factor: int, what: str) -> tuple[str, ...]:
    """Names of the classes: the least and the greatest of the factor's values in each."""
    count = sprites.FACTORS[factor]
    binned = np.arange(count) * sprites.BINS // count
    groups = [np.flatnonzero(binned == group) for group in range(sprites.BINS)]
    return tuple(f"{what} {group[0]} to {group[-1]} of {count}" for group in groups)


PLACES, ANGLES = _names(4, "place"), _names(3, "angle")


def _dataset(name: str, what: str, task: Task, classes: tuple[str, ...]) -> Dataset:
    return Dataset(
        name=name,
        what=what,
        licence="zlib/libpng",
        citation="Matthey, Higgins, Hassabis and Lerchner 2017, https://github.com/deepmind/dsprites-dataset",
        classes=classes,
        splits={split: len(range(COUNT * first // 100, COUNT * last // 100)) for split, (first, last) in EDGES.items()},
        read=partial(read, task),
        source=f"{sprites.FILE} or the folder that holds it",
    )


DATASETS = (
    _dataset(
        "dsprites_location",
        "how far from the left a white shape lies, 64 x 64, grey",
        sprites.location,
        PLACES,
    ),
    _dataset(
        "dsprites_orientation",
        "how a white shape is turned, 64 x 64, grey",
        sprites.orientation,
        ANGLES,
    ),
)
