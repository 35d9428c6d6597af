"""webdataset: the same tars as ours, read from their beginning to their end."""

from collections.abc import Iterable
from typing import Any

from webdataset.compat import WebDataset, WebLoader

from peers.chain import kernel, normalised
from peers.contest import BATCH, TARS, WORKERS, Task, Turn, samples

SHUFFLED = 1000
"""Pictures in its buffer."""


def turns(task: Task) -> Turn:
    if task.part == "s3":
        return lambda number: _count(_pictures(task.url.splitlines()))
    shuffled = _pictures([str(path) for path in sorted((task.pictures / TARS).glob("*.tar"))]).shuffle(SHUFFLED)
    if task.part == "raw":
        return lambda number: _count(shuffled)
    if task.part == "same":
        pictures = shuffled.to_tuple("jpg", "cls").map_tuple(kernel, int)
    else:
        pictures = shuffled.decode("pil").to_tuple("jpg", "cls").map_tuple(normalised, int)
    batches = WebLoader(pictures.batched(BATCH), batch_size=None, num_workers=WORKERS, persistent_workers=True)
    return lambda number: samples(batches)


def _pictures(urls: list[str]) -> Any:
    return WebDataset(urls, shardshuffle=100)


def _count(pictures: Iterable[Any]) -> int:
    return sum(len(picture["jpg"]) > 0 for picture in pictures)
