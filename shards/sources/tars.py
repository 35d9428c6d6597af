"""Pictures in tars, as ImageNet comes: listed where they lie, without being unpacked.

A local tar is read header by header, a remote one in blocks of some megabytes, with leaps over what is larger. A
compressed tar is unpacked first, and what it is unpacked to is listed.
"""

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.sources import LISTING, Origin, Ranges, is_picture, joined, key, listing, numbered
from shards.sources.members import Broken, Read, complain, is_tar, walk
from shards.sources.unpacking import split, unpack
from shards.storage import Folder

BLOCK = 1 << 22
"""Bytes that are fetched at once of a remote tar; a member that is larger is leapt over."""

LEAST = 1 << 16
"""Bytes that are fetched behind a leap: who leaps once mostly leaps again, as over the class tars of a tar."""

BATCH = 64
"""Class tars that are listed in one go."""

_ROWS = 1 << 16


# what a tar is read through


@contextmanager
def _opened(folder: Folder, name: str, end: int) -> Iterator[Read]:
    """Reads the file `name` of `folder`, no byte from `end` on."""
    if not folder.local:
        yield _Blocks(folder, name, end)
        return
    try:
        descriptor = os.open(folder.local / name, os.O_RDONLY)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}/{name} does not exist") from error
    try:
        yield lambda offset, size: os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


@dataclass
class _Blocks:
    """Reads a remote file forwards by few requests."""

    folder: Folder
    name: str
    end: int
    start: int = 0
    block: bytes = b""
    bytes_next: int = field(default_factory=lambda: BLOCK)

    def __call__(self, offset: int, size: int) -> bytes:
        if offset + size > self.start + len(self.block):
            self._fetch(offset, size)
        return self.block[offset - self.start : offset - self.start + size]

    def _fetch(self, offset: int, size: int) -> None:
        leap = bool(self.block) and offset - self.start - len(self.block) > BLOCK
        self.bytes_next = min(LEAST, BLOCK) if leap else self.bytes_next
        asked = max(0, min(max(size, self.bytes_next), self.end - offset))
        self.block, self.start = self.folder.read(self.name, offset, offset + asked) if asked else b"", offset
        self.bytes_next = min(2 * self.bytes_next, BLOCK)


# the pictures of many class tars


class Tar(NamedTuple):
    """A class tar: the run of bytes of `file` that it is (if `end` is 0, to the file's), its class, and its number."""

    file: str
    start: int
    end: int
    name: str
    label: int
    cut: bool = False
    """Its end is known to be missing, so that nothing more is to be said of that."""


@dataclass(frozen=True)
class Part:
    """What some class tars hold."""

    pictures: Ranges
    broken: tuple[str, ...]
    """A line for each tar that is."""
    without: tuple[str, ...]
    """Class tars that hold no picture."""


@dataclass
class _Rows:
    """A listing that grows; what has been added is kept in little space."""

    keys: list[str] = field(default_factory=list)
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    tables: list[pa.Table] = field(default_factory=list)

    def add(self, key: str, file: int, offset: int, size: int, label: int) -> None:
        self.keys.append(key)
        self.numbers.extend((file, offset, size, label))
        if len(self.keys) == _ROWS:
            self._close()

    def _close(self) -> None:
        file, offset, size, label = np.array(self.numbers, np.int64).reshape(-1, 4).T
        self.tables.append(listing(self.keys, file, offset, size, label[:, None]))
        self.keys, self.numbers = [], array("q")

    def table(self) -> pa.Table:
        self._close()
        return pa.concat_tables(self.tables)


def listed(root: str, tars: Sequence[Tar]) -> Part:
    """The pictures of class tars, whose files are named relative to `root`; those of a broken one up to its fault."""
    folder, rows, files = Folder(root), _Rows(), list(dict.fromkeys(tar.file for tar in tars))
    broken, without = [], []
    for tar in tars:
        file, count = files.index(tar.file), 0
        try:
            end = tar.end or _bytes(folder, tar.file)
            with _opened(folder, tar.file, end) as read:
                for name, offset, size in walk(read, tar.start, end):
                    if is_picture(name):
                        rows.add(key(f"{tar.name}/{name}"), file, offset, size, tar.label)
                        count += 1
        except Broken as error:
            broken += [] if tar.cut else [error.says(_called(folder, tar))]
        without += [] if count else [_called(folder, tar)]
    return Part(Ranges(folder.absolute, pa.array(files, pa.string()), rows.table()), tuple(broken), tuple(without))


def _called(folder: Folder, tar: Tar) -> str:
    inside = f" ({tar.name}.tar inside)" if tar.start else ""
    return f"{folder}/{tar.file}{inside}"


def read(origin: Origin) -> Ranges:
    """The pictures in the tars of `origin.source`, class tar by class tar in the order of their names.

    The source is a folder of class tars, each named for its class; a tar of class tars; a tar of pictures in class
    folders, whose classes are the folders that the pictures lie in; or one of the last two compressed
    (`unpacking.OPENERS`), which is unpacked below `origin.downloads` the first time. Members whose names are no
    pictures' are left out.

    Classes are `origin.classes`, else the names of the classes in order. ValueError where a tar is broken, with file
    and offset (with `origin.keep_sound` what stands before the fault is taken, and `origin.say` is told), where there
    is no picture, where one has no class, and where, with no class list, a class tar holds none, since that would
    silently shift the classes. FileNotFoundError where the source does not exist.
    """
    folder, name, suffix = split(origin.source)
    if not suffix:
        return _of_folder(origin, folder)
    if suffix == ".tar":
        return _of_tar(origin, folder, name)
    unpacked = unpack(origin)
    if unpacked.pictures:
        return _of_tar(origin, unpacked.folder, unpacked.pictures)
    return _of_files(origin, unpacked.folder, unpacked.tars)


