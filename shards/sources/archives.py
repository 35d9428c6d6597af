"""Archives of small data sets, tars plain or compressed by gzip: read from front to back, or unpacked once.

What is damaged, cut short or leads out of its archive is refused, by name.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import PurePosixPath
from tarfile import (
    EOFHeaderError,  # type: ignore[attr-defined]  # typeshed does not know it
    HeaderError,
    ReadError,
    TarError,
    TarFile,
    TarInfo,
)
from typing import IO, Self, cast

from shards.sources import Origin
from shards.storage import Folder

_BLOCK = 1 << 22
_AT_ONCE = 16
_GZIP = b"\x1f\x8b"


def unpacked(origin: Origin, folder: Folder, archive: str, wanted: Callable[[str], bool]) -> Folder:
    """The folder of `origin.downloads` that has the files of an archive whose names are `wanted`, each whole.

    It is unpacked unless a record beside the folder, written last, says that this archive of this size has been. Errors
    are those of `members`.
    """
    stem = archive.partition(".")[0]
    target, record = origin.downloads / stem, f"{stem}.json"
    facts = {"archive": f"{folder.absolute}/{archive}", "bytes": folder.size(archive)}
    if _recorded(origin.downloads, record) == facts:
        return target
    origin.say(f"unpacking {facts['archive']} to {target.absolute}")
    with closing(members(folder, archive)) as found, ThreadPoolExecutor(_AT_ONCE) as pool:
        chosen = (member for member in found if wanted(member[0]))
        while some := list(islice(chosen, 4 * _AT_ONCE)):
            # A put takes long to be answered, not long to be done: by many at a time.
            list(pool.map(lambda member: target.write(*member), some))
    origin.downloads.write(record, json.dumps(facts).encode())
    return target


def _recorded(downloads: Folder, record: str) -> object:
    try:
        return json.loads(downloads.read(record))
    except (FileNotFoundError, ValueError):
        return None


def members(folder: Folder, archive: str) -> Generator[tuple[str, bytes], None, None]:
    """Path and bytes of each file in a tar, plain or compressed by gzip, which is read once, from front to back.

    ValueError, naming the archive, where it is damaged or cut short (what comes before has been given by then), or
    where a member is neither file nor folder or its path leads out of the archive; FileNotFoundError where it is not
    there.
    """
    where = f"{folder.absolute}/{archive}"
    stream = io.BufferedReader(_Forward(folder, archive), _BLOCK)
    opened = gzip.GzipFile(fileobj=stream) if stream.peek(2)[:2] == _GZIP else stream
    try:
        with TarFile.open(fileobj=cast(IO[bytes], opened), mode="r|", tarinfo=_Strict) as tar:
            for member in tar:
                path = _inside(member, where)
                if member.isfile():
                    content = tar.extractfile(member)
                    assert content, "a file has content"
                    yield path, content.read()
        # The checksum of gzip stands behind the last block.
        while opened.read(_BLOCK):
            pass
    except (TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{where} is damaged: {error}; fetch it again") from error


def _inside(member: TarInfo, where: str) -> str:
    """The path of a file or folder, without `.` in it."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
        raise ValueError(f"{where} has a member that is no file inside it: {member.name!r} at byte {member.offset:,}")
    return str(path)


class _Strict(TarInfo):
    """A header which, where it is damaged or missing, is an error and not the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(f"no header at byte {tarfile.offset:,} ({error})") from error


class _Forward(io.RawIOBase):
    """A file of a folder, from front to back, each piece a request of its own that can be tried again."""

    def __init__(self, folder: Folder, name: str) -> None:
        size = folder.size(name)
        if size is None:
            raise FileNotFoundError(f"{folder.absolute}/{name} does not exist")
        self._folder, self._name, self._size, self._at = folder, name, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._at + len(buffer), self._size)
        if end == self._at:
            return 0
        data = self._folder.read(self._name, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def apart(source: str) -> tuple[Folder, str]:
    """The folder of a file's path or URL, and its name in there."""
    folder, slash, name = source.rpartition("/")
    return Folder(folder or slash or "."), name
