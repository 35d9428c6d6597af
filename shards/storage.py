"""Folders and buckets: the one door to any URL that fsspec knows.

A name in a `Folder` is either absent or whole. Bytes go to a local file under another name first, then to their
place by a rename; an object store gets them by a single put. Nothing is ever written through an open remote file,
since closing one after an exception commits what had been written so far.
"""

import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

Method = TypeVar("Method", bound=Callable[..., Any])

# Bursts of refusals are waited out; a store that is not there is given up within a minute.
_S3_PATIENCE = {"retries": {"max_attempts": 8, "mode": "standard"}, "connect_timeout": 10, "read_timeout": 60}

# Names that `_Aside` gives to what is not yet whole.
_ASIDE = re.compile(r"\..+\.[0-9a-f]{32}")


def _reached(method: Method) -> Method:
    """What an object store's client raises, and what nobody else knows, as an OSError that names the place."""

    @wraps(method)
    def reached(*given: Any, **named: Any) -> Any:
        try:
            return method(*given, **named)
        except Exception as error:
            if not type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
                raise
            raise OSError(f"{given[0]} cannot be reached: {error}") from error

    return reached  # type: ignore[return-value]


@dataclass(frozen=True)
class Folder:
    """A folder at `url`: a path, or any URL that fsspec knows (`s3://bucket/prefix`)."""

    url: str

    @cached_property
    def place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """The file system and the path in it."""
        options = {"config_kwargs": _S3_PATIENCE} if self._s3 else {}
        # Listings are not kept: other processes write to the same place.
        return fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)

    @property
    def _s3(self) -> bool:
        return self.url.startswith(("s3://", "s3a://"))

    @property
    def local(self) -> Path | None:
        """The folder as a local path, None where it is remote."""
        files, root = self.place
        return Path(root) if isinstance(files, LocalFileSystem) else None

    @property
    def absolute(self) -> str:
        """The URL as it reads from any working directory."""
        return str(self.local) if self.local else self.url.rstrip("/")

    def __str__(self) -> str:
        return self.absolute

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.absolute}/{name}")

    def _at(self, name: str) -> str:
        return f"{self.place[1].rstrip('/')}/{name}"

    @_reached
    def exists(self, name: str) -> bool:
        """Whether `name` is there, as a file or as the start of other names."""
        return self.place[0].exists(self._at(name))

    @_reached
    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of `name` from `start` to `end`; FileNotFoundError names the whole URL."""
        try:
            data = self.place[0].cat_file(self._at(name), start=start, end=end)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.absolute}/{name} does not exist") from error
        assert isinstance(data, bytes)
        return data

    @_reached
    def write(self, name: str, data: bytes) -> None:
        """Put `data` under `name`, all or nothing, over what is there."""
        if self.local:
            with _Aside(self.local / name) as aside:
                aside.write_durably(data)
        else:
            self.place[0].pipe_file(self._at(name), data)

    @_reached
    def create(self, name: str, data: bytes) -> bool:
        """Put `data` under `name` unless it is there; of several who try, one is told True."""
        if self.local:
            with _Aside(self.local / name, exclusive=True) as aside:
                aside.write_durably(data)
            return aside.won
        try:
            self.place[0].pipe_file(self._at(name), data, mode="create")
        except (FileExistsError, OSError) as error:
            if isinstance(error, FileExistsError) or "pre-condition" in str(error).lower() or self.exists(name):
                return False
            raise
        return True

    @_reached
    def put(self, source: Path, name: str) -> None:
        """Copy the local file `source` to `name`, all or nothing."""
        if self.local:
            with _Aside(self.local / name) as aside:
                aside.copy_durably(source)
        else:
            self.place[0].put_file(str(source), self._at(name))

    @_reached
    def get(self, name: str, target: Path) -> None:
        """Copy `name` to the local file `target`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.place[0].get_file(self._at(name), str(target))

    @_reached
    def sizes(self) -> dict[str, int]:
        """Bytes of every file directly in the folder, by name; empty where there is no such folder."""
        try:
            listed = self.place[0].ls(self.place[1], detail=True)
        except FileNotFoundError:
            return {}
        # A bucket may hold an empty object for the folder itself, which is listed as a file in it.
        inside = [entry for entry in listed if entry["name"].rstrip("/") != self.place[1].rstrip("/")]
        found = {_last(entry["name"]): int(entry["size"] or 0) for entry in inside if entry["type"] == "file"}
        return {name: size for name, size in found.items() if not _ASIDE.fullmatch(name)}

    @_reached
    def size(self, name: str) -> int | None:
        """Bytes of the file `name`, None where it is not there."""
        try:
            return int(self.place[0].info(self._at(name))["size"])
        except FileNotFoundError:
            return None

    @_reached
    def folders(self) -> list[str]:
        """Names of the folders directly in this one, in order."""
        try:
            listed = self.place[0].ls(self.place[1], detail=True)
        except FileNotFoundError:
            return []
        return sorted(_last(entry["name"]) for entry in listed if entry["type"] == "directory")

    @_reached
    def remove(self, name: str) -> None:
        """Remove a file or a whole folder; nothing happens where it is not there."""
        if self.exists(name):
            self.place[0].rm(self._at(name), recursive=True)

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
            file.flush()
            os.fsync(file.fileno())

    def copy_durably(self, source: Path) -> None:
        with source.open("rb") as reader, self.aside.open("wb") as file:
            while block := reader.read(1 << 22):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

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


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def digest(path: Path) -> str:
    """The sha256 of a local file, in hexadecimal."""
    found = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
