"""Describes WebDataset shards made elsewhere, with Ray, a task a shard: an index and a manifest, and no copy.

The description lies beside the shards or anywhere else; a run is fed from it as from a set of our own.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute

from shards import cluster
from shards.build import PARTS, check_refused, claim, finish, mark, part_name, parts, reasons, refuse_others, summary
from shards.manifest import MANIFEST, Manifest, ShardSet
from shards.pack import Packed
from shards.progress import Progress
from shards.sources.webdataset import expand, index_shard
from shards.storage import Folder

# Its functions are made when it is imported, where no type checker sees them.
pc: Any = pyarrow.compute

CLAIM = "index.json"


def index(
    url: str,
    target: Folder,
    name: str,
    classes: tuple[str, ...] = (),
    *,
    label: str = "",
    refused_limit: float = 0.01,
) -> Manifest:
    """Put a manifest and an index at `target` of the shards that `url` means: a folder, a tar, or a brace pattern.

    Killed and started again it goes on. ValueError or FileNotFoundError, naming the file, where a shard is damaged, a
    label fits no class, or the target describes other shards.
    """
    folder, names = expand(url)
    tars = "" if folder.absolute == target.absolute else folder.absolute
    draft = Manifest(name, {"indexed": names, "label": label}, classes, (), {}, {}, tars=tars)
    if target.exists(MANIFEST):
        found = ShardSet(target.url).manifest
        refuse_others(_decided(draft), _decided(replace(found, classes=found.classes if classes else ())), target)
        print(f"{name}: {found.samples:,} pictures in {len(found.shards)} shards are described at {target.absolute}")
        return found
    claim(target / PARTS, CLAIM, _decided(draft), target)
    _index_missing(folder, names, label, target, name, refused_limit)
    made = _finish(draft, folder, target, refused_limit)
    print(summary(made, target), flush=True)
    target.remove(PARTS)
    return made


def _decided(draft: Manifest) -> dict[str, Any]:
    return {"name": draft.name, "classes": list(draft.classes), "tars": draft.tars, **draft.recipe}


@dataclass(frozen=True)
class _Indexed:
    samples: int
    refused: dict[str, int]


def _index_missing(folder: Folder, names: list[str], label: str, target: Folder, name: str, limit: float) -> None:
    there = (target / PARTS).sizes()
    missing = [number for number in range(len(names)) if part_name(number) not in there]
    if not missing:
        return
    cluster.connect()
    progress = Progress(name, len(names), "shards")
    done, samples, refused = len(names) - len(missing), 0, Counter[str]()
    progress.update(done)
    for ended in cluster.each(index_part, ((folder, names[number], number, label, target) for number in missing)):
        for one in ended:
            done, samples = done + 1, samples + one.samples
            refused.update(one.refused)
        progress.update(done, pictures=f"{samples:,}", refused=f"{refused.total():,}")
    if done == len(names) == len(missing):
        check_refused(name, samples + refused.total(), refused, limit)


def index_part(folder: Folder, name: str, number: int, label: str, target: Folder) -> _Indexed:
    """Index one shard and put what was found into the parts."""
    packed = index_shard(folder, name, number, label)
    mark(number, packed, target)
    return _Indexed(packed.shard.samples, reasons(packed.refused))


def _finish(draft: Manifest, folder: Folder, target: Folder, limit: float) -> Manifest:
    count = len(draft.recipe["indexed"])
    most = _largest(parts(count, target, folder))
    classes = draft.classes or tuple(str(number) for number in range(most + 1))
    if most >= len(classes):
        raise ValueError(f"{folder.absolute} has the label {most}, there are {len(classes)} classes")
    return finish(replace(draft, classes=classes), parts(count, target, folder), target, limit)


def _largest(packed: Iterable[Packed]) -> int:
    found = (pc.max(pc.list_flatten(one.rows["labels"])).as_py() for one in packed)
    return max((label for label in found if label is not None), default=-1)
