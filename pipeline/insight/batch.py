"""The pictures of one step of a run, as they were cropped: worked out, not recorded.

What was in a step is a function of the run's configuration and data, so a spike of the loss can be looked into long
after it happened, on a machine without the run's processes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config, from_dict
from pipeline.data.loader import feed
from pipeline.data.plan import Order
from pipeline.world import World
from shards.manifest import ShardSet
from shards.storage import Folder


@dataclass(frozen=True)
class Shown:
    """A picture of a step: its key and shard in the set, the names of its classes, and its pixels (s, s, 3)."""

    key: str
    shard: str
    classes: tuple[str, ...]
    pixels: NDArray[np.uint8]


def batch(run: str, step: int, shards: str = "") -> Iterator[Shown]:
    """The pictures of the step, counted from 0, of the run in the folder `run`, in the order of the batch.

    `shards` is where the run's data lie now, if no more where they lay. ValueError where there is no run, the step is
    none of its steps, or the data are others than it was trained on.
    """
    folder = Folder(run)
    config, roots = _config(folder), json.loads(folder.read("about.json"))["data"]
    found = ShardSet(shards or config.data.shards)
    if found.manifest.root != roots["training"]:
        raise ValueError(f"{found.folder} does not hold the pictures of {folder}: its root digest is another")
    steps = config.steps(found.manifest.samples)
    if not 0 <= step < steps:
        raise ValueError(f"there is no step {step:,}: {folder} has the steps 0 to {steps - 1:,}")
    return _shown(config, found, step)


def _config(folder: Folder) -> Config:
    try:
        return from_dict(json.loads(folder.read("config.json")))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no run: it has no config.json") from error


def _shown(config: Config, shards: ShardSet, step: int) -> Iterator[Shown]:
    order = Order(tuple(shards.counts.tolist()), config.data.lanes, config.data.window, config.seed)
    pictures, names = feed(shards, config), shards.manifest.classes
    try:
        for made in pictures.training(config, order, World(), step, step + 1):
            for sample, pixels, labels in zip(made.samples.tolist(), made.images.numpy(), made.labels, strict=True):
                shard = int(np.searchsorted(shards.first, sample, side="right")) - 1
                key = pictures.reader.key(shard, sample - int(shards.first[shard]))
                classes = tuple(names[label] for label in labels.tolist() if label >= 0)
                yield Shown(key, shards.manifest.shards[shard].name, classes, pixels)
    finally:
        pictures.close()
