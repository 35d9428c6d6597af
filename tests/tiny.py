"""Small things that tests run on: a shard set of noise, a small run."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.config import Config, Data, Optim, Vit
from shards.manifest import INDEX, MANIFEST, SCHEMA, Manifest, Shard, ShardSet
from shards.pack import pack
from shards.sources import Arrays


def shard_set(
    folder: Path,
    *,
    sizes: tuple[int, ...] = (7, 5, 11, 9),
    side: int = 12,
    classes: int = 3,
    spoilt: tuple[int, ...] = (),
) -> ShardSet:
    """A set whose shards have these many pictures; a picture's brightness follows its class, so it can be learnt.

    The bytes of those that are `spoilt` are no picture, though the digests are right: as a careless tool makes them.
    """
    folder.mkdir(parents=True)
    draw, shards, first = np.random.default_rng(0), [], 0
    with pq.ParquetWriter(folder / INDEX, SCHEMA) as index:
        for number, size in enumerate(sizes):
            labels = (np.arange(first, first + size) % classes).astype(np.uint8)
            noise = draw.integers(0, 60, (size, side, side, 3))
            pixels = (noise + labels.astype(int)[:, None, None, None] * 190 // max(1, classes - 1)).astype(np.uint8)
            keys = [f"picture-{i:04}" for i in range(first, first + size)]
            packed = pack(number, Arrays(keys, pixels, labels), folder / f"{number:06}.tar")
            made = packed.shard
            for number_in, row in enumerate(packed.rows.to_pylist()):
                if first + number_in in spoilt:
                    made = _spoil(folder / made.name, row["offset"], row["size"], made)
            index.write_table(packed.rows, row_group_size=max(1, size))
            shards.append(made)
            first += size
    digest = sha256((folder / INDEX).read_bytes()).hexdigest()
    names = tuple(f"class {i}" for i in range(classes))
    (folder / MANIFEST).write_bytes(Manifest("tiny", {}, names, tuple(shards), {INDEX: digest}, {}).to_json())
    return ShardSet(str(folder))


def _spoil(tar: Path, offset: int, size: int, shard: Shard) -> Shard:
    data = bytearray(tar.read_bytes())
    data[offset : offset + size] = b"x" * size
    tar.write_bytes(data)
    return replace(shard, sha256=sha256(data).hexdigest())


def config(shards: ShardSet, **changes: object) -> Config:
    """A run of a few seconds on such a set."""
    where, cache = str(shards.folder.local), str(shards.folder.local) + "-cache"
    made = Config(
        name="tiny",
        classes=len(shards.manifest.classes),
        model=Vit(width=16, depth=2, heads=2, hidden=32, patch=4, image_size=12, dropout=0.1),
        data=Data(
            shards=where, validation=where, lanes=8, window=16, threads=2, crop_area=0.5, eval_crop=1.0, cache=cache
        ),
        optim=Optim(lr=1e-2, warmup=2, weight_decay=0.05),
        objective="softmax",
        smoothing=0.1,
        duration=10.0,
        batch=16,
        micro_batch=8,
        zero=2,
        precision="fp32",
        save_every=7,
        log_every=1,
    )
    return replace(made, **changes)
