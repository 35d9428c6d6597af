"""The walk over a plain tar's headers, which finds the files in it without reading them.

Headers are those of POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header", and of GNU tar's manual,
"Basic Tar Format" (long names, sizes in base 256). Either every member up to the mark of the tar's end is found, or
those before a fault, and then the fault with its offset.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shards.sources import Origin

Read = Callable[[int, int], bytes]
"""The bytes at an offset, so many of them, fewer where the file ends; it is asked from front to back."""

_UNIT = 512
ZEROS = bytes(_UNIT)
_RECORD_BYTES = 20 * _UNIT
# Links, devices and folders: what their header says of a size is not of bytes that follow.
_EMPTY = frozenset(b"%d" % number for number in range(1, 7))
_REGULAR = frozenset({b"0", b"\0", b"7"})
_EXTENDING = frozenset({b"x", b"X", b"g", b"L", b"K"})
# Nobody has so long a name; a damaged size must not fill the memory.
_LONGEST = 1 << 24


class Member(NamedTuple):
    """A regular file in a tar: its name, and the run of bytes that it is."""

    name: str
    offset: int
    size: int


class Broken(ValueError):
    """A tar that cannot be read on from `offset`, where the header stands that says so."""

    def __init__(self, offset: int, why: str, cut: Member | None = None) -> None:
        super().__init__(offset, why, cut)
        self.offset, self.why, self.cut = offset, why, cut
        """`cut` is the member that the tar ends within, if it does."""

    def says(self, where: str) -> str:
        """The line that a person is told; `where` names the file."""
        return f"{where} is broken at byte {self.offset:,}: {self.why}; everything before it is sound"


def complain(origin: Origin, line: str) -> None:
    """Tell the user of a broken tar; ValueError unless `origin.keep_sound`."""
    if not origin.keep_sound:
        raise ValueError(f"{line}: fetch it again, or keep what is sound (--keep-sound)")
    origin.say(line)


def is_tar(path: str) -> bool:
    """Whether a file or a member is a tar by its name; hidden ones, which macOS adds, are none."""
    name = path.rpartition("/")[2]
    return name.endswith(".tar") and not name.startswith(".")


def walk(read: Read, start: int, end: int) -> Iterator[Member]:
    """The regular files of the tar that lies from `start` to `end`, in order; names come without a leading `./`.

    Raises `Broken`, behind the last member that is whole, where a header's checksum is wrong, where the tar ends
    within a member or without the mark of its end, and where something follows that mark.
    """
    offset = start
    common: dict[str, str] = {}
    own: dict[str, str] = {}
    while (header := _header(read, offset, end)) != ZEROS:
        kind, size = header[156:157], _number(header[124:136], offset)
        if kind in _EXTENDING:
            _extend(kind, read(offset + _UNIT, _extent(offset, size, end)), offset, common, own)
            offset += _UNIT + padded(size)
            continue
        name, size = _name(header, common, own), _size(size, common, own, offset)
        _refuse_holes(kind, common, own, offset)
        data, stored = offset + _UNIT, 0 if kind in _EMPTY else size
        if data + stored > end:
            there = f"{name} is cut short: it has {stored:,} bytes, {max(0, end - data):,} are there"
            raise Broken(offset, there, Member(name, data, size))
        offset = data + padded(stored)
        # Before POSIX a folder was a file whose name ends in a stroke.
        if kind in _REGULAR and not name.endswith("/"):
            yield Member(name, data, size)
        own = {}
    behind = offset + _UNIT
    if read(behind, max(0, min(end - behind, _RECORD_BYTES))).strip(b"\0"):
        raise Broken(offset, "it goes on behind the mark of its end: join tars by tar --concatenate")


def _header(read: Read, offset: int, end: int) -> bytes:
    header = read(offset, _UNIT) if offset + _UNIT <= end else b""
    if len(header) < _UNIT:
        raise Broken(min(offset, end), "it is cut short: the mark of a tar's end is missing")
    if header[0] == 0 and header == ZEROS:
        return ZEROS
    if not _sums_up(header):
        raise Broken(offset, "what stands there is no header of a tar, or a damaged one")
    return header


def _sums_up(header: bytes) -> bool:
    """Whether the checksum, which counts its own field as blanks, is that of the header."""
    told = header[148:156]
    try:
        expected = int(told.partition(b"\0")[0], 8) + sum(told) - 8 * ord(" ")
    except ValueError:
        return False
    # The lower half of an Adler-32 is the sum of the bytes and 1, modulo 65,521, and far quicker than sum().
    if zlib.adler32(header) & 0xFFFF == (expected + 1) % 65_521:
        return True
    # Some old tars took bytes for signed numbers.
    return sum(struct.unpack("512b", header)) == expected


def _number(digits: bytes, offset: int) -> int:
    """The number in a field of a header: octal digits, or, where the first bit is set, base 256."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    try:
        number = int(digits.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise Broken(offset, f"its header gives no size: {digits!r}")
    return number


def padded(size: int) -> int:
    return -(-size // _UNIT) * _UNIT


def _extent(offset: int, size: int, end: int) -> int:
    """The size of a header's extension, if there can be one of this size."""
    if size > _LONGEST or offset + _UNIT + size > end:
        raise Broken(offset, f"a header's extension of {size:,} bytes does not fit")
    return size


def _extend(kind: bytes, data: bytes, offset: int, common: dict[str, str], own: dict[str, str]) -> None:
    """Note what an extension says of the next member (`own`) or of all that follow (`common`)."""
    if kind == b"L":
        own["path"] = _text(data.partition(b"\0")[0])
    elif kind != b"K":
        (common if kind == b"g" else own).update(_records(data, offset))


def _records(data: bytes, offset: int) -> Iterator[tuple[str, str]]:
    """The records of a pax header, each `<its length in bytes> <key>=<value>` and a line feed."""
    at = 0
    while at < len(data):
        length = data[at : at + 20].partition(b" ")[0]
        after = at + int(length) if length.isdigit() else at
        name, equals, value = data[at + len(length) + 1 : after - 1].partition(b"=")
        if not equals or data[after - 1 : after] != b"\n":
            raise Broken(offset, f"its pax header is damaged at its byte {at:,}")
        yield _text(name), _text(value)
        at = after


def _text(data: bytes) -> str:
    # Tables hold UTF-8 only; what is none is spelt out, so that different names stay different.
    return data.decode("utf-8", "backslashreplace")


def _name(header: bytes, common: dict[str, str], own: dict[str, str]) -> str:
    given = own.get("path") or common.get("path")
    if not given:
        given = _text(header[:100].partition(b"\0")[0])
        # GNU's own headers, whose magic word differs, have dates in the place of the prefix.
        if header[345] and header[257:263] == b"ustar\0":
            given = f"{_text(header[345:500].partition(bytes(1))[0])}/{given}"
    return given.removeprefix("./")


def _size(size: int, common: dict[str, str], own: dict[str, str], offset: int) -> int:
    given = own.get("size") or common.get("size")
    if not given:
        return size
    if not (given.isascii() and given.isdigit()):
        raise Broken(offset, f"its pax header gives no size: {given!r}")
    return int(given)


def _refuse_holes(kind: bytes, common: dict[str, str], own: dict[str, str], offset: int) -> None:
    if kind == b"S" or (own and any(name.startswith("GNU.sparse.") for name in (*common, *own))):
        raise Broken(offset, "a member is stored with holes: make the tar without --sparse")
