"""Downstream tasks: where a task's pictures are, and what may be done to them in training."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.cache import VERIFIED, Verified
from pipeline.data.corpus import Corpus
from pipeline.data.image import Pixels, decode
from pipeline.data.read import Reader, at
from shards.manifest import ShardSet
from shards.storage import Folder

CHOOSE, TEST = "val200", "test"


@dataclass(frozen=True)
class Task:
    """A task of 1,000 training pictures, as in VTAB-1k (Zhai et al. 2019, section 2.2)."""

    name: str
    flip: bool
    """Whether a mirrored picture is of the same class."""
    crop: bool
    """Whether a part of a picture is of the same class."""

    def training(self, split: str) -> tuple[str, ...]:
        """What is trained on before looking at `split`: 800 pictures to choose a rate by, all 1,000 for the test."""
        return ("train800",) if split == CHOOSE else ("train800", CHOOSE)


digits = Task("digits", flip=False, crop=True)
mnist = Task("mnist", flip=False, crop=True)
fashion_offset = Task("fashion_offset", flip=False, crop=False)

ALL = (digits, mnist, fashion_offset)


def named(names: str) -> tuple[Task, ...]:
    """The tasks of a list with commas; ValueError names those there are."""
    known = {task.name: task for task in ALL}
    for name in (wanted := names.split(",")):
        if name not in known:
            raise ValueError(f"no task {name!r}; there are: {', '.join(known)}")
    return tuple(known[name] for name in wanted)


def find(folder: str, task: Task) -> dict[str, ShardSet]:
    """The task's shard sets by split; ValueError says the command that makes them where they are not there."""
    found = {}
    for split in (*task.training(TEST), TEST):
        try:
            found[split] = ShardSet((Folder(folder) / f"{task.name}/{split}").absolute)
        except ValueError as error:
            made = f"python jobs/prepare.py {task.name} --to {Folder(folder).absolute}"
            raise ValueError(f"task {task.name} is not prepared ({error}); make it with: {made}") from error
    return found


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures of any sizes, RGB uint8, with one label each."""

    images: list[Pixels]
    labels: NDArray[np.int64]

    @property
    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Width and height of each."""
        return (
            np.array([image.shape[1] for image in self.images]),
            np.array([image.shape[0] for image in self.images]),
        )


def read(sets: list[ShardSet]) -> Pictures:
    """All pictures of the sets, one set after the other."""
    images: list[Pixels] = []
    labels: list[int] = []
    for shards in sets:
        corpus = Corpus([shards])
        reader = Reader(corpus, None, Verified(VERIFIED))
        for first, count in zip(corpus.first.tolist(), corpus.counts.tolist(), strict=True):
            picks = at(corpus, range(first, first + count))
            rows = reader.rows(picks)
            images += [decode(data) for data in reader.bytes(picks, rows)]
            labels += rows.labels[:, 0].tolist()
    return Pictures(images, np.array(labels))
