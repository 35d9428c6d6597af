"""The files of a data set as it was published: unpacked in a folder, in a zip, or in a tar that is unpacked once.

A zip is entered where it lies, so that of a large one only what is wanted is read.
"""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.sources import Origin, Picture, Pictures, Ranges, key, listing
from shards.sources.archives import apart, unpacked
from shards.storage import Folder


class Tree(Protocol):
    """Files, by names relative to the data set's top folder."""

    @property
    def where(self) -> str:
        """Path or URL of the top folder, or of the archive, for messages."""
        ...

    def names(self, below: str = "") -> list[str]:
        """The files in the folder `below` and under it, in order; hidden ones are left out."""
        ...

    def read(self, names: Sequence[str]) -> list[bytes]:
        """The bytes of each file; FileNotFoundError names one that is not there."""
        ...

    def pictures(self, names: Sequence[str], labels: Sequence[int], *, short: bool = False) -> Pictures:
        """Whole files as pictures, a label each, which are called by their paths, or `short`, by the last part."""
        ...


@dataclass(frozen=True)
class Files:
    """The files of a folder."""

    folder: Folder

    @property
    def where(self) -> str:
        return self.folder.absolute

    def names(self, below: str = "") -> list[str]:
        start = f"{below}/" if below else ""
        place = self.folder / below if below else self.folder
        return sorted(f"{start}{name}" for name, _ in place.find() if not _hidden(name))

    def read(self, names: Sequence[str]) -> list[bytes]:
        try:
            return self.folder.ranges([(name, 0, -1) for name in names])
        except FileNotFoundError as error:
            missing = next((name for name in names if not self.folder.exists(name)), "")
            raise FileNotFoundError(f"{self.where}/{missing} does not exist") from error

    def pictures(self, names: Sequence[str], labels: Sequence[int], *, short: bool = False) -> Ranges:
        count = len(names)
        whole = np.full(count, -1)
        table = listing(_keys(names, short), np.arange(count), np.zeros(count), whole, _column(labels))
        return Ranges(self.where, pa.array(names, pa.string()), table)


@dataclass(frozen=True)
class Zip:
    """The files of a zip, below the folder `top` in it."""

    folder: Folder
    archive: str
    top: str

    @property
    def where(self) -> str:
        return f"{self.folder.absolute}/{self.archive}"

    @cached_property
    def _members(self) -> list[str]:
        with opened(self.folder, self.archive) as archive:
            return _inside(archive, self.top)

    def names(self, below: str = "") -> list[str]:
        start = f"{below}/" if below else ""
        return sorted(name for name in self._members if name.startswith(start) and not _hidden(name))

    def read(self, names: Sequence[str]) -> list[bytes]:
        with opened(self.folder, self.archive) as archive:
            return [member(archive, self._full(name), self.where) for name in names]

    def pictures(self, names: Sequence[str], labels: Sequence[int], *, short: bool = False) -> "Zipped":
        there = set(self._members)
        missing = next((name for name in names if name not in there), None)
        if missing is not None:
            raise FileNotFoundError(f"{self.where} holds no {self._full(missing)}")
        count = len(names)
        whole = np.full(count, -1)
        table = listing(_keys(names, short), np.zeros(count), np.arange(count), whole, _column(labels))
        return Zipped(self.folder, self.archive, pa.array(map(self._full, names), pa.string()), table)

    def _full(self, name: str) -> str:
        return f"{self.top}/{name}" if self.top else name


@dataclass(frozen=True)
class Zipped:
    """Encoded pictures, each a member of a zip; read only when it is iterated over."""

    folder: Folder
    archive: str
    members: pa.Array
    """Their names in the zip, as strings."""
    table: pa.Table
    """A row a picture, with the columns of `LISTING`; the offset is its number."""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.table.num_rows

    def take(self, numbers: NDArray[np.int64]) -> "Zipped":
        """The pictures of these numbers, in this order, with their names alone."""
        rows = pa.array(numbers)
        return Zipped(self.folder, self.archive, self.members.take(rows), self.table.take(rows), self.classes)

    def __iter__(self) -> Iterator[Picture]:
        """The pictures in order; ValueError, naming the zip, where one is damaged."""
        where = f"{self.folder.absolute}/{self.archive}"
        columns = self.table.select(["key", "labels"]).to_pydict()
        with opened(self.folder, self.archive) as archive:
            for name, own, labels in zip(self.members.to_pylist(), columns["key"], columns["labels"], strict=True):
                yield Picture(own, member(archive, name, where), tuple(labels))


def found(origin: Origin, tops: Sequence[str], archives: Sequence[str], marker: str) -> Tree:
    """The files of a data set, below the folder that holds the file or folder `marker`.

    The source is one of the `archives`, or a folder that holds the marker, or a folder or an archive that does; in an
    archive, and in a folder, the marker may lie in one of `tops`. FileNotFoundError where there is nothing of it;
    ValueError where an archive is damaged or has no marker.
    """
    folder, name = apart(origin.source)
    if name in archives and folder.size(name) is not None:
        return _archived(origin, folder, name, tops, marker)
    source = Folder(origin.source)
    for top in ("", *tops):
        place = source / top if top else source
        if place.exists(marker):
            return Files(place)
    for name in archives:
        if source.exists(name):
            return _archived(origin, source, name, tops, marker)
    raise FileNotFoundError(f"{source.absolute} holds neither {' nor '.join([marker, *tops, *archives])}")


def _archived(origin: Origin, folder: Folder, name: str, tops: Sequence[str], marker: str) -> Tree:
    """The files of an archive: a zip where it lies, a tar unpacked."""
    where = f"{folder.absolute}/{name}"
    if name.endswith(".zip"):
        with opened(folder, name) as archive:
            members = _inside(archive, "")
        for top in ("", *tops):
            start = f"{top}/{marker}" if top else marker
            if any(one == start or one.startswith(f"{start}/") for one in members):
                return Zip(folder, name, top)
    else:
        root = unpacked(origin, folder, name, lambda path: not _hidden(path))
        for top in ("", *tops):
            place = root / top if top else root
            if place.exists(marker):
                return Files(place)
    raise ValueError(f"{where} holds no {marker}: it is another archive")


@contextmanager
def opened(folder: Folder, name: str) -> Iterator[zipfile.ZipFile]:
    """A zip, open for reading; ValueError, naming it, where it is none or is cut short."""
    with folder.reading(name) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"{folder.absolute}/{name} is damaged or no zip: {error}; fetch it again") from error
        with archive:
            yield archive


def member(archive: zipfile.ZipFile, name: str, where: str) -> bytes:
    """The bytes of a member, whose checksum is right; ValueError, naming zip and member, where it is not."""
    try:
        return archive.read(name)
    except KeyError as error:
        raise FileNotFoundError(f"{where} holds no {name}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{where}: {name} is damaged: {error}; fetch it again") from error


def _inside(archive: zipfile.ZipFile, top: str) -> list[str]:
    """The files below a folder of a zip, by names relative to it."""
    start = f"{top}/" if top else ""
    return [one.filename[len(start) :] for one in archive.infolist() if _is_file(one, start)]


def _is_file(one: zipfile.ZipInfo, start: str) -> bool:
    return not one.is_dir() and one.filename.startswith(start)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _keys(names: Sequence[str], short: bool) -> list[str]:
    return [key(name.rpartition("/")[2] if short else name) for name in names]


def _column(labels: Sequence[int]) -> NDArray[np.int64]:
    return np.asarray(labels, np.int64).reshape(-1, 1)
