"""The same pictures in every form that a contestant reads."""

import os
from collections.abc import Iterable, Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from shards.manifest import INDEX, MANIFEST, SCHEMA, Manifest, Shard
from shards.pack import pack
from shards.sources import Picture

CLASSES = 100
SHARDS = 8
HUGE = (1400, 10_000)
"""Shards, and pictures in each, of the set in which a run starts again: 14 million."""


def labelled(folder: Path) -> Iterator[tuple[bytes, int]]:
    """The pictures of a folder and their labels."""
    for number, path in enumerate(sorted(folder.glob("*.jpg"))):
        yield path.read_bytes(), number % CLASSES


def shard_bytes(folder: Path) -> int:
    """How large a shard is to be, for those who cut by bytes: as large as ours of the same pictures."""
    return sum(path.stat().st_size for path in folder.glob("*.jpg")) // SHARDS


def shard_set(pictures: Iterable[tuple[bytes, int]], target: Path, count: int) -> None:
    """Pack `count` pictures into eight shards."""
    target.mkdir()
    rest, shards = iter(pictures), []
    with pq.ParquetWriter(target / INDEX, SCHEMA) as index:
        for number in range(SHARDS):
            keys = range(number * count // SHARDS, (number + 1) * count // SHARDS)
            some = [Picture(f"{key:06}", data, (label,)) for key, (data, label) in zip(keys, rest, strict=False)]
            packed = pack(number, some, target / f"{number:06}.tar")
            index.write_table(packed.rows, row_group_size=len(some))
            shards.append(packed.shard)
    _finish(target, shards)


def photographs(folder: Path, count: int) -> str:
    """So many photographs (photographs.py) in eight shards under `folder`; returns where the set is."""
    import photographs

    photographs.make(folder / "pictures", count)
    shard_set(labelled(folder / "pictures" / photographs.FULL), folder / "set", count)
    return str(folder / "set")


def huge(target: Path) -> None:
    """A set of 14 million small pictures, all of whose shards are links to one."""
    target.mkdir()
    number_of_shards, each = HUGE
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (CLASSES, 16, 16, 3), np.uint8)
    files = [_encoded(one) for one in pixels]
    packed = pack(
        0, (Picture(f"{i:06}", files[i % CLASSES], (i % CLASSES,)) for i in range(each)), target / "000000.tar"
    )
    shards = []
    with pq.ParquetWriter(target / INDEX, SCHEMA) as index:
        for number in range(number_of_shards):
            name = f"{number:06}.tar"
            if number:
                os.link(target / "000000.tar", target / name)
            index.write_table(packed.rows, row_group_size=each)
            shards.append(Shard(name, each, packed.shard.bytes, packed.shard.sha256))
    _finish(target, shards)


def _encoded(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def _finish(target: Path, shards: list[Shard]) -> None:
    with (target / INDEX).open("rb") as index:
        digests = {INDEX: sha256(index.read()).hexdigest()}
    classes = tuple(f"class {i}" for i in range(CLASSES))
    (target / MANIFEST).write_bytes(Manifest("benchmark", {}, classes, tuple(shards), digests, {}).to_json())
