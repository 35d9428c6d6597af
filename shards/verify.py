"""Reads a whole shard set back and says what is wrong with it."""

import tempfile
from pathlib import Path
from typing import Any

from shards import cluster
from shards.image import Refused, look
from shards.manifest import Shard, ShardSet
from shards.progress import Progress
from shards.storage import Folder, digest


def verify(url: str) -> str:
    """The first thing that is wrong with the set at `url`, naming the file; empty where all of it is right.

    Every byte is read: sizes and digests of all files, and each picture by its place in the index, which has to
    decode and to have the size that the index says. ValueError where there is nothing at all.
    """
    if not Folder(url).sizes():
        raise ValueError(f"there is no shard set at {Folder(url).absolute}: no such folder, or an empty one")
    try:
        found = ShardSet(url)
        wrong = _wrong_files(found)
        if wrong:
            return wrong
        return _read_all(found)
    except ValueError as error:
        return str(error)


def _wrong_files(found: ShardSet) -> str:
    with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:
        for name, sha256 in found.manifest.files.items():
            local = Path(folder) / name
            found.folder.get(name, local)
            if digest(local) != sha256:
                return f"{found.folder.absolute}/{name}: its digest is not that of the manifest"
    return ""


def _read_all(found: ShardSet) -> str:
    arguments = (
        (found.tars, shard, found.rows(number).to_pylist(), len(found.manifest.classes))
        for number, shard in enumerate(found.manifest.shards)
    )
    cluster.connect()
    progress = Progress(f"verify {found.manifest.name}", found.manifest.samples, "pictures")
    progress.update(0)
    done, wrong = 0, {}
    for ended in cluster.each(verify_shard, arguments):
        for name, samples, problem in ended:
            done += samples
            if problem:
                wrong[name] = f"{found.tars.absolute}/{name}: {problem}"
        progress.update(done, wrong=str(len(wrong)))
    return wrong[min(wrong)] if wrong else ""


def verify_shard(folder: Folder, shard: Shard, rows: list[dict[str, Any]], classes: int) -> tuple[str, int, str]:
    """The shard's name, its pictures, and the first thing that is wrong with it, if any."""
    with tempfile.TemporaryDirectory(prefix="vitscale-") as local:
        copy = Path(local) / shard.name
        folder.get(shard.name, copy)
        return shard.name, shard.samples, _wrong_shard(copy, shard, rows, classes)


def _wrong_shard(copy: Path, shard: Shard, rows: list[dict[str, Any]], classes: int) -> str:
    if len(rows) != shard.samples:
        return f"the index has {len(rows)} pictures of it, the manifest says {shard.samples}"
    problems = _wrong_pictures(copy.read_bytes(), rows, classes)
    if digest(copy) != shard.sha256:
        return "its digest is not that of the manifest" + (f" ({problems})" if problems else "")
    return problems


def _wrong_pictures(tar: bytes, rows: list[dict[str, Any]], classes: int) -> str:
    for row in rows:
        seen = look(tar[row["offset"] : row["offset"] + row["size"]])
        if isinstance(seen, Refused):
            return f"{row['member']}: {seen}"
        if (seen.width, seen.height) != (row["width"], row["height"]):
            return f"{row['member']} is {seen.width} x {seen.height}, the index says {row['width']} x {row['height']}"
        if not all(0 <= label < classes for label in row["labels"]):
            return f"{row['member']} has the labels {row['labels']}, there are {classes} classes"
    return ""
