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
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Feed
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
    found = Corpus.open(shards or config.data.shards)
    if found.root != roots["training"]:
        where = found.sets[0].folder
        raise ValueError(f"{where} does not hold the pictures of {folder}: its root digest is another")
    steps = config.steps(found.samples)
    if not 0 <= step < steps:
        raise ValueError(f"there is no step {step:,}: {folder} has the steps 0 to {steps - 1:,}")
    return _shown(config, found, step)


def _config(folder: Folder) -> Config:
    try:
        return from_dict(json.loads(folder.read("config.json")))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no run: it has no config.json") from error


def _shown(config: Config, corpus: Corpus, step: int) -> Iterator[Shown]:
    pictures = Feed(corpus, config)
    try:
        for made in pictures.training(step, step + 1):
            keys, shards = corpus.keys(made.samples.numpy()), corpus.find(made.samples.numpy())[0].tolist()
            for key, shard, pixels, labels in zip(keys, shards, made.images.numpy(), made.labels, strict=True):
                classes = tuple(corpus.classes[label] for label in labels.tolist() if label >= 0)
                yield Shown(key, corpus.about(shard).name, classes, pixels)
    finally:
        pictures.close()
