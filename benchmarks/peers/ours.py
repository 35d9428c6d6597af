"""Ours: the feed of a training run, with everything on. Digests are checked when a shard is first used, as always."""

import shutil
from dataclasses import replace
from pathlib import Path

from peers.chain import AREA, SIDE
from peers.contest import BATCH, PASSES, RAW_BATCH, TARS, WORKERS, Task, Turn
from pipeline.config import Config, Data, Vit
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Feed
from pipeline.world import World

MIDDLE = 3.5
"""Epochs that a run has done which starts again."""


def turns(task: Task) -> Turn:
    url = str(task.pictures / TARS)
    match task.part:
        case "s3":
            return lambda number: _from_store(task)
        case "fresh" | "resumed":
            return lambda number: _first_batch(task)
        case "raw":
            return _encoded(_feed(url, task.aside, threads=1, batch=RAW_BATCH))
        case _:
            return _decoded(_feed(url, task.aside))


def _encoded(pictures: Feed) -> Turn:
    steps = PASSES * pictures.corpus.samples // RAW_BATCH
    return lambda number: sum(len(batch.data) for batch in pictures.encoded(number * steps, (number + 1) * steps))


def _decoded(pictures: Feed) -> Turn:
    steps = pictures.corpus.samples // BATCH
    return lambda number: sum(len(batch.images) for batch in pictures.training(number * steps, (number + 1) * steps))


def _from_store(task: Task) -> int:
    """The pictures of an epoch, from the first look at the URL on, through an empty cache."""
    shutil.rmtree(task.aside, ignore_errors=True)
    pictures = _feed(task.url, task.aside)
    count = sum(len(batch.data) for batch in pictures.encoded(0, pictures.corpus.samples // BATCH))
    pictures.close()
    return count


def _first_batch(task: Task) -> int:
    """From the first look at the set to the first batch; shards have to be verified again."""
    shutil.rmtree(task.aside, ignore_errors=True)
    pictures = _feed(str(task.pictures), task.aside)
    step = int(MIDDLE * pictures.corpus.samples / BATCH) if task.part == "resumed" else 0
    count = len(next(pictures.training(step, step + 1)).images)
    pictures.close()
    return count


def _feed(url: str, cache: Path, *, threads: int = WORKERS, batch: int = BATCH) -> Feed:
    corpus = Corpus.open(url)
    data = Data(shards=url, threads=threads, crop_area=AREA[0], cache=str(cache))
    # The order is the same with a larger window; but in a small set that would be many epochs to look ahead.
    data = replace(data, window=min(data.window, corpus.samples // data.lanes + 1))
    model = Vit(image_size=SIDE)
    config = Config("feed", len(corpus.classes), model=model, data=data, batch=batch, micro_batch=batch)
    return Feed(corpus, config, World())
