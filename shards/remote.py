"""Folders of stores: object stores and web servers, by any URL that fsspec knows.

A method that is said to be one try gives what the store says now; `Remote.tried` does it until the store's faults have
passed. s3fs and fsspec's web client leave some answers unchecked (a part that is short, a removal that is refused, a
listing that fails); what is returned from here is whole.

Of S3, whole files come by obstore, which takes less of the processor for a byte than s3fs does. How it is to ask
for a file is not worked out again: it repeats a request of botocore's that has been answered.
"""

import io
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from fsspec.asyn import AsyncFileSystem, sync

from shards import retry
from shards.retry import Unfinished

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest
    from obstore import GetOptions
    from obstore.store import ClientConfig, S3Credential, S3Store

Found = TypeVar("Found")

AT_ONCE = 32
"""Requests that a folder has in flight."""
PART = 32 << 20
"""Bytes of a part of a large file that goes to S3."""
STREAMED = 64 << 20
"""Bytes of a file that comes from S3 by one request; of a larger one `RANGES` parts come at a time."""
RANGE = 16 << 20
"""Bytes of a part of a large file that comes from S3, and is in memory meanwhile."""
RANGES = 4
PIECE = 1 << 20
"""Bytes that go to the disk and into the digest at a time."""
BLOCK = 4 << 20
"""Bytes that are asked for at a time of a file that is open."""

_PARTS = 10_000  # that an upload to S3 has at most
_REPLACED = 5  # how often a file may be replaced under its reader
_LONGEST = timedelta(days=1)  # obstore limits a whole answer; what counts is that something comes (`Patience.silence`)
_SIGNED = re.compile(r"/\d{8}/([^/,]+)/s3/aws4_request")
_SAID = re.compile(r"<Code>([^<]+)</Code>(?:\s*<Message>([^<]*)</Message>)?")
_STATUS = re.compile(r"status code: (\d{3})")

