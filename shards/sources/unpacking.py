"""Compressed tars: unpacked, in one pass, into plain tars, as they cannot be entered in the middle.

The source is read from front to back, once; a record, written last, says that all of it is unpacked. What comes before
a fault can be kept, but nothing of a source whose checksum is wrong.
"""

import bz2
import gzip
import json
import lzma
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock

from shards.sources import Origin, is_picture
from shards.sources.members import ZEROS, Broken, Member, complain, is_tar, padded, walk
from shards.storage import Folder

OPENERS: Mapping[str, Callable[[Any], Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
}
"""What decompresses a file, by the end of its name."""

RECORD = "unpacked.json"
"""Says, once all of a compressed tar is unpacked, what it held."""
_BEGUN = "source.json"
_BAD_BZIP2 = "Invalid data stream"


class Unpacked(NamedTuple):
    """What was made of a compressed tar."""

    folder: Folder
    tars: dict[str, int]
    """Its class tars and their sizes in bytes."""
    pictures: str
    """The tar of its pictures, where it has no class tars; else empty."""


class _Spoilt(ValueError):
    """What was unpacked may differ anywhere from what had been packed."""


class _Unwanted(Exception):
    """What was being made is not to be kept."""


class _Stream:
    """Reads forwards what a compressed file holds, and knows how far it came."""

    def __init__(self, plain: Any) -> None:
        self.plain, self.position = plain, 0

    def __call__(self, offset: int, size: int) -> bytes:
        for _ in self.pieces(offset - self.position):
            pass
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, or as many as there are; `Broken` where they cannot be decompressed."""
        while size > 0 and (piece := self._piece(min(size, 1 << 20))):
            self.position += len(piece)
            size -= len(piece)
            yield piece

    def _piece(self, size: int) -> bytes:
        try:
            return self.plain.read1(size)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if str(error).startswith(("CRC check failed", "Incorrect length")):
                raise _Spoilt(str(error)) from error
            # So bz2 says that bytes are damaged; other errors of this kind are of the disk or the network.
            if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and str(error) != _BAD_BZIP2:
                raise
            raise Broken(self.position, f"it does not unpack further ({error})") from error


def split(source: str) -> tuple[Folder, str, str]:
    """The folder, the name in it and the end of the name that makes it a tar; both empty for a folder."""
    if not source:
        raise ValueError("the source is missing: a tar, or a folder of tars")
    suffix = next((end for end in (".tar", *OPENERS) if source.lower().endswith(end)), "")
    if not suffix:
        return Folder(source), "", ""
    folder, _, name = Folder(source).absolute.rpartition("/")
    return Folder(folder or "/"), name, suffix


def unpack(origin: Origin) -> Unpacked:
    """What the compressed tar `origin.source` holds, as plain tars in a folder below `origin.downloads`.

    These are its class tars, or, where it has pictures instead, one tar of them. The source is read once, from its
    start to its end; when all is unpacked, the folder's `RECORD` says so, and from then on the source is not read
    again, nor needed. A pass that was ended goes through the source anew, and writes what is missing. ValueError where
    the folder was begun from a source of another size, where the source has neither tars nor pictures, and where it is
    broken (with `origin.keep_sound` what came before the fault is kept).
    """
    folder, name, suffix = split(origin.source)
    where, target = f"{folder}/{name}", origin.downloads / name[: -len(suffix)]
    with _alone(target):
        size = folder.size(name)
        _check_same(target, where, size)
        record = _recorded(target)
        if record is None or (record["broken"] and not origin.keep_sound):
            if size is None:
                raise FileNotFoundError(f"{where} does not exist")
            origin.say(f"unpacking {where} into {target}")
            record = _pass(origin, folder, name, suffix, target)
        elif record["broken"]:
            origin.say(record["broken"])
    return Unpacked(target, record["tars"], next(iter(record["pictures"]), ""))


@contextmanager
def _alone(target: Folder) -> Iterator[None]:
    """Makes others on this disk wait, so that they find all unpacked."""
    if target.local:
        target.local.mkdir(parents=True, exist_ok=True)
    with FileLock(target.local / ".lock") if target.local else nullcontext():
        yield


def _check_same(target: Folder, where: str, size: int | None) -> None:
    """Note the source's size (None if it is gone) when unpacking begins; ValueError where it was another."""
    if size is None:
        return
    if not target.exists(_BEGUN):
        target.write(_BEGUN, json.dumps({"source": where, "bytes": size}).encode())
    begun = json.loads(target.read(_BEGUN))["bytes"]
    if begun != size:
        raise ValueError(
            f"{target} was unpacked from a source of {begun:,} bytes, {where} has {size:,}: remove that folder first"
        )


def _recorded(target: Folder) -> dict[str, Any] | None:
    """What the record says, if all that it names is there."""
    if not target.exists(RECORD):
        return None
    record, there = json.loads(target.read(RECORD)), target.sizes()
    return record if {**record["tars"], **record["pictures"]}.items() <= there.items() else None


def _pass(origin: Origin, folder: Folder, name: str, suffix: str, target: Folder) -> dict[str, Any]:
    """Unpack, and write down what was unpacked."""
    where, whole = f"{folder}/{name}", f"{name[: -len(suffix)]}.tar"
    target.remove(RECORD)
    target.sweep()
    with folder.reading(name) as packed, OPENERS[suffix](packed) as plain:
        unpacking = _Unpacking(_Stream(plain), target, whole, origin.keep_sound)
        try:
            unpacking.run()
        except _Spoilt as error:
            unpacking.undo()
            raise ValueError(
                f"{where} is damaged, and nothing of it can be trusted ({error}): fetch it again"
            ) from error
    fault, broken = unpacking.fault, ""
    if fault:
        broken = f"{where} is broken at byte {fault.offset:,} of what it unpacks to: {fault.why}"
        complain(origin, broken)
    if not unpacking.tars and not unpacking.pictures:
        raise ValueError(f"{where} holds neither tars nor pictures")
    record = {"tars": unpacking.tars, "pictures": unpacking.pictures, "broken": broken}
    target.write(RECORD, json.dumps(record).encode())
    return record


class _Unpacking:
    """One pass through what a compressed tar holds; with `keep_sound` it keeps what comes before a fault."""

    def __init__(self, stream: _Stream, target: Folder, whole: str, keep_sound: bool) -> None:
        self.stream, self.target, self.whole, self.keep_sound = stream, target, whole, keep_sound
        self.there = target.sizes()
        self.tars: dict[str, int] = {}
        self.pictures: dict[str, int] = {}
        self.fault: Broken | None = None

    def run(self) -> None:
        """Make the class tars, or, if there are none, the tar of pictures."""
        with suppress(_Unwanted), self.target.making(self.whole) as path:
            with path.open("wb") as pictures:
                self._sort(pictures)
                size = pictures.tell()
                pictures.write(2 * ZEROS)
            if not size or self.tars or (self.fault and not self.keep_sound):
                raise _Unwanted
            self.pictures = {self.whole: path.stat().st_size}

    def _sort(self, pictures: BinaryIO) -> None:
        try:
            for member in walk(self.stream, 0, sys.maxsize):
                if is_tar(member.name):
                    self._keep_tar(member)
                elif is_picture(member.name) and not self.tars:
                    self._keep_picture(member, pictures)
            for _ in self.stream.pieces(sys.maxsize):  # the last checksum comes at the end
                pass
        except Broken as fault:
            self.fault = fault

    def _keep_tar(self, member: Member) -> None:
        name, fault = member.name.rpartition("/")[2], None
        if name in self.tars:
            raise ValueError(f"the source of {self.target} holds two tars named {name}: they would be one class")
        if self.there.get(name) == member.size:
            self.tars[name] = member.size
            return
        with self.target.making(name) as path:
            with path.open("wb") as file:
                try:
                    file.writelines(self.stream.pieces(member.size))
                except Broken as error:
                    fault = error
            size = path.stat().st_size
            if size < member.size:
                fault = fault or Broken(self.stream.position, f"it ends within {member.name}")
            if fault and not self.keep_sound:
                raise fault
        self.tars[name] = size
        if fault:
            raise fault

    def _keep_picture(self, member: Member, pictures: BinaryIO) -> None:
        data = self.stream(member.offset, member.size)
        if len(data) < member.size:
            raise Broken(self.stream.position, f"it ends within {member.name}")
        header = tarfile.TarInfo(member.name)
        header.size = member.size
        # A TarFile would hold the headers of all members in memory.
        pictures.write(header.tobuf(tarfile.PAX_FORMAT) + data + bytes(padded(len(data)) - len(data)))

    def undo(self) -> None:
        """Take away the class tars."""
        for name in self.tars:
            self.target.remove(name)
