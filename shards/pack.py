"""One shard: a tar in plain WebDataset form, byte for byte the same each time it is written.

A picture is two members: `<key>.jpg` (or png, webp) and `<key>.cls` with its label, or `<key>.json` with
`{"labels": [...]}` where it has several or none. Headers are written here, in the ustar form of POSIX 1003.1-1988:
only name, size and checksum differ between two members, and the sha256 is taken of what goes by.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pyarrow as pa

from shards.image import KEEP, Look, Processing, Refused, encode, process
from shards.manifest import SCHEMA, Shard
from shards.sources import Picture

BLOCK = 512
RECORD = 20 * BLOCK
_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
_ZEROS = bytes(RECORD)

# What a header holds behind its name: mode, owner, group; then size; then the time (the epoch); then the checksum;
# then type, magic, version and the names of owner and group.
_OWNER = b"0000444\x000000000\x000000000\x00"
_TIME = b"00000000000\x00"
_REST = b"0" + bytes(100) + b"ustar\x0000" + 2 * b"vitscale".ljust(32, b"\0") + 2 * b"0000000\0"
_TAIL = _REST.ljust(BLOCK - 100 - len(_OWNER) - 12 - len(_TIME) - 8, b"\0")
# The checksum counts its own eight bytes as blanks.
_SUM = sum(_OWNER) + sum(_TIME) + 8 * ord(" ") + sum(_TAIL)


@dataclass(frozen=True)
class Packed:
    """A shard, its rows of the index, and the key and reason of each picture that was left out."""

    shard: Shard
    rows: pa.Table
    refused: list[tuple[str, str]]


def pack(number: int, pictures: Iterable[Picture], target: Path, processing: Processing = KEEP) -> Packed:
    """Write shard `number` to the local file `target`; the same pictures in the same order give the same bytes."""
    rows: dict[str, list] = {name: [] for name in SCHEMA.names}
    refused: list[tuple[str, str]] = []
    keys: set[str] = set()
    with target.open("wb", buffering=0) as file:
        tar = _Tar(file.fileno())
        for picture in pictures:
            _check_key(picture.key, keys)
            made = _made(picture, processing)
            if isinstance(made, Refused):
                refused.append((picture.key, made.value))
                continue
            data, seen = made
            member = f"{picture.key}.{seen.extension}"
            _append(rows, number, picture, member, seen, tar.size + BLOCK, len(data))
            tar.add(member, data)
            tar.add(*_label(picture))
        tar.close()
    shard = Shard(target.name, len(rows["key"]), tar.size, tar.digest.hexdigest())
    return Packed(shard, pa.table(rows, SCHEMA), refused)


def _made(picture: Picture, processing: Processing) -> tuple[bytes, Look] | Refused:
    if isinstance(picture.data, bytes):
        return process(picture.data, processing)
    height, width = picture.data.shape[:2]
    data = encode(picture.data)
    if processing.short_side and min(height, width) > processing.short_side:
        return process(data, processing)
    return data, Look(width, height, "png")


def _append(
    rows: dict[str, list], number: int, picture: Picture, member: str, seen: Look, offset: int, size: int
) -> None:
    values = (number, picture.key, member, offset, size, seen.width, seen.height, picture.labels)
    for column, value in zip(rows.values(), values, strict=True):
        column.append(value)


def _label(picture: Picture) -> tuple[str, bytes]:
    if len(picture.labels) == 1:
        return f"{picture.key}.cls", b"%d" % picture.labels[0]
    return f"{picture.key}.json", json.dumps({"labels": list(picture.labels)}).encode()


class _Tar:
    """A tar that is written to a descriptor some megabytes at a time, and its sha256."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.digest, self.size = descriptor, sha256(), 0
        self._waiting: list[bytes] = []
        self._bytes = 0

    def add(self, name: str, data: bytes) -> None:
        padding = -len(data) % BLOCK
        self._waiting += (_header(name.encode(), len(data)), data, _ZEROS[:padding])
        length = BLOCK + len(data) + padding
        self.size += length
        self._bytes += length
        if self._bytes > 1 << 20:
            self._write()

    def close(self) -> None:
        """Two blocks of zeros, then more to the end of a record, as tar does."""
        padding = 2 * BLOCK + -(self.size + 2 * BLOCK) % RECORD
        self._waiting.append(bytes(padding))
        self.size += padding
        self._write()

    def _write(self) -> None:
        data = b"".join(self._waiting)
        self.digest.update(data)
        written = 0
        while written < len(data):
            written += os.write(self.descriptor, memoryview(data)[written:])
        self._waiting, self._bytes = [], 0


def _header(name: bytes, size: int) -> bytes:
    length = b"%011o\0" % size
    total = b"%06o\0 " % (_SUM + sum(name) + sum(length))
    return b"".join((name.ljust(100, b"\0"), _OWNER, length, _TIME, total, _TAIL))


def _check_key(key: str, before: set[str]) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} cannot name a picture in a shard: letters, digits, - and _, 90 of them at most")
    if key in before:
        raise ValueError(f"two pictures have the key {key!r}")
    before.add(key)
