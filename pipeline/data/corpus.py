"""Several shard sets as one: their shards one after the other, their pictures numbered through."""

import json
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.manifest import Shard, ShardSet
from shards.storage import Folder


class Corpus:
    """What a run looks at; ValueError where the sets do not name the same classes in the same order."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.sets = tuple(sets)
        self.classes = self.sets[0].manifest.classes
        for other in self.sets[1:]:
            _refuse_other_classes(self.sets[0], other)
        self._of = [(one, i) for one in self.sets for i in range(len(one.manifest.shards))]

    @staticmethod
    def open(urls: str) -> "Corpus":
        """The sets at one folder or URL, or at several with commas between them."""
        return Corpus([ShardSet(url.strip()) for url in urls.split(",")])

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Pictures of each shard."""
        return np.concatenate([one.counts for one in self.sets])

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """Number of each shard's first picture, counting through the corpus."""
        return np.concatenate([[0], np.cumsum(self.counts)[:-1]])

    @property
    def samples(self) -> int:
        """Pictures in all."""
        return sum(one.manifest.samples for one in self.sets)

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Pictures of each shard of each set."""
        return tuple(tuple(one.counts.tolist()) for one in self.sets)

    @cached_property
    def root(self) -> str:
        """One digest over everything: that of the set, or one over those of the sets."""
        roots = [one.manifest.root for one in self.sets]
        return roots[0] if len(roots) == 1 else sha256(json.dumps(roots).encode()).hexdigest()

    def find(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard, and place in it, of pictures by their numbers."""
        shard = np.searchsorted(self.first, samples, side="right") - 1
        return shard, samples - self.first[shard]

    def about(self, shard: int) -> Shard:
        """What the manifest says of a shard."""
        one, number = self._of[shard]
        return one.manifest.shards[number]

    def tars(self, shard: int) -> Folder:
        """Where a shard lies."""
        return self._of[shard][0].tars

    def rows(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The index of a shard: a row a picture, in the order of the tar; all columns, or those named."""
        one, number = self._of[shard]
        return one.rows(number, columns)

    def keys(self, samples: NDArray[np.int64]) -> list[str]:
        """Names of pictures by their numbers."""
        shards, places = self.find(samples)
        found = [""] * len(samples)
        for shard in np.unique(shards).tolist():
            names = self.rows(shard, ["key"])["key"]
            for i in np.flatnonzero(shards == shard).tolist():
                found[i] = names[places.item(i)].as_py()
        return found


def _refuse_other_classes(first: ShardSet, other: ShardSet) -> None:
    ours, theirs = first.manifest.classes, other.manifest.classes
    if ours == theirs:
        return
    where = f"{other.folder.absolute} does not go with {first.folder.absolute}"
    if len(ours) != len(theirs):
        raise ValueError(f"{where}: it has {len(theirs)} classes, not {len(ours)}")
    number = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    raise ValueError(f"{where}: its class {number} is {theirs[number]!r}, not {ours[number]!r}")
