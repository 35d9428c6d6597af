"""Reads the bytes of `Ranges` in their order, from local files at once, from a store in few large requests.

What lies close together in a file of a store is fetched in one piece. Pieces are kept in a temporary file, so that a
shard of any size needs little memory.
"""

import os
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.sources import Ranges, located
from shards.storage import Folder

GAP = 1 << 16
"""Bytes between two pictures that are rather fetched along than left to a second request."""
PIECE = 1 << 23
"""Bytes of one request, at the most where several pictures share it."""
AT_ONCE = 1 << 26
"""Bytes that are asked for at a time."""
UNKNOWN = 1 << 17
"""Bytes that a whole file of unknown size counts for."""
_OPEN = 64


def read(ranges: Ranges) -> Iterator[bytes]:
    """The bytes of each picture, in order; OSError, naming file and offset, where they cannot be had."""
    local = Folder(ranges.root).local
    names = ranges.files.to_pylist()
    if local and not any("://" in name for name in names):
        return _read_local([located(str(local), name) for name in names], ranges)
    return _read_remote([_split(ranges.root, name) for name in names], ranges)


def _split(root: str, name: str) -> tuple[str, str]:
    """A folder and a name in it."""
    if located(root, name) != name:
        return root, name
    folder, _, last = name.rpartition("/")
    return folder, last


def _columns(ranges: Ranges) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    file, offset, size = (ranges.table[name].to_numpy() for name in ("file", "offset", "size"))
    return file, offset, size


class _File:
    """A descriptor that is closed when it is forgotten."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _read_local(paths: list[str], ranges: Ranges) -> Iterator[bytes]:
    file, offset, size = (column.tolist() for column in _columns(ranges))
    opened = lru_cache(maxsize=_OPEN)(lambda number: _File(paths[number]))
    for number, start, count in zip(file, offset, size, strict=True):
        if count < 0:
            with open(paths[number], "rb", buffering=0) as whole:
                yield whole.read()
            continue
        data = os.pread(opened(number).descriptor, count, start)
        if len(data) != count:
            raise OSError(f"{paths[number]} ends within a picture: {count:,} bytes at {start:,}, {len(data):,} there")
        yield data


class _Piece(NamedTuple):
    """One request: a run of bytes of a file, and the pictures that lie in it."""

    file: int
    offset: int
    size: int
    pictures: list[int]


def _read_remote(files: list[tuple[str, str]], ranges: Ranges) -> Iterator[bytes]:
    file, offset, size = _columns(ranges)
    place, length = np.zeros(len(file), np.int64), np.zeros(len(file), np.int64)
    with tempfile.TemporaryFile(prefix="vitscale-") as kept:
        end = 0
        for pieces in _batches(_pieces(file, offset, size)):
            for piece, data in zip(pieces, _fetch(files, pieces), strict=True):
                for picture in piece.pictures:
                    place[picture] = end + offset[picture] - piece.offset
                    length[picture] = size[picture] if piece.size >= 0 else len(data)
                kept.write(data)
                end += len(data)
        kept.flush()
        for start, count in zip(place.tolist(), length.tolist(), strict=True):
            yield os.pread(kept.fileno(), count, start)


def _pieces(file: NDArray[np.int32], offset: NDArray[np.int64], size: NDArray[np.int64]) -> Iterator[_Piece]:
    """Requests in the order of the files, neighbours together."""
    now: _Piece | None = None
    for picture in np.lexsort((offset, file)).tolist():
        number, start, count = int(file[picture]), int(offset[picture]), int(size[picture])
        if now and count >= 0 and now.size >= 0 and number == now.file:
            end = max(now.offset + now.size, start + count)
            if start - (now.offset + now.size) <= GAP and end - now.offset <= PIECE:
                now = now._replace(size=end - now.offset, pictures=[*now.pictures, picture])
                continue
        if now:
            yield now
        now = _Piece(number, start, count, [picture])
    if now:
        yield now


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch, total = [], 0
    for piece in pieces:
        batch.append(piece)
        total += piece.size if piece.size >= 0 else UNKNOWN
        if total >= AT_ONCE:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _fetch(files: list[tuple[str, str]], pieces: list[_Piece]) -> list[bytes]:
    """The bytes of each piece; requests of one folder go out together."""
    found: dict[int, bytes] = {}
    folders: dict[str, list[int]] = {}
    for number, piece in enumerate(pieces):
        folders.setdefault(files[piece.file][0], []).append(number)
    for folder, numbers in folders.items():
        requests = [(files[p.file][1], p.offset, p.size) for p in (pieces[n] for n in numbers)]
        found.update(zip(numbers, Folder(folder).ranges(requests), strict=True))
    return [found[number] for number in range(len(pieces))]