_renewing = Lock()
_sent: ContextVar[list["AWSPreparedRequest"]] = ContextVar("_sent")


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
        self._stores: dict[Way, S3Store] = {}
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

    def send(self, size: int, method: str, *given: Any, **named: Any) -> None:
        """Upload `size` bytes by a method of the file system, in limited time.

        The clients' own limits do not hold while a server should be taking bytes.
        """
        if isinstance(self.files, AsyncFileSystem):
            limit = retry.PATIENCE.upload(size)
            sync(self.files.loop, getattr(self.files, f"_{method}"), *given, timeout=limit, **named)
        else:
            getattr(self.files, method)(*given, **named)

    def _copied(self, name: str, arrived: "Arrived") -> None:
        """Copy a file to `arrived` from its beginning, whatever is there."""
        arrived.restart()
        size = self.length(name)
        if self.web:
            self.files.get_file(self.at(name), arrived)
        else:
            with self.files.open(self.at(name), "rb", block_size=RANGE) as file:
                while block := file.read(BLOCK):
                    arrived.write(block)
        _check(arrived.tell(), size)

    def _source(self, name: str) -> "Source | None":
        """How obstore is asked for a file in S3 that must be there; None where only s3fs can be."""
        bucket, key, version = self.files.split_path(self.at(name))
        told: Any = sync(self.files.loop, _asked, self.files, bucket, self.at(name))
        info, sent = told
        if info["type"] != "file":
            raise FileNotFoundError(name)
        way = None if version or not sent else _way(sent[-1], bucket, key)
        tag = info["ETag"] or ""
        # A weak tag is never taken for a match (RFC 9110, section 13.1.1).
        return way and Source(way, key, info["size"], tag if tag.startswith('"') else None)

    def _open(self, source: "Source", start: int, end: int) -> Any:
        """obstore's answer for a range that is not empty."""
        import obstore

        if (store := self._stores.get(source.way)) is None:
            store = self._stores[source.way] = _store(self.files, source.way)
        options: GetOptions = {"range": (start, end)}
        if source.tag:
            options["if_match"] = source.tag
        return obstore.get(store, source.key, options=options)

    def _range(self, source: "Source", start: int, end: int) -> Any:
        """The bytes of a range, in a buffer of obstore's."""
        with _translating():
            data = self._open(source, start, end).bytes()
        _check(len(data), end - start)
        return data

    # Of many requests, each of which is tried until faults have passed.

    def get(self, name: str, target: Path, *, durable: bool) -> str:
        """Copy a file to a local one, on the disk at return if `durable`, which is removed unless it is whole; the
        sha256 of its bytes in hexadecimal."""
        with arriving(target, durable) as arrived:
            if not (self.s3 and self._get_by_obstore(name, arrived)):
                self.tried("read", name, lambda: self._copied(name, arrived))
        return arrived.digest.hexdigest()

    def _get_by_obstore(self, name: str, arrived: "Arrived") -> bool:
        """Copy a file from S3; False where s3fs has to, also because the file's tag is never the same twice."""
        for _ in range(_REPLACED if _home() == os.getpid() else 0):
            source = self.tried("read", name, lambda: self._source(name))
            if source is None:
                return False
            arrived.restart()
            pieces = self._streamed if source.size <= STREAMED else self._in_ranges
            try:
                for piece in pieces(name, source):
                    arrived.write(piece)
                return True
            except Replaced:
                continue
        return False

    def _streamed(self, name: str, source: "Source") -> Iterator[bytes]:
        """The bytes of a file, of a request that goes on where a fault has ended the one before."""
        stream: Iterator[bytes] | None = None
        position = 0

        def piece() -> bytes:
            nonlocal stream
            going, stream = stream, None
            with _translating():
                going = going or iter(self._open(source, position, source.size).stream(PIECE))
                found = next(going, b"")
            if not found:
                raise Unfinished(f"{position} of {source.size} bytes")
            stream = going
            return found

        while position < source.size:
            found = self.tried("read", name, piece)
            position += len(found)
            yield found

    def _in_ranges(self, name: str, source: "Source") -> Iterator[Any]:
        """The bytes of a file, of several requests at a time."""

        def part(start: int) -> Any:
            end = min(start + RANGE, source.size)
            return self.tried("read", name, lambda: self._range(source, start, end))

        coming: deque[Future[Any]] = deque()
        with ThreadPoolExecutor(RANGES) as pool:
            for start in range(0, source.size, RANGE):
                coming.append(pool.submit(part, start))
                if len(coming) == RANGES:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

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


@dataclass(frozen=True)
class Way:
    """How a bucket of S3 is asked for its objects, as botocore has found out."""

    bucket: str
    endpoint: str
    """What stands before a key in a URL, without the slash between."""
    region: str
    signed: bool
    payer: bool
    """Whether who asks pays."""


@dataclass(frozen=True)
class Source:
    """An object of S3: its bytes, and the tag that it keeps as long as it is not replaced, where it has one."""

    way: Way
    key: str
    size: int
    tag: str | None


class Replaced(Exception):
    """An object is another one than when it was first asked for."""


class Arrived:
    """A local file that is being written, and the sha256 of its bytes so far.

    It has what fsspec takes for a file (`read` is not used).
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, sha256()
        self.tell, self.close, self.read = file.tell, file.close, file.read

    def write(self, data: Any) -> None:
        self.digest.update(data)
        self.file.write(data)

    def restart(self) -> None:
        """Drop what has been written."""
        self.file.seek(0)
        self.file.truncate()
        self.digest = sha256()


@contextmanager
def arriving(target: Path, durable: bool) -> Iterator[Arrived]:
    """A local file to write, on the disk in the end if `durable`; removed after an exception.

    OSError names it where the disk takes no more.
    """
    try:
        with target.open("wb") as file:
            yield Arrived(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
    except BaseException as error:
        target.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(target)
        raise


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


@cache
def _home() -> int:
    """The process that obstore's threads are in: one that is forked from it later has none, and would wait for ever."""
    return os.getpid()


