"""The data sets that shards can be made of: one small declarative file each, which says `DATASET = Dataset(...)`."""

import hashlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.chance import permuted
from shards.sources import Arrays, Pictures
from shards.storage import Folder


@dataclass(frozen=True)
class Dataset:
    """What a data set is, and how its pictures are had."""

    name: str
    what: str
    licence: str
    citation: str
    classes: tuple[str, ...]
    splits: Mapping[str, int]
    """Pictures of each split."""
    read: Callable[[str, str, Folder], Pictures]
    """The pictures of (split, source, downloads): `source` is a folder or URL, the usual place if empty; what has to
    be fetched is kept in `downloads`."""

    def pictures(self, split: str, source: str, downloads: Folder) -> Pictures:
        """The pictures of a split; ValueError where there are not as many as there should be."""
        found = self.read(split, source, downloads)
        if len(found) != self.splits[split]:
            raise ValueError(f"{self.name}/{split} has {len(found):,} pictures, {self.splits[split]:,} expected")
        return found


def known() -> list[str]:
    """Names of the data sets: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Dataset:
    """The data set of this name; ValueError, naming those that exist, where there is none."""
    if name not in known():
        raise ValueError(f"no data set {name!r}; there are: {', '.join(known())}")
    return import_module(f"{__name__}.{name}").DATASET


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
