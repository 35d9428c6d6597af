"""Folders and buckets: the one door to any URL that fsspec knows.

A name in a `Folder` is either absent or whole. Bytes go to a local file under another name first, then to their
place by a rename; an object store gets them by a single put. Nothing is ever written through an open remote file,
since closing one after an exception commits what had been written so far.

A store's faults that pass (`shards.retry`) cost time and nothing else: what is told and returned is as without them.
"""

import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from shards import remote
from shards.remote import Remote, Undivided

# Names that `_Aside` gives to what is not yet whole.
_ASIDE = re.compile(r"\..+\.[0-9a-f]{32}")


@dataclass(frozen=True)
class Folder:
    """A folder at `url`: a path, or any URL that fsspec knows (`s3://bucket/prefix`).

    Of a remote one every method raises FileNotFoundError where the bucket is not there, PermissionError where the
    credentials are wrong or a right is lacking, and OSError where the store does not answer for as long as
    `shards.retry.PATIENCE` says; each is one line with the URL.
    """

    url: str

    @cached_property
    def place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """The file system and the path in it."""
        # Listings are not kept: other processes write to the same place.
        try:
            return fsspec.core.url_to_fs(self.url, use_listings_cache=False, **remote.options(self.url))
        except ImportError as error:
            raise ValueError(f"{self.url} needs a driver that is not installed: {error}") from error

    @property
    def local(self) -> Path | None:
        """The folder as a local path, None where it is remote."""
        files, root = self.place
        return Path(root) if isinstance(files, LocalFileSystem) else None

    @cached_property
    def _remote(self) -> Remote:
        return Remote(*self.place, self.absolute)

    @property
    def absolute(self) -> str:
        """The URL as it reads from any working directory."""
        return str(self.local) if self.local else self.url.rstrip("/")

    def __str__(self) -> str:
        return self.absolute

    def __reduce__(self) -> tuple[type["Folder"], tuple[str]]:
        # Another process has another working directory, and makes connections of its own.
        return Folder, (self.absolute,)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.absolute}/{name}")

    def exists(self, name: str) -> bool:
        """Whether `name` is there, as a file or as the start of other names."""
        if self.local:
            return (self.local / name).exists()
        return self._remote.tried("read", name, lambda: self._remote.info(name)) is not None

    def size(self, name: str) -> int | None:
        """Bytes of the file `name`, None where it is not there; OSError where a web server does not tell."""
        if self.local:
            path = self.local / name
            return path.stat().st_size if path.is_file() else None
        info = self._remote.tried("read", name, lambda: self._remote.info(name))
        if info is None or info["type"] != "file":
            return None
        if info["size"] is None:
            raise OSError(f"the server does not tell the size of {self.absolute}/{name}")
        return int(info["size"])

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of `name` from `start` to `end`, as a slice has them; FileNotFoundError names the whole URL."""
        if not self.local:
            whole = start is None and end is None
            store = self._remote
            return store.tried("read", name, lambda: store.whole(name) if whole else store.slice(name, start, end))
        try:
            return cast(bytes, self.place[0].cat_file(str(self.local / name), start=start, end=end))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.absolute}/{name} does not exist") from error

    def ranges(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes of each (name, offset, size), in this order; a size of -1 means all that follow.

        Of a remote folder `remote.AT_ONCE` are fetched at a time. OSError names file and offset where the file ends
        before the range does.
        """
        if self.local:
            found = [data for name, group in groupby(requests, _name) for data in self._local_ranges(name, group)]
        else:
            with ThreadPoolExecutor(remote.AT_ONCE) as pool:
                found = list(pool.map(self._remote_range, requests))
        for (name, offset, size), data in zip(requests, found, strict=True):
            if len(data) != size >= 0:
                there = f"{len(data):,} of {size:,} bytes at {offset:,} are there"
                raise OSError(f"{self.absolute}/{name} ends too soon: {there}")
        return found

    def _local_ranges(self, name: str, requests: Iterator[tuple[str, int, int]]) -> Iterator[bytes]:
        assert self.local
        with (self.local / name).open("rb", buffering=0) as file:
            for _, offset, size in requests:
                yield _pread(file.fileno(), offset, size)

    def _remote_range(self, request: tuple[str, int, int]) -> bytes:
        name, offset, size = request
        return self.read(name, offset or None, None if size < 0 else offset + size)

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """The file `name`, open for reading at any position; FileNotFoundError names the whole URL.

        Where a web server gives its files whole or not at all, it is fetched into a temporary file first.
        """
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self.absolute}/{name} does not exist")
        if self.local:
            with (self.local / name).open("rb") as file:
                yield file
        elif self._divided(name):
            opened = remote.Opened(lambda start, end: self.read(name, start, end), size, f"{self.absolute}/{name}")
            with BufferedReader(opened, remote.BLOCK) as file:
                yield cast(BinaryIO, file)
        else:
            with tempfile.TemporaryDirectory() as folder:
                self.get(name, Path(folder) / "file")
                with (Path(folder) / "file").open("rb") as file:
                    yield file

    def _divided(self, name: str) -> bool:
        try:
            return not self._remote.web or self.read(name, 1, 2) is not None
        except Undivided:
            return False

    def write(self, name: str, data: bytes) -> None:
        """Put `data` under `name`, all or nothing, over what is there."""
        if self.local:
            with _Aside(self.local / name) as aside:
                aside.write_durably(data)
        else:
            store = self._remote
            store.tried("write", name, lambda: store.send(len(data), "pipe_file", store.at(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Put `data` under `name` unless it is there; of several who try, one is told True.

        In S3 this holds whatever is written and however often an answer is lost, as the object keeps a word of who
        made it. In other stores, after a lost answer, a file with equal bytes is taken for one's own: there, who must
        be the only one writes bytes that nobody else writes.
        """
        if self.local:
            with _Aside(self.local / name, exclusive=True) as aside:
                aside.write_durably(data)
            return aside.won
        store, maker, tries = self._remote, uuid.uuid4().hex, iter(range(1 << 30))
        return store.tried("write", name, lambda: store.create(name, data, maker, doubtful=next(tries) > 0))

    def put(self, source: Path, name: str) -> None:
        """Copy the local file `source` to `name`, all or nothing."""
        if self.local:
            with _Aside(self.local / name) as aside:
                aside.copy_durably(source)
        else:
            source.stat()  # that it is missing is not a fault of the store
            self._remote.tried("write", name, lambda: self._remote.put(source, name))

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """The path of a local file to write; when all of it is on the disk it becomes `name`, over what is there.

        After an exception nothing has changed.
        """
        if self.local:
            with _Aside(self.local / name) as aside:
                yield aside.aside
                _sync(aside.aside)
        else:
            with tempfile.TemporaryDirectory() as folder:
                made = Path(folder) / remote.last(name)
                yield made
                self.put(made, name)

    def get(self, name: str, target: Path) -> None:
        """Copy `name` to the local file `target`; a remote file that cannot be had whole leaves none."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.local:
            self.place[0].get_file(str(self.local / name), str(target))
        else:
            self._remote.get(name, target, durable=False)

    def fetch(self, name: str, target: Path) -> str:
        """Copy `name` to the local file `target`, which is on the disk then; the sha256 of its bytes in hexadecimal.

        A file that cannot be had whole leaves none. FileNotFoundError names the whole URL.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.local:
            return self._remote.get(name, target, durable=True)
        try:
            with remote.arriving(target, durable=True) as arrived, (self.local / name).open("rb") as file:
                while block := file.read(remote.PIECE):
                    arrived.write(block)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.absolute}/{name} does not exist") from error
        return arrived.digest.hexdigest()

    def sizes(self) -> dict[str, int]:
        """Bytes of every file directly in the folder, by name; empty where there is no such folder."""
        if self.local:
            entries = os.scandir(self.local) if self.local.is_dir() else ()
            found = ((entry.name, _size(entry)) for entry in entries)
        else:
            found = self._remote.listed().files
        return {name: size for name, size in found if size is not None}

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, in order."""
        if self.local:
            return sorted(path.name for path in self.local.iterdir() if path.is_dir()) if self.local.is_dir() else []
        return sorted(self._remote.listed().folders)

    def find(self) -> Iterator[tuple[str, int]]:
        """Name, relative to the folder, and bytes of every file in it and below, in no promised order.

        Links to folders are followed. A listing of S3 is fetched while it is used, and never held as a whole.
        """
        return _walk(self.local, "", frozenset()) if self.local else self._remote.below()

    def remove(self, name: str) -> None:
        """Remove a file or a whole folder; nothing happens where it is not there."""
        if not self.local:
            self._remote.remove(name)
        elif self.exists(name):
            self.place[0].rm(str(self.local / name), recursive=True)

    def sweep(self) -> None:
        """Remove the unfinished files of writers that were killed; only for who knows that nobody writes here now."""
        for path in self.local.glob(".*") if self.local else ():
            if _ASIDE.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Raise OSError, naming the folder, unless a file can be written here."""
        name = f".write-test-{uuid.uuid4().hex}"
        try:
            self.write(name, b"")
            self.remove(name)
        except OSError as error:
            raise OSError(f"cannot write to {self.absolute}: {error.strerror or error}") from error


class _Aside:
    """A file under another name in the same folder, which takes its name when all of it is on the disk."""

    def __init__(self, target: Path, *, exclusive: bool = False) -> None:
        self.target, self.exclusive, self.won = target, exclusive, False
        self.aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")

    def __enter__(self) -> "_Aside":
        self.target.parent.mkdir(parents=True, exist_ok=True)
        return self

    def write_durably(self, data: bytes) -> None:
        with self.aside.open("wb") as file:
            file.write(data)
        _sync(self.aside)

    def copy_durably(self, source: Path) -> None:
        with source.open("rb") as reader, self.aside.open("wb") as file:
            while block := reader.read(1 << 22):
                file.write(block)
        _sync(self.aside)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None and self.exclusive:
                os.link(self.aside, self.target)
                self.won = True
            elif error is None:
                os.replace(self.aside, self.target)
        except FileExistsError:
            pass
        finally:
            self.aside.unlink(missing_ok=True)


def _name(request: tuple[str, int, int]) -> str:
    return request[0]


def _sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, all that follow if it is -1, fewer where the file ends."""
    if size < 0:
        size = max(0, os.fstat(descriptor).st_size - offset)
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more  # one call gives 2 GiB at most
    return data


def _size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of what is a file; None also of one that is not yet whole, or is gone by now."""
    if not entry.is_file() or _ASIDE.fullmatch(entry.name):
        return None
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return None


def _walk(folder: Path, above: str, way: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Files below a local folder; `way` holds the folders that lead here, where a link to one of them ends."""
    try:
        status, entries = folder.stat(), list(os.scandir(folder))
    except FileNotFoundError:
        return
    here = (status.st_dev, status.st_ino)
    for entry in entries if here not in way else ():
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{above}{entry.name}/", way | {here})
        elif (size := _size(entry)) is not None:
            yield above + entry.name, size


def digest(path: Path) -> str:
    """The sha256 of a local file, in hexadecimal."""
    found = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
