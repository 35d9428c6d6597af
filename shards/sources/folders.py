"""A folder of class folders: `class/name.jpg`, or deeper, `class/session/name.jpg`, whose class is the first folder.

Files are listed with their sizes and not opened. Links count as what they lead to, on a local disk as everywhere else.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shards.sources import Origin, Ranges, is_picture, joined, key, listing, numbered
from shards.storage import Folder

# Many small listings cost more than they share out; a few hundred keep any cluster busy.
_PARTS = 256


@dataclass(frozen=True)
class Part:
    """What some class folders hold."""

    pictures: Ranges
    others: int
    """How many files there are that are no pictures."""
    other: str
    """The first of them; empty where there is none."""
    without: tuple[str, ...]
    """Class folders that hold no picture."""


def read(origin: Origin) -> Ranges:
    """The pictures below the class folders of `origin.source`, in the order of classes and names, with their sizes.

    Classes are `origin.classes`, else the names of the folders in order. Files that are no pictures, and what lies in
    folders whose names begin with a dot, are left out, and `origin.say` is told how many. FileNotFoundError where
    there is no such folder; ValueError where it holds a picture of no class, no class folder, or none with a picture,
    or where, with no class list, a class folder holds no picture, since that would silently shift the classes.
    """
    folder = Folder(_given(origin))
    names, loose = _class_folders(folder)
    classes = origin.classes or tuple(names)
    numbers = numbered(names, classes, folder.absolute)
    work = [(folder.absolute, [(name, numbers[name]) for name in batch]) for batch in _batches(names)]
    parts: list[Part] = list(origin.spread(listed, work))
    pictures = joined(folder.absolute, [part.pictures for part in parts], classes)
    _check(folder, len(pictures), [name for part in parts for name in part.without], bool(origin.classes))
    _say(origin, folder, loose, parts)
    return pictures


def listed(root: str, folders: Sequence[tuple[str, int]]) -> Part:
    """The pictures of class folders of `root`, given by name and number of the class."""
    names: list[str] = []
    sizes: list[int] = []
    counts, others, other = [], 0, ""
    for name, _ in folders:
        before = len(names)
        for path, size in sorted((Folder(root) / name).find()):
            if is_picture(path) and not _hidden(path):
                names.append(f"{name}/{path}")
                sizes.append(size)
            else:
                others, other = others + 1, other or f"{name}/{path}"
        counts.append(len(names) - before)
    labels = np.repeat(np.array([number for _, number in folders], np.int32), counts)
    count = len(names)
    table = listing([key(name) for name in names], np.arange(count), np.zeros(count), sizes, labels[:, None])
    without = tuple(name for (name, _), found in zip(folders, counts, strict=True) if not found)
    pictures = Ranges(root, pa.array(names, pa.string()), table)
    return Part(pictures, others, other, without)


def directly(folder: Folder) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files directly in `folder`, in order.

    FileNotFoundError where it does not exist, ValueError where it is a file.
    """
    if folder.local is not None:
        return _directly_on_disk(folder.absolute)
    folders, files = folder.folders(), sorted(folder.sizes())
    if not folders and not files:
        parent, _, name = folder.absolute.rpartition("/")
        if Folder(parent).size(name) is not None:
            raise ValueError(f"{folder.absolute} is a file, not a folder")
        raise FileNotFoundError(f"{folder.absolute} does not exist, or is empty")
    return folders, files


def _directly_on_disk(path: str) -> tuple[list[str], list[str]]:
    """fsspec's own listing takes links for neither folders nor files, which is what linked corpora are made of."""
    folders, files = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                (folders if entry.is_dir() else files).append(entry.name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except NotADirectoryError as error:
        raise ValueError(f"{path} is a file, not a folder") from error
    return sorted(folders), sorted(files)


def _given(origin: Origin) -> str:
    if not origin.source:
        raise ValueError("a folder of class folders is needed: --source")
    return origin.source


def _class_folders(folder: Folder) -> tuple[list[str], list[str]]:
    """Names of the class folders, and of files beside them that are no pictures."""
    folders, loose = directly(folder)
    folders = [name for name in folders if not name.startswith(".")]
    pictures = [name for name in loose if is_picture(name)]
    if pictures:
        raise ValueError(
            f"{folder.absolute}/{pictures[0]} lies in no class folder ({len(pictures):,} such pictures): "
            "pictures have to lie as in class/name.jpg"
        )
    if not folders:
        raise ValueError(f"{folder.absolute} holds no class folders: pictures have to lie as in class/name.jpg")
    return folders, loose


def _batches(names: Sequence[str]) -> list[Sequence[str]]:
    each = -(-len(names) // _PARTS)
    return [names[start : start + each] for start in range(0, len(names), each)]


def _check(folder: Folder, count: int, without: Sequence[str], told: bool) -> None:
    if not count:
        raise ValueError(f"{folder.absolute} holds no picture in its {len(without):,} class folders")
    if without and not told:
        raise ValueError(
            f"{folder.absolute} has {len(without):,} folders without a picture, {without[0]} the first: "
            "remove them, or give the list of classes"
        )


def _say(origin: Origin, folder: Folder, loose: Sequence[str], parts: Sequence[Part]) -> None:
    count = len(loose) + sum(part.others for part in parts)
    if count:
        first = next(name for name in (*loose, *(part.other for part in parts)) if name)
        origin.say(f"{folder.absolute}: {count:,} files that are no pictures are left out, {first} the first")


def _hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path
