"""The data sets that shards can be made of: one small declarative file each, which says `DATASET = Dataset(...)`."""

import hashlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.chance import permuted
from shards.sources import Arrays, Origin, Pictures


@dataclass(frozen=True)
class Dataset:
    """What a data set is, and how its pictures are had."""

    name: str
    what: str
    licence: str
    citation: str
    classes: tuple[str, ...] | int
    """Names of the classes in their order; their count where only the source knows the names, 0 where it varies."""
    splits: Mapping[str, int | None]
    """Pictures of each split; None where that varies."""
    read: Callable[[str, Origin], Pictures]
    """The pictures of a split."""
    source: str = ""
    """What `--source` is; empty where none is needed."""
    run: int = 1
    """Neighbours that are best kept together, since the source is read in such pieces (see `Plan`)."""

    def pictures(self, split: str, origin: Origin) -> Pictures:
        """The pictures of a split; ValueError where there are not as many pictures or classes as there should be."""
        if self.source and not origin.source:
            raise ValueError(f"{self.name} needs --source: {self.source}")
        found, expected = self.read(split, origin), self.splits[split]
        if expected is not None and len(found) != expected:
            raise ValueError(f"{self.name}/{split} has {len(found):,} pictures, {expected:,} expected")
        count = self.classes if isinstance(self.classes, int) else len(self.classes)
        if found.classes and count and len(found.classes) != count:
            raise ValueError(f"{self.name}/{split} has {len(found.classes):,} classes, {count:,} expected")
        return found


def known() -> dict[str, Dataset]:
    """The data sets by name: each file of this folder says `DATASET`, or `DATASETS` where it describes several."""
    found: dict[str, Dataset] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = import_module(f"{__name__}.{name}")
        each = module.DATASETS if hasattr(module, "DATASETS") else (module.DATASET,)
        found.update({dataset.name: dataset for dataset in each})
    return found


def find(name: str) -> Dataset:
    """The data set of this name; ValueError, naming those that are called much like it, where there is none."""
    there = known()
    if name not in there:
        alike = get_close_matches(name, there, cutoff=0.75)
        means = f"do you mean {' or '.join(alike)}? " if alike else ""
        raise ValueError(f"no data set {name!r}; {means}prepare.py --list shows the {len(there)} there are")
    return there[name]


# A task of 1,000 training pictures, in the manner of VTAB-1k (Zhai et al. 2019, section 2.2): 800 to train on while
# choosing, 200 to choose by, both together for the final run, all others to test on.
THOUSAND = {"train800": (0, 800), "val200": (800, 1000), "test": (1000, None)}


def thousand_splits(count: int) -> dict[str, int]:
    """Pictures of each split of a task made from `count` pictures."""
    return {split: len(range(count)[slice(*edges)]) for split, edges in THOUSAND.items()}


def thousand(name: str, split: str, count: int) -> NDArray[np.int64]:
    """Which of `count` pictures belong to a split of the task `name`."""
    return permuted(np.arange(count)[slice(*THOUSAND[split])], count, "thousand", name)


def packaged(name: str, module: str, package: str, source: str) -> Any:
    """The module that holds the pictures of data set `name`; ValueError where its package is not installed, or where
    a source was given, since there is no other."""
    if source:
        raise ValueError(f"{name} comes with the package {package}; it takes no --source (given: {source})")
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} comes with the package {package}: pip install {package}") from error


def checked(name: str, arrays: Arrays, sha256: str) -> Arrays:
    """`arrays`, if the sha256 of its pixels and labels is this; ValueError where they have changed."""
    found = hashlib.sha256(arrays.pixels.tobytes() + arrays.labels.tobytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has other pictures than it had: sha256 {found}, expected {sha256}")
    return arrays
