"""Bytes of pictures by their place in a shard set: from local shards directly, from remote ones by a cache."""

import os
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.cache import Cache
from shards.manifest import ShardSet
from shards.storage import digest

OPEN_SHARDS = 64


class _Open(NamedTuple):
    """A shard at hand: its file and what the index says of its pictures."""

    file: "_File"
    offset: NDArray[np.int64]
    size: NDArray[np.int32]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    labels: list[list[int]]


class _File:
    """A file that closes when nobody refers to it any more, so that no thread loses it while it reads."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


class Reader:
    """Random access to the pictures of a shard set, from any number of threads.

    A shard's digest is checked before its first picture is given; ValueError names a shard that is damaged.
    """

    def __init__(self, shards: ShardSet, cache: Cache | None) -> None:
        self.shards, self.cache = shards, cache
        self._locks = [Lock() for _ in shards.manifest.shards]
        self._verified: set[int] = set()
        self.open = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def bytes(self, shard: int, place: int) -> bytes:
        """The encoded picture at `place` of `shard`."""
        found = self.at_hand(shard)
        size, offset = found.size.item(place), found.offset.item(place)
        data = os.pread(found.file.descriptor, size, offset)
        if len(data) != size:
            raise ValueError(f"{self.shards.manifest.shards[shard].name} ends before its picture {place}")
        return data

    def at_hand(self, shard: int) -> _Open:
        """The shard, opened and verified."""
        with self._locks[shard]:
            return self.open(shard)

    def key(self, shard: int, place: int) -> str:
        """The name of a picture."""
        return self.shards.rows(shard)["key"][place].as_py()

    def _open(self, shard: int) -> _Open:
        path = self._path(shard)
        rows = self.shards.rows(shard)
        offset, size, width, height = (rows[name].to_numpy() for name in ("offset", "size", "width", "height"))
        return _Open(_File(path), offset, size, width, height, rows["labels"].to_pylist())

    def _path(self, shard: int) -> Path:
        about = self.shards.manifest.shards[shard]
        local = self.shards.tars.local
        if not local:
            assert self.cache is not None, "remote shards are read by a cache"
            return self.cache.path(self.shards.tars, about)
        path = local / about.name
        if shard not in self._verified:
            if digest(path) != about.sha256:
                raise ValueError(f"{path} is damaged: its digest is not that of the manifest")
            self._verified.add(shard)
        return path
