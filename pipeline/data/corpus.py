"""Several shard sets as one: their shards one after the other, their pictures numbered through."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.manifest import Shard, ShardSet
from shards.storage import Folder

WHOLE = (0, 100)
"""All hundredths of a set."""


class _Held(NamedTuple):
    """What a corpus holds of a shard: so many pictures from place `first` on."""

    set: int
    shard: int
    first: int
    samples: int


class Corpus:
    """What a run looks at: of each set the pictures from the first to below the last hundredth, in the set's order.

    So parts that meet divide a set without gap or overlap. ValueError where the sets do not name the same classes in
    the same order, or where the part of one is empty.
    """

    def __init__(self, sets: Sequence[ShardSet], part: tuple[int, int] = WHOLE) -> None:
        self.sets = tuple(sets)
        self.classes = self.sets[0].manifest.classes
        for other in self.sets[1:]:
            _refuse_other_classes(self.sets[0], other)
        self._of = [_Held(i, *held) for i, one in enumerate(self.sets) for held in _held(one, part)]

    @staticmethod
    def open(urls: str, part: tuple[int, int] = WHOLE) -> "Corpus":
        """A part of the sets at one folder or URL, or at several with commas between them."""
        return Corpus([ShardSet(url.strip()) for url in urls.split(",")], part)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Pictures of each shard."""
        return np.array([held.samples for held in self._of], np.int64)

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """Number of each shard's first picture, counting through the corpus."""
        return np.concatenate([[0], np.cumsum(self.counts)[:-1]])

    @property
    def samples(self) -> int:
        """Pictures in all."""
        return sum(held.samples for held in self._of)

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Pictures of each shard of each set."""
        return tuple(tuple(held.samples for held in self._of if held.set == i) for i in range(len(self.sets)))

    @cached_property
    def root(self) -> str:
        """One digest over everything: that of the set, or one over those of the sets, whatever the part."""
        roots = [one.manifest.root for one in self.sets]
        return roots[0] if len(roots) == 1 else sha256(json.dumps(roots).encode()).hexdigest()

    def find(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard, and place in it, of pictures by their numbers."""
        shard = np.searchsorted(self.first, samples, side="right") - 1
        return shard, samples - self.first[shard]

    def about(self, shard: int) -> Shard:
        """What the manifest says of a shard."""
        held = self._of[shard]
        return self.sets[held.set].manifest.shards[held.shard]

    def tars(self, shard: int) -> Folder:
        """Where a shard lies."""
        return self.sets[self._of[shard].set].tars

    def rows(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The index of a shard: a row a picture, in the order of the tar; all columns, or those named."""
        held = self._of[shard]
        return self.sets[held.set].rows(held.shard, columns).slice(held.first, held.samples)

    def keys(self, samples: NDArray[np.int64]) -> list[str]:
        """Names of pictures by their numbers."""
        shards, places = self.find(samples)
        found = [""] * len(samples)
        for shard in np.unique(shards).tolist():
            names = self.rows(shard, ["key"])["key"]
            for i in np.flatnonzero(shards == shard).tolist():
                found[i] = names[places.item(i)].as_py()
        return found


def _held(one: ShardSet, part: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """Shard, first place and count of all that a part of a set holds; of the whole set, empty shards too."""
    samples = one.manifest.samples
    begin, end = (samples * hundredth // 100 for hundredth in part)
    if part != WHOLE and begin >= end:
        where = f"hundredths {part[0]} to {part[1]} of {one.folder.absolute}, which has {samples:,} pictures"
        raise ValueError(f"{where}, hold none")
    for shard, (first, count) in enumerate(zip(one.first.tolist(), one.counts.tolist(), strict=True)):
        low, high = max(begin - first, 0), min(end - first, count)
        if low < high or part == WHOLE:
            yield shard, low, max(0, high - low)


def _refuse_other_classes(first: ShardSet, other: ShardSet) -> None:
    ours, theirs = first.manifest.classes, other.manifest.classes
    if ours == theirs:
        return
    where = f"{other.folder.absolute} does not go with {first.folder.absolute}"
    if len(ours) != len(theirs):
        raise ValueError(f"{where}: it has {len(theirs)} classes, not {len(ours)}")
    number = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    raise ValueError(f"{where}: its class {number} is {theirs[number]!r}, not {ours[number]!r}")
