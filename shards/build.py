"""Makes a shard set with Ray, a task a shard; killed at any moment and started again, it ends with the same bytes.

While it is made, `parts/` holds what is decided (`plan.json`) and, for each finished shard, its rows of the index with
what else the manifest needs (`000000.parquet`), created after the shard itself is in its place. The manifest is
written last, then `parts/` goes.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from shards import cluster
from shards.manifest import INDEX, MANIFEST, SCHEMA, Manifest, Shard, ShardSet
from shards.pack import Packed, pack
from shards.plan import Plan, shard_name
from shards.progress import Progress
from shards.sources import Pictures
from shards.storage import Folder, digest

PARTS = "parts"
PLAN = "plan.json"
REFUSED_LIMIT = 0.01
_FACTS = b"vitscale"


@dataclass(frozen=True)
class Recipe:
    """What decides a shard set, beside the pictures themselves."""

    dataset: str
    split: str
    licence: str
    classes: tuple[str, ...]
    plan: Plan

    @property
    def name(self) -> str:
        """The set's name."""
        return f"{self.dataset}/{self.split}"

    def values(self) -> dict[str, Any]:
        """The recipe as it stands in the manifest."""
        return {"dataset": self.dataset, "split": self.split, "licence": self.licence, **asdict(self.plan)}


def build(recipe: Recipe, pictures: Callable[[], Pictures], target: Folder) -> Manifest:
    """Make the set at `target`, or what is missing of it; where it is whole, only say so.

    `pictures` is called where something is missing. ValueError where the target holds anything else, or where more
    than `REFUSED_LIMIT` of the pictures are refused.
    """
    made = _finished(recipe, target)
    if made:
        print(
            f"{recipe.name}: {made.samples:,} pictures in {len(made.shards)} shards are at {target.absolute}",
            flush=True,
        )
    else:
        _refuse_occupied(recipe, target)
        _make_missing(recipe, pictures, target)
        made = _finish(recipe, target)
        print(_summary(recipe, made, target), flush=True)
    target.remove(PARTS)
    target.sweep()
    return made


def _finished(recipe: Recipe, target: Folder) -> Manifest | None:
    if not target.exists(MANIFEST):
        return None
    found = ShardSet(target.url).manifest
    theirs = {"name": found.name, "classes": list(found.classes), **found.recipe}
    _refuse_others(_decided(recipe), theirs, target)
    return found


def _refuse_occupied(recipe: Recipe, target: Folder) -> None:
    parts = target / PARTS
    if parts.exists(PLAN):
        _refuse_others(_decided(recipe), json.loads(parts.read(PLAN)), target)
    elif others := sorted(target.sizes()):
        raise ValueError(
            f"{target.absolute} holds files that are no part of {recipe.name}: {others[0]}; choose another"
        )


def _claim(recipe: Recipe, target: Folder) -> None:
    """Write down what is made here; of several builders who differ, one is told that it may."""
    target.check_writable()
    parts = target / PARTS
    if not parts.create(PLAN, json.dumps(_decided(recipe), sort_keys=True).encode()):
        _refuse_others(_decided(recipe), json.loads(parts.read(PLAN)), target)


def _decided(recipe: Recipe) -> dict[str, Any]:
    return {"name": recipe.name, "classes": list(recipe.classes), **recipe.values()}


