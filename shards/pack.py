"""One shard: a tar in plain WebDataset form, byte for byte the same each time it is written.

A picture is two members: `<key>.png` (or jpg, webp) and `<key>.cls` with its label, or `<key>.json` with
`{"labels": [...]}` where it has several or none.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pyarrow as pa

from shards.image import Look, Refused, encode, look
from shards.manifest import SCHEMA, Shard
from shards.sources import Picture
from shards.storage import digest

_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Packed:
    """A written shard, its rows of the index and the pictures left out, by reason."""

    shard: Shard
    rows: pa.Table
    refused: dict[str, int]


def pack(number: int, pictures: Iterable[Picture], target: Path) -> Packed:
    """Write shard `number` to the local file `target`; the same pictures in the same order give the same bytes."""
    rows: dict[str, list] = {name: [] for name in SCHEMA.names}
    refused: Counter[str] = Counter()
    with target.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        keys: set[str] = set()
        for picture in pictures:
            _check_key(picture.key, keys)
            data = picture.data if isinstance(picture.data, bytes) else encode(picture.data)
            seen = look(data)
            if isinstance(seen, Refused):
                refused[seen.value] += 1
                continue
            _append(rows, _row(number, picture, seen, file.tell() + tarfile.BLOCKSIZE, len(data)))
            _add(tar, f"{picture.key}.{seen.extension}", data)
            _add(tar, *_label(picture))
    shard = Shard(target.name, len(rows["key"]), target.stat().st_size, digest(target))
    return Packed(shard, pa.table(rows, SCHEMA), dict(sorted(refused.items())))


def _row(number: int, picture: Picture, seen: Look, offset: int, size: int) -> dict[str, object]:
    return {
        "shard": number,
        "key": picture.key,
        "member": f"{picture.key}.{seen.extension}",
        "offset": offset,
        "size": size,
        "width": seen.width,
        "height": seen.height,
        "labels": list(picture.labels),
    }


def _append(rows: dict[str, list], row: dict[str, object]) -> None:
    for name, value in row.items():
        rows[name].append(value)


def _label(picture: Picture) -> tuple[str, bytes]:
    if len(picture.labels) == 1:
        return f"{picture.key}.cls", str(picture.labels[0]).encode()
    return f"{picture.key}.json", json.dumps({"labels": list(picture.labels)}).encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(data), 0o444, 0
    member.uname = member.gname = "vitscale"
    tar.addfile(member, BytesIO(data))


def _check_key(key: str, before: set[str]) -> None:
    if not _KEY.fullmatch(key) or len(key) > 90:
        raise ValueError(f"{key!r} cannot name a picture in a shard: letters, digits, - and _, 90 of them at most")
    if key in before:
        raise ValueError(f"two pictures have the key {key!r}")
    before.add(key)
