"""Tests without the pictures that the pretraining's corpus holds, as far as making the corpus has found them."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.insight.published import Number
from pipeline.insight.tested import Result, Tested, number, of_set
from shards.manifest import CONTAMINATION, DUPLICATES, ShardSet

Mask = NDArray[np.bool_]
"""Of each picture of a test set, in its order."""


@dataclass(frozen=True)
class Held:
    """What a corpus holds of a test set."""

    found: Mask
    """Whether a picture is a copy of one of the corpus."""
    labelled: Mask
    """Whether it has a label, without which it counts for no accuracy."""
    every: bool = True
    """Whether all that were found are said to be; else at least one for each picture that left the corpus is."""

    def part(self, first: int, last: int) -> "Held":
        """From one hundredth of the set to below another."""
        some = slice(len(self.found) * first // 100, len(self.found) * last // 100)
        return Held(self.found[some], self.labelled[some], self.every)


def contaminated(corpus: str, sets: str = "") -> dict[str, Held]:
    """By root digest of each test set that a corpus was held against, which of its pictures were found in it.

    These are the pictures that `contamination.parquet` names. A corpus that was made when there was no such file has
    `duplicates.parquet`, which names one of one test set for each picture that left. The test sets are where they were
    then, or under `sets`, as DATA_SET/SPLIT. ValueError where the corpus was held against none, or one is not there.
    """
    one = ShardSet(corpus)
    against = one.manifest.recipe.get("clean", {}).get("against", [])
    if not against:
        raise ValueError(
            f"{corpus} was held against no test set, so nothing says what it holds of them; make it again with "
            "python jobs/prepare.py … --against TEST_SET,TEST_SET"
        )
    every = CONTAMINATION in one.manifest.files
    named = _named(one, CONTAMINATION if every else DUPLICATES)
    found: dict[str, Held] = {}
    for url in against:
        try:
            test = ShardSet(f"{sets.rstrip('/')}/{'/'.join(url.rstrip('/').split('/')[-2:])}" if sets else url)
        except ValueError as error:
            raise ValueError(f"{corpus} was held against {url}: {error}; --sets says where it is now") from error
        theirs = named.get(test.manifest.name, set())
        rows = pa.concat_tables([test.rows(shard, ["key", "labels"]) for shard in range(len(test.counts))])
        keys = rows["key"].to_pylist()
        if strange := theirs.difference(keys):
            raise ValueError(f"{test.folder} has no picture {min(strange)}: it is not what {corpus} was held against")
        found[test.manifest.root] = Held(
            np.array([key in theirs for key in keys], bool),
            np.array([bool(labels) for labels in rows["labels"].to_pylist()], bool),
            every,
        )
    return found


def _named(corpus: ShardSet, file: str) -> dict[str | None, set[str]]:
    """The keys of the test pictures that a file beside a corpus names, by test set."""
    named: dict[str | None, set[str]] = {}
    table = corpus.beside(file)
    if table is not None:
        for test_set, key in zip(table["test_set"].to_pylist(), table["of"].to_pylist(), strict=True):
            named.setdefault(test_set, set()).add(key)
    return named


@dataclass(frozen=True)
class Clean:
    """A test again, without the pictures that the corpus holds."""

    pictures: int
    found: int
    all: Number
    """On all pictures."""
    clean: Number | None
    """On those that the corpus does not hold; None where it holds all."""
    every: bool = True
    """Whether all that the corpus holds were found; else these are some of them."""


def clean(test: Tested, held: Mapping[str, Held], also: str = "") -> Clean | None:
    """None where the corpus was not held against this very test set, by its root digest."""
    roots = dict(map(tuple, test.results[0]["trial"]["data"]))
    wanted = [(held.get(roots.get(name, "")), first, last) for name, first, last in test.where(also)]
    parts = [one.part(first, last) for one, first, last in wanted if one]
    if not parts or len(parts) < len(wanted):
        return None
    found, labelled = (np.concatenate(of) for of in zip(*((part.found, part.labelled) for part in parts), strict=True))
    counted = labelled & ~found
    rights = [right(one, labelled) for result in test.results if (one := of_set(result, also))]
    kept = number([float(one[counted].mean()) for one in rights]) if counted.any() else None
    every = all(part.every for part in parts)
    return Clean(int(labelled.sum()), int((labelled & found).sum()), number(test.accuracies(also)), kept, every)


def right(result: Result, labelled: Mask) -> Mask:
    """Of each test picture in turn whether it was named rightly; ValueError where its counts say otherwise."""
    packed = np.frombuffer(base64.b64decode(result["right"]), np.uint8)
    bits = np.unpackbits(packed).astype(bool)
    said, found = (result["correct"], result["count"]), (int(bits.sum()), int(labelled.sum()))
    if said != found or len(packed) != -(-len(labelled) // 8):
        raise ValueError(
            f"a result is damaged: it says that {said[0]:,} of {said[1]:,} pictures were named rightly, and its bits "
            f"that {found[0]:,} of {found[1]:,} were"
        )
    return bits[: len(labelled)]