def _refuse_others(ours: dict[str, Any], theirs: dict[str, Any], target: Folder) -> None:
    differ = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if differ:
        what = ", ".join(f"{name} is {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in differ)
        raise ValueError(f"{target.absolute} holds another shard set: {what}")


def _make_missing(recipe: Recipe, pictures: Callable[[], Pictures], target: Folder) -> None:
    missing = _missing(recipe.plan, target)
    if not missing:
        return
    source = pictures()
    assert len(source) == recipe.plan.samples, "the plan is made for these pictures"
    _claim(recipe, target)
    cluster.connect()
    progress = Progress(recipe.name, recipe.plan.samples, "pictures")
    done = recipe.plan.samples - sum(recipe.plan.size(shard) for shard in missing)
    progress.update(done)
    written, refused, began = 0, Counter[str](), time.monotonic()
    arguments = ((shard, source.take(recipe.plan.numbers(shard)), target) for shard in missing)
    for ended in cluster.each(make_shard, arguments):
        for made in ended:
            done += recipe.plan.size(made.number)
            written += made.shard.bytes
            refused.update(made.refused)
        _check_refused(recipe, refused)
        rate = written / 1e6 / max(time.monotonic() - began, 1e-9)
        progress.update(done, **{"MB/s": f"{rate:,.1f}", "refused": f"{refused.total():,}"})


def _missing(plan: Plan, target: Folder) -> list[int]:
    parts, tars = (target / PARTS).sizes(), target.sizes()
    return [n for n in range(plan.shards) if _part_name(n) not in parts or shard_name(n) not in tars]


@dataclass(frozen=True)
class Made:
    """What a task says of the shard that it made."""

    number: int
    shard: Shard
    refused: dict[str, int]


def make_shard(number: int, pictures: Pictures, target: Folder) -> Made:
    """Put shard `number`, which holds these pictures, into its place, then its part beside it."""
    with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:
        local = Path(folder) / shard_name(number)
        packed = pack(number, pictures, local)
        target.put(local, local.name)
    found = target.size(local.name)
    if found != packed.shard.bytes:
        raise OSError(f"{target.absolute}/{local.name} has {found} bytes, {packed.shard.bytes} were put there")
    (target / PARTS).write(_part_name(number), _part(packed))
    return Made(number, packed.shard, packed.refused)


def _part_name(number: int) -> str:
    return f"{number:06}.parquet"


def _part(packed: Packed) -> bytes:
    facts = json.dumps({"shard": asdict(packed.shard), "refused": packed.refused}).encode()
    data = BytesIO()
    pq.write_table(packed.rows.replace_schema_metadata({_FACTS: facts}), data)
    return data.getvalue()


def _finish(recipe: Recipe, target: Folder) -> Manifest:
    """Put the index and, after it, the manifest beside the shards."""
    shards: list[Shard] = []
    refused: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:
        local = Path(folder) / INDEX
        with pq.ParquetWriter(local, SCHEMA) as index:
            for packed in _parts(recipe.plan, target):
                index.write_table(packed.rows, row_group_size=max(1, len(packed.rows)))
                shards.append(packed.shard)
                refused.update(packed.refused)
        _check_refused(recipe, refused)
        target.put(local, INDEX)
        made = Manifest(
            recipe.name, recipe.values(), recipe.classes, tuple(shards), digest(local), dict(sorted(refused.items()))
        )
    target.write(MANIFEST, made.to_json())
    return made


def _parts(plan: Plan, target: Folder) -> Iterator[Packed]:
    parts, sizes = target / PARTS, target.sizes()
    for number in range(plan.shards):
        table = pq.read_table(BytesIO(parts.read(_part_name(number))))
        facts = json.loads(table.schema.metadata[_FACTS])
        shard = Shard(**facts["shard"])
        if sizes.get(shard.name) != shard.bytes:
            parts.remove(_part_name(number))
            raise ValueError(
                f"{target.absolute}/{shard.name} has been changed since it was made: "
                f"{sizes.get(shard.name)} bytes, {shard.bytes} were written; start again and it is made anew"
            )
        yield Packed(shard, table.replace_schema_metadata(None), facts["refused"])


def _check_refused(recipe: Recipe, refused: Counter[str]) -> None:
    if refused.total() > REFUSED_LIMIT * recipe.plan.samples:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in refused.most_common())
        raise ValueError(
            f"{recipe.name}: more than {REFUSED_LIMIT:.0%} of {recipe.plan.samples:,} pictures are refused: {reasons}"
        )


def _summary(recipe: Recipe, made: Manifest, target: Folder) -> str:
    refused = f", {sum(made.refused.values()):,} refused" if made.refused else ""
    size = f"{made.size / 1e6:,.1f} MB"
    return (
        f"{recipe.name}: {made.samples:,} pictures in {len(made.shards)} shards, {size}{refused}, at {target.absolute}"
    )