def _class(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".tar")


def _of_folder(origin: Origin, folder: Folder) -> Ranges:
    sizes = folder.sizes()
    if not sizes and not folder.exists(""):
        raise FileNotFoundError(f"{folder} does not exist, or is neither a folder nor a tar")
    files = {name: size for name, size in sizes.items() if is_tar(name)}
    if not files:
        raise ValueError(
            f"{folder} holds no tars: there are {len(sizes):,} other files; name a folder of *.tar, or a tar"
        )
    return _of_files(origin, folder, files)


def _of_files(origin: Origin, folder: Folder, files: Mapping[str, int]) -> Ranges:
    sizes = dict(sorted(files.items()))
    names = [_class(name) for name in sizes]
    classes = origin.classes or tuple(names)
    labels = numbered(names, classes, folder.absolute)
    tars = [Tar(name, 0, size, _class(name), labels[_class(name)]) for name, size in sizes.items()]
    return joined(folder.absolute, [part.pictures for part in _parts(origin, folder.absolute, tars)], classes)


def _bytes(folder: Folder, name: str) -> int:
    size = folder.size(name)
    if size is None:
        raise FileNotFoundError(f"{folder}/{name} does not exist")
    return size


def _parts(origin: Origin, root: str, tars: Sequence[Tar]) -> list[Part]:
    work = ((root, tars[first : first + BATCH]) for first in range(0, len(tars), BATCH))
    parts: list[Part] = []
    for part in origin.spread(listed, work):
        for line in part.broken:
            complain(origin, line)
        parts.append(part)
    without = [where for part in parts for where in part.without]
    if len(without) == len(tars) or (without and not origin.classes and not origin.keep_sound):
        raise ValueError(f"{_none(without[0])} ({len(without):,} such tars); take it away, or give a class list")
    return parts


def _none(where: str) -> str:
    return f"{where} holds no picture: no member is named as one (.jpg, .JPEG, .png, …)"


# one plain tar


@dataclass(frozen=True)
class Inside:
    """What a plain tar holds: class tars, and pictures labelled with the number of their folder among `folders`."""

    tars: list[Tar]
    pictures: Ranges
    folders: list[str]


def scanned(origin: Origin, folder: Folder, name: str) -> Inside:
    """What the plain tar `name` of `folder` holds; where it is broken, up to the fault, or an error, as `read` says."""
    tars, rows, folders, size = [], _Rows(), {}, _bytes(folder, name)

    def take(path: str, offset: int, end: int) -> None:
        if is_tar(path):
            tars.append(Tar(name, offset, end, _class(path), 0))
        elif is_picture(path):
            label = folders.setdefault(path.rpartition("/")[0], len(folders))
            rows.add(key(path), 0, offset, end - offset, label)

    try:
        with _opened(folder, name, size) as read:
            for path, offset, count in walk(read, 0, size):
                take(path, offset, offset + count)
    except Broken as broken:
        complain(origin, broken.says(f"{folder}/{name}"))
        if broken.cut and is_tar(broken.cut.name):
            tars.append(Tar(name, broken.cut.offset, size, _class(broken.cut.name), 0, cut=True))
    return Inside(tars, Ranges(folder.absolute, pa.array([name]), rows.table()), list(folders))


def _of_tar(origin: Origin, folder: Folder, name: str) -> Ranges:
    inside = scanned(origin, folder, name)
    if not inside.tars:
        return _of_class_folders(origin, inside, f"{folder}/{name}")
    if count := len(inside.pictures):
        origin.say(f"{folder}/{name}: {count:,} pictures beside the class tars are left out")
    tars = sorted(inside.tars, key=lambda tar: (tar.name, tar.start))
    classes = origin.classes or tuple(dict.fromkeys(tar.name for tar in tars))
    labels = numbered([tar.name for tar in tars], classes, f"{folder}/{name}")
    parts = _parts(origin, folder.absolute, [tar._replace(label=labels[tar.name]) for tar in tars])
    table = pa.concat_tables([LISTING.empty_table(), *(part.pictures.table for part in parts)])
    return Ranges(folder.absolute, pa.array([name]), table, classes)


def _of_class_folders(origin: Origin, inside: Inside, where: str) -> Ranges:
    if not len(inside.pictures):
        raise ValueError(_none(where))
    names = [folder.rpartition("/")[2] for folder in inside.folders]
    if "" in names:
        raise ValueError(f"{where} has pictures of no class: put each into a folder named for its class")
    classes = origin.classes or tuple(sorted(set(names)))
    numbers = numbered(names, classes, where)
    label_of_folder = np.array([numbers[name] for name in names])
    return relabelled(inside.pictures, label_of_folder[labels_of(inside.pictures)], classes)


def labels_of(pictures: Ranges) -> NDArray[np.int32]:
    """The label of each picture, where each has one: (n,)."""
    return pa.concat_arrays(
        [pa.array([], pa.int32()), *(c.flatten() for c in pictures.table["labels"].chunks)]
    ).to_numpy()


def relabelled(
    pictures: Ranges, labels: NDArray[Any] | Sequence[Sequence[int]], classes: tuple[str, ...] = ()
) -> Ranges:
    """The same pictures with other labels, one each in an array (n,), or several each in sequences."""
    kind = LISTING.field("labels")
    if isinstance(labels, np.ndarray):
        starts = np.arange(len(labels) + 1, dtype=np.int32)
        column = pa.ListArray.from_arrays(pa.array(starts), pa.array(labels.astype(np.int32)))
    else:
        column = pa.array(labels, kind.type)
    table = pictures.table.set_column(LISTING.get_field_index("labels"), kind, column)
    return Ranges(pictures.root, pictures.files, table, classes)