def _note(request: "AWSPreparedRequest", **_: Any) -> None:
    if (sent := _sent.get(None)) is not None:
        sent.append(request)


async def _asked(files: Any, bucket: str, path: str) -> tuple[dict[str, Any], list["AWSPreparedRequest"]]:
    """What s3fs knows of a file, and the requests that have told it, of which the last was answered."""
    client = await files.get_s3(bucket)
    client.meta.events.register("before-send.s3.HeadObject", _note, unique_id=__name__)
    sent: list[AWSPreparedRequest] = []
    _sent.set(sent)
    return await files._info(path), sent


def _way(request: "AWSPreparedRequest", bucket: str, key: str) -> Way | None:
    """How botocore asked for an object; None where obstore cannot: by other signatures, for an object with a key of
    its own, or for one whose name obstore changes."""
    parts, signature = urlsplit(request.url), str(request.headers.get("Authorization") or "")
    path, signed = unquote(parts.path), _SIGNED.search(signature)
    plain = path.endswith(f"/{key}") and all(part not in ("", ".", "..") for part in key.split("/"))
    locked = "x-amz-server-side-encryption-customer-algorithm" in request.headers
    if not plain or locked or parts.query or bool(signature) != bool(signed):
        return None
    return Way(
        bucket,
        endpoint=f"{parts.scheme}://{parts.netloc}{path.removesuffix(f'/{key}')}",
        region=signed[1] if signed else "us-east-1",
        signed=bool(signed),
        payer="x-amz-request-payer" in request.headers,
    )


def _store(files: Any, way: Way) -> "S3Store":
    """obstore's client for a bucket, with the limits of `retry.PATIENCE`."""
    from obstore.store import S3Store

    patience = retry.PATIENCE
    limits: ClientConfig = {
        "connect_timeout": timedelta(seconds=patience.connect),
        "read_timeout": timedelta(seconds=patience.silence),
        "timeout": _LONGEST,
        "allow_http": True,
    }

    def keys() -> Any:
        return sync(files.loop, _credentials, files, way.bucket)

    verify = files.client_kwargs.get("verify", files.session.get_config_variable("ca_bundle"))
    if verify is False:
        limits["allow_invalid_certificates"] = True
    elif isinstance(verify, str):
        limits["root_certificate"] = Path(verify).read_bytes()
    return S3Store(
        way.bucket,
        # Each is said, since the environment would be asked for what is not. With this style a URL is taken as it is.
        config={
            "aws_endpoint_url_s3": way.endpoint,
            "virtual_hosted_style_request": True,
            "region": way.region,
            "skip_signature": not way.signed,
            "request_payer": way.payer,
            "s3_express": False,
        },
        client_options=limits,
        retry_config={
            "max_retries": patience.requests - 1,
            "retry_timeout": timedelta(seconds=patience.requests * (patience.connect + patience.silence)),
        },
        credential_provider=keys if way.signed else None,
    )


async def _credentials(files: Any, bucket: str) -> "S3Credential":
    """What s3fs signs with now; to be asked for again before each request, as botocore knows when to renew it."""
    client = await files.get_s3(bucket)
    found = await client._get_credentials().get_frozen_credentials()
    return {
        "access_key_id": found.access_key,
        "secret_access_key": found.secret_key,
        "token": found.token,
        "expires_at": datetime.now(UTC),
    }


@contextmanager
def _translating() -> Iterator[None]:
    """Errors of obstore's as botocore would raise them; one that tells of no answer can pass."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise _translated(str(error).split("\n\nDebug source:")[0]) from error


def _translated(said: str) -> Exception:
    from botocore.exceptions import ClientError

    answer, status = _SAID.search(said), _STATUS.search(said)
    code, message = answer.groups() if answer else (status[1] if status else "", None)
    if code in ("PreconditionFailed", "412"):
        return Replaced()
    if not code:
        return Unfinished(said)
    return ClientError({"Error": {"Code": code, "Message": message or said}}, "GetObject")
