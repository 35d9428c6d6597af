"""A part of a shard set as a set of its own: an index and a manifest over the same tars, nothing is copied.

For studies of how much data a model needs (Dosovitskiy et al. 2021, section 4.3), and to leave pictures out of the next
run. Of one seed a smaller part lies within every larger one of the same kind.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.build import finish, refuse_others
from shards.chance import mixed, number
from shards.manifest import MANIFEST, Manifest, ShardSet
from shards.pack import Packed
from shards.storage import Folder


@dataclass(frozen=True)
class Part:
    """Which pictures of a set: a share of all, or so many of each class, without some; 1 and 0 mean no such limit."""

    share: float = 1.0
    per_class: int = 0
    without: tuple[str, ...] = ()
    """Keys of pictures that are left out, before anything is counted."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share:g}; it lies above 0 and is 1 at the most")
        if self.per_class < 0:
            raise ValueError(f"per_class is {self.per_class}; it is a number of pictures, or 0 for all")
        if (self.share, self.per_class, self.without) == (1, 0, ()):
            raise ValueError("nothing is left out: give a share, a number of pictures per class, or keys")


def subset(url: str, target: Folder, name: str, part: Part) -> Manifest:
    """Describe at `target` a part of the set at `url`; where it is described already, only say so.

    ValueError where the target holds anything else, no picture is left, or a key to be left out is not in the set.
    """
    whole = ShardSet(url)
    recipe = {
        "subset_of": whole.manifest.name,
        "root": whole.manifest.root,
        **asdict(part),
        "without": list(part.without),
    }
    draft = Manifest(name, recipe, whole.manifest.classes, (), {}, {}, tars=whole.tars.absolute)
    if target.exists(MANIFEST):
        found = ShardSet(target.url).manifest
        refuse_others(_decided(draft), _decided(found), target)
        return found
    if others := sorted(target.sizes()):
        raise ValueError(f"{target.absolute} holds files that are no part of {name}: {others[0]}; choose another")
    kept = chosen(whole, part)
    if not kept.any():
        raise ValueError(f"no picture of {whole.folder} is left")
    target.check_writable()
    return finish(draft, _packed(whole, kept), target, 1.0)


def _decided(draft: Manifest) -> dict[str, Any]:
    return {"name": draft.name, "classes": list(draft.classes), **draft.recipe}


def chosen(whole: ShardSet, part: Part) -> NDArray[np.bool_]:
    """(n,): whether each picture of a set belongs to the part."""
    count = whole.manifest.samples
    kept = _without(whole, part.without)
    # Each picture has its rank for ever; a part takes the lowest.
    rank = mixed(number("subset", part.seed), np.arange(count, dtype=np.uint64))
    if part.per_class:
        picture, label = _labels(whole)
        inside = kept[picture]
        picture, label = picture[inside], label[inside]
        order = np.lexsort((rank[picture], label))
        first = np.searchsorted(label[order], label[order], side="left")
        best = picture[order][np.arange(len(order)) - first < part.per_class]
        kept = np.isin(np.arange(count), best)
    if part.share < 1:
        among = np.flatnonzero(kept)
        best = among[np.argsort(rank[among], kind="stable")[: round(part.share * len(among))]]
        kept = np.isin(np.arange(count), best)
    return kept


def _without(whole: ShardSet, keys: tuple[str, ...]) -> NDArray[np.bool_]:
    kept, wanted, found = np.ones(whole.manifest.samples, bool), pa.array(keys, pa.string()), set()
    if not keys:
        return kept
    for shard in range(len(whole.counts)):
        here = whole.rows(shard)["key"].combine_chunks()
        out = np.isin(np.asarray(here.to_pylist()), wanted.to_pylist())
        found.update(here.filter(pa.array(out)).to_pylist())
        kept[whole.first[shard] + np.flatnonzero(out)] = False
    if missing := [key for key in keys if key not in found]:
        raise ValueError(
            f"{whole.folder} has no picture {missing[0]!r} ({len(missing)} of {len(keys)} keys are not there)"
        )
    return kept


def _labels(whole: ShardSet) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Number of the picture and class, for each label of a set; a picture with several is in each of its classes."""
    pictures, labels = [], []
    for shard in range(len(whole.counts)):
        column = whole.rows(shard)["labels"].combine_chunks()
        counts = np.diff(column.offsets.to_numpy())
        pictures.append(whole.first[shard] + np.repeat(np.arange(len(counts)), counts))
        labels.append(column.flatten().to_numpy())
    return np.concatenate(pictures), np.concatenate(labels)


def _packed(whole: ShardSet, kept: NDArray[np.bool_]) -> Iterator[Packed]:
    """The shards of which something is left, with those rows."""
    number = 0
    for place, shard in enumerate(whole.manifest.shards):
        first = whole.first[place]
        rows = whole.rows(place).filter(pa.array(kept[first : first + shard.samples])).combine_chunks()
        if not rows.num_rows:
            continue
        numbers = pa.array(np.full(rows.num_rows, number, np.int32))
        rows = rows.set_column(rows.schema.get_field_index("shard"), rows.schema.field("shard"), numbers)
        yield Packed(replace(shard, samples=rows.num_rows), rows, [])
        number += 1
