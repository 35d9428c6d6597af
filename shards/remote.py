"""Folders of stores: object stores and web servers, by any URL that fsspec knows.

A method that is said to be one try gives what the store says now; `Remote.tried` does it until the store's faults have
passed. s3fs and fsspec's web client leave some answers unchecked (a part that is short, a removal that is refused, a
listing that fails); what is returned from here is whole.
"""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem, sync

from shards import retry
from shards.retry import Unfinished

Found = TypeVar("Found")

AT_ONCE = 32
"""Requests that a folder has in flight."""
PART = 32 << 20
"""Bytes of a part of a large file that goes to or comes from S3."""
BLOCK = 4 << 20
"""Bytes that are asked for at a time of a file that is open."""

_PARTS = 10_000  # that an upload to S3 has at most
_renewing = Lock()


def options(url: str) -> dict[str, Any]:
    """What the file system of a URL is made with, so that `retry.PATIENCE` holds."""
    patience = retry.PATIENCE
    if _in_s3(url):
        tries = {"total_max_attempts": patience.requests, "mode": "standard"}
        limits = {"connect_timeout": patience.connect, "read_timeout": patience.silence}
        return {"config_kwargs": {"retries": tries, **limits, "max_pool_connections": AT_ONCE}}
    if _in_web(url):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=patience.connect, sock_read=patience.silence)
        # Bytes as they lie there: a size is that of the file, and a range is one of it.
        plain = {"headers": {"Accept-Encoding": "identity"}, "auto_decompress": False}
        return {"client_kwargs": {"timeout": timeout, **plain}}
    return {}


def _in_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _in_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Page:
    """A part of a listing: files with their bytes, and folders, by their names in the folder that is listed."""

    files: list[tuple[str, int]]
    folders: list[str]


class Remote:
    """The folder `root` of the file system `files`, which people call `url`."""

    def __init__(self, files: Any, root: str, url: str) -> None:
        self.files, self.root, self.url = files, root.rstrip("/"), url
        self.s3, self.web = _in_s3(url), _in_web(url)
        if self.s3:
            files.retries = 1  # of s3fs's own tries, which know no limit in seconds

    def at(self, name: str) -> str:
        """The path of a name in the file system."""
        return f"{self.root}/{name}"

    def where(self, name: str) -> str:
        """The URL of a name, of the folder itself where it is empty."""
        return f"{self.url}/{name}" if name else self.url

    def tried(self, doing: str, name: str, attempt: Callable[[], Found]) -> Found:
        """What `attempt`, which concerns `name`, gives in the end; OSError, PermissionError or FileNotFoundError with
        the URL of `name` otherwise. `doing` is read, write, list or remove."""
        used: list[Any] = []

        def explained() -> Found:
            used[:] = [self.files.s3] if self.s3 else []
            try:
                return attempt()
            except Exception as error:
                if self.s3 and name and retry.unexplained(error):
                    self._explain(name, error)
                raise

        return retry.persist(explained, self.where(name), doing, lambda: self._renew(used[0]))

    def _explain(self, name: str, error: Exception) -> None:
        """Raise what a request whose answer has a body says of a refusal that came without one."""
        try:
            self.files.cat_file(self.at(name), start=0, end=1)
        except Exception as other:
            if not retry.absent(other) and not retry.beyond(other):
                raise
        raise Unfinished(f"a refusal that has passed: {error}") from None

    def _renew(self, used: Any) -> None:
        """Read the credentials again, once for all who have used the client `used`."""
        with _renewing:
            if self.files.s3 is used:
                self.files.connect(refresh=True)

    # Of one try each.

    def info(self, name: str) -> dict[str, Any] | None:
        """What fsspec knows of a file or folder, None where it is not there."""
        try:
            return self.files.info(self.at(name))
        except FileNotFoundError as error:
            if not retry.absent(error):
                raise
            return None

    def length(self, name: str) -> int | None:
        """Bytes of a file that must be there, None where the store does not tell."""
        info = self.info(name)
        if info is None:
            raise FileNotFoundError(name)
        return info["size"]

    def whole(self, name: str) -> bytes:
        """A file's bytes."""
        # One request, whose length the client checks: several would mix what was there before and after a write.
        single = {"max_concurrency": 1} if self.s3 else {}
        return self.files.cat_file(self.at(name), **single)

    def slice(self, name: str, start: int | None, end: int | None) -> bytes:
        """`whole(name)[start:end]`, without fetching the rest."""
        first, size = start or 0, None
        if first < 0 or end is None or end < 0:
            size = self.length(name)
            if size is None:
                return self.whole(name)[start:end]
            first, end, _ = slice(start, end).indices(size)
        if end <= first:
            return b""
        data = self._part(name, first, end)
        if len(data) != end - first:
            size = self.length(name) if size is None else size
            _check(len(data), None if size is None else max(0, min(end, size) - first))
        return data

    def _part(self, name: str, start: int, end: int) -> bytes:
        """What the store gives for a range that is not empty."""
        try:
            if not self.web:
                return self.files.cat_file(self.at(name), start=start, end=end)
            found = sync(self.files.loop, _part_of_web, self.files, self.at(name), start, end)
        except Exception as error:
            if retry.beyond(error):
                return b""
            raise
        if found is None:
            raise Undivided(f"the server of {self.where(name)} gives no parts of files: fetch it first")
        return found

    def create(self, name: str, data: bytes, maker: str, doubtful: bool) -> bool:
        """Put a file that is not there; whether `maker`, a word of nobody else's, is the one who did, perhaps before.

        S3 keeps the word. Elsewhere a file that is there with equal bytes is taken for one's own if `doubtful`.
        """
        word = {"Metadata": {"maker": maker}} if self.s3 else {}
        try:
            self.send(len(data), "pipe_file", self.at(name), data, mode="create", **word)
        except Exception as error:
            if not retry.taken(error):
                raise
            return self._maker(name) == maker if self.s3 else doubtful and self.whole(name) == data
        return True

    def _maker(self, name: str) -> str | None:
        try:
            found = self.files.call_s3("head_object", Bucket=self._bucket, Key=self._key(name))
            return found["Metadata"].get("maker")
        except FileNotFoundError as error:
            if not retry.absent(error):
                raise
            return None

    def put(self, source: Path, name: str) -> None:
        """Copy a local file; Unfinished where another number of bytes is there then."""
        size = source.stat().st_size
        parts = {"chunksize": max(PART, math.ceil(size / _PARTS))} if self.s3 else {}
        self.send(size, "put_file", str(source), self.at(name), **parts)
        info = self.info(name)
        _check(info["size"] if info else None, size)

    def get(self, name: str, target: Path) -> None:
        """Copy to a local file; it is removed where it would have other bytes or fewer."""
        parts = {"chunksize": PART} if self.s3 else {}
        size = self.length(name)
        try:
            self.files.get_file(self.at(name), str(target), **parts)
            _check(target.stat().st_size, size)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def send(self, size: int, method: str, *given: Any, **named: Any) -> None:
        """Upload `size` bytes by a method of the file system, in limited time.

        The clients' own limits do not hold while a server should be taking bytes.
        """
        if isinstance(self.files, AsyncFileSystem):
            limit = retry.PATIENCE.upload(size)
            sync(self.files.loop, getattr(self.files, f"_{method}"), *given, timeout=limit, **named)
        else:
            getattr(self.files, method)(*given, **named)

    # Of many requests, each of which is tried until faults have passed.

    def listed(self) -> Page:
        """What is directly in the folder; empty where there is no such folder."""
        if self.s3:
            pages = list(self._pages("/"))
            return Page([file for page in pages for file in page.files], [f for page in pages for f in page.folders])
        try:
            found = self.tried("list", "", lambda: self.files.ls(self.root, detail=True))
        except FileNotFoundError:
            return Page([], [])
        # A store may hold an empty object for the folder itself, which is listed as a file in it.
        entries = [(last(entry["name"]), entry) for entry in found if entry["name"].rstrip("/") != self.root]
        files = [(name, int(entry["size"] or 0)) for name, entry in entries if entry["type"] == "file"]
        return Page(files, [name for name, entry in entries if entry["type"] == "directory"])

    def below(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of every file in the folder and below; of S3 a page is held at a time."""
        if self.s3:
            for page in self._pages(""):
                yield from (found for found in page.files if not found[0].endswith("/"))
            return
        found = self.tried("list", "", lambda: self.files.find(self.root, detail=True))
        for path, entry in found.items():
            name = path[len(self.root) + 1 :]
            size = entry["size"]
            if size is None:
                size = self.tried("read", name, lambda name=name: self.length(name))
            if name and size is not None:
                yield name, int(size)

    def remove(self, name: str) -> None:
        """Remove a file or all that is below a name."""
        info = self.tried("read", name, lambda: self.info(name))
        if info is None:
            return
        if not self.s3:
            self.tried("remove", name, lambda: self._remove_there(name))
        elif info["type"] == "file":
            self._delete(name, [self._key(name)])
        else:
            self._remove_folder(name)

    def _remove_there(self, name: str) -> None:
        if self.info(name) is not None:
            self.files.rm(self.at(name), recursive=True)

    def _remove_folder(self, name: str) -> None:
        start = f"{self._key(name)}/"
        below = [file for page in self._pages("", name) for file, _ in page.files]
        self._delete(name, [start + file for file in below])
        if self.tried("read", name, lambda: self.info(name)) is not None:
            # Some servers keep folders, as objects whose names end in a slash; the innermost go first.
            inner = {above for file in below for above in _above(file)}
            self._delete(name, [start + folder for folder in sorted(inner, key=len, reverse=True)] + [start])

    def _delete(self, name: str, keys: list[str]) -> None:
        """Delete objects; an error of a single one, which s3fs does not look at, is an error."""
        for first in range(0, len(keys), 1000):  # as many as a request may have
            objects = [{"Key": key} for key in keys[first : first + 1000]]
            self.tried("remove", name, lambda objects=objects: self._delete_once(objects))

    def _delete_once(self, objects: list[dict[str, str]]) -> None:
        from botocore.exceptions import ClientError

        wanted = {"Bucket": self._bucket, "Delete": {"Objects": objects, "Quiet": True}}
        for error in self.files.call_s3("delete_objects", **wanted).get("Errors", ()):
            raise ClientError({"Error": error}, "DeleteObjects")

    @property
    def _bucket(self) -> str:
        return self.files.split_path(self.root)[0]

    def _key(self, name: str) -> str:
        return self.files.split_path(self.at(name))[1]

    def _pages(self, delimiter: str, name: str = "") -> Iterator[Page]:
        """A folder in S3, a request at a time; all names below it where the delimiter is empty."""
        bucket, key, _ = self.files.split_path(self.at(name) if name else self.root)
        wanted = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "Delimiter": delimiter}
        while True:
            answer = self.tried("list", "", lambda: self.files.call_s3("list_objects_v2", **wanted))
            yield _page(answer, len(wanted["Prefix"]))
            if not answer.get("IsTruncated"):
                return
            wanted["ContinuationToken"] = answer["NextContinuationToken"]


class Undivided(OSError):
    """A web server gives its files whole or not at all."""


class Opened(io.RawIOBase):
    """A file of `size` bytes that `read(start, end)` gives parts of."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, where: str) -> None:
        self.part, self.size, self.where, self.position = read, size, where, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError(f"negative position {start + offset} in {self.where}")
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._next(self.size)

    def _next(self, size: int) -> bytes:
        end = min(self.position + size, self.size)
        if end <= self.position:
            return b""
        data = self.part(self.position, end)
        if len(data) != end - self.position:
            raise OSError(f"{self.where} has become shorter while it was read")
        self.position = end
        return data


def last(path: str) -> str:
    """The part of a path behind its last slash that is not at its end."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def _above(path: str) -> Iterator[str]:
    """The folders that a path leads through, with a slash behind each."""
    parts = path.split("/")[:-1]
    return ("/".join(parts[:depth]) + "/" for depth in range(1, len(parts) + 1))


def _page(answer: dict[str, Any], skip: int) -> Page:
    """A page of S3's; the object for the folder itself, which some tools make, is no file in it."""
    files = [(entry["Key"][skip:], int(entry["Size"])) for entry in answer.get("Contents", ())]
    folders = [entry["Prefix"][skip:].rstrip("/") for entry in answer.get("CommonPrefixes", ())]
    return Page([found for found in files if found[0]], folders)


async def _part_of_web(files: Any, url: str, start: int, end: int) -> bytes | None:
    """What a web server gives for a range; None where it begins to give the whole file, which is not waited for.

    fsspec's own method waits, and takes a file that is not longer than the range for the range.
    """
    session = await files.set_session()
    async with session.get(files.encode_url(url), headers={"Range": f"bytes={start}-{end - 1}"}) as answer:
        answer.raise_for_status()
        whole = start == 0 and answer.content_length is not None and answer.content_length <= end
        return await answer.read() if answer.status == 206 or whole else None


def _check(found: int | None, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise Unfinished(f"{found} of {expected} bytes")
