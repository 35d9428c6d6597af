"""Makes a shard set with Ray, a task a shard; killed at any moment and started again, it ends with the same bytes.

While it is made, `parts/` holds what is decided (`recipe.json`), the plan of all pictures (`plan.parquet`) and, for
each finished shard, its rows of the index with what else the manifest needs (`000000.parquet`), written after the
shard itself is in its place. The manifest is written last, then `parts/` goes.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards import clean, cluster, planned
from shards.image import Processing
from shards.manifest import INDEX, MANIFEST, REFUSED, REFUSED_SCHEMA, SCHEMA, Manifest, Shard, ShardSet
from shards.pack import Packed, pack
from shards.plan import shard_name
from shards.planned import Facts, Planned
from shards.progress import Progress
from shards.recipe import Recipe
from shards.sources import Picture, Pictures, Ranges
from shards.storage import Folder, digest

PARTS = "parts"
RECIPE = "recipe.json"
PLAN = "plan.parquet"
_FACTS = b"vitscale"


def build(recipe: Recipe, pictures: Callable[[], Pictures], target: Folder) -> Manifest:
    """Make the set at `target`, or what is missing of it; where it is whole, only say so.

    `pictures` lists the source; it is called where no plan has been written yet. ValueError where the target holds
    anything else, where the listing cannot be planned, or where more pictures than `recipe.refused_limit` are refused.
    """
    made = _finished(recipe, target)
    if made:
        print(
            f"{recipe.name}: {made.samples:,} pictures in {len(made.shards)} shards are at {target.absolute}",
            flush=True,
        )
    else:
        _refuse_occupied(recipe, target)
        with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:
            plan, source = _planned(recipe, pictures, target, Path(folder) / PLAN)
            _make_missing(recipe, plan, source, target)
            made = _finish(recipe, plan, target)
        print(summary(made, target), flush=True)
    target.remove(PARTS)
    target.sweep()
    return made


# what is there already


def _finished(recipe: Recipe, target: Folder) -> Manifest | None:
    """The manifest of the set at `target`, if it is the one that the recipe makes; ValueError if it is another."""
    if not target.exists(MANIFEST):
        return None
    found = ShardSet(target.url).manifest
    theirs = {"name": found.name, "classes": list(found.classes), **found.recipe}
    refuse_others(_decided(recipe), theirs, target)
    return found


def _refuse_occupied(recipe: Recipe, target: Folder) -> None:
    """ValueError where the target holds what this recipe did not begin."""
    parts = target / PARTS
    if parts.exists(RECIPE):
        refuse_others(_decided(recipe), json.loads(parts.read(RECIPE)), target)
    elif others := sorted(target.sizes()):
        raise ValueError(
            f"{target.absolute} holds files that are no part of {recipe.name}: {others[0]}; choose another"
        )


def claim(parts: Folder, name: str, decided: dict[str, Any], target: Folder) -> None:
    """Write down what is made here; of several builders who differ, one is told that it may."""
    target.check_writable()
    if not parts.create(name, json.dumps(decided, sort_keys=True).encode()):
        refuse_others(decided, json.loads(parts.read(name)), target)


def _decided(recipe: Recipe) -> dict[str, Any]:
    return {"name": recipe.name, "classes": list(recipe.classes), **recipe.values()}


def refuse_others(ours: dict[str, Any], theirs: dict[str, Any], target: Folder) -> None:
    """ValueError, naming what differs, where `theirs` is not what `ours` asks for.

    Where ours leaves the classes to the source, theirs are as good as any.
    """
    names = set(ours) - ({"classes"} if not ours["classes"] else set())
    differ = [name for name in sorted(names) if ours[name] != theirs.get(name)]
    if differ:
        what = ", ".join(f"{name} is {_short(theirs.get(name))} there, {_short(ours[name])} here" for name in differ)
        raise ValueError(f"{target.absolute} holds another shard set: {what}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# the plan


def _planned(
    recipe: Recipe, pictures: Callable[[], Pictures], target: Folder, local: Path
) -> tuple[Planned, Pictures | None]:
    """The plan that was written, or one from the source; and the source, where shards cannot be made without it."""
    there = target / PARTS
    if there.exists(PLAN):
        there.get(PLAN, local)
        plan = Planned(local)
        return plan, None if plan.facts.ranges else _same_source(recipe, pictures(), plan.facts)
    clean.test_sets(recipe.clean)  # before anything is made
    source = pictures()
    if isinstance(source, Ranges):  # rows are taken from a table in one piece many times as fast
        source = replace(source, table=source.table.combine_chunks())
    facts = planned.checked(source, recipe.classes, recipe.name)
    claim(there, RECIPE, _decided(recipe), target)
    kept = clean.survivors(recipe, source, there) if recipe.clean.wanted else clean.Kept(len(source))
    planned.write(source, facts, recipe.plan(kept.count), local, kept=kept.numbers, labels=kept.labels)
    there.put(local, PLAN)
    return Planned(local), None if facts.ranges else source


def _same_source(recipe: Recipe, source: Pictures, facts: Facts) -> Pictures:
    if planned.checked(source, recipe.classes, recipe.name).digest != facts.digest:
        raise ValueError(f"{recipe.name}: the source lists other pictures than when this set was begun")
    return source


# the shards


def _make_missing(recipe: Recipe, plan: Planned, source: Pictures | None, target: Folder) -> None:
    missing = _missing(plan, target)
    if not missing:
        return
    cluster.connect()
    progress = Progress(recipe.name, plan.plan.samples, "pictures")
    done = plan.plan.samples - sum(plan.plan.size(shard) for shard in missing)
    progress.update(done)
    written, refused, began = 0, Counter[str](), time.monotonic()
    arguments = ((shard, plan.shard(shard, source), target, recipe.processing) for shard in missing)
    for ended in cluster.each(make_shard, arguments):
        for made in ended:
            done += plan.plan.size(made.number)
            written += made.shard.bytes
            refused.update(made.refused)
        check_refused(recipe.name, plan.plan.samples, refused, recipe.refused_limit)
        rate = written / 1e6 / max(time.monotonic() - began, 1e-9)
        progress.update(done, **{"MB/s": f"{rate:,.1f}", "refused": f"{refused.total():,}"})


def _missing(plan: Planned, target: Folder) -> list[int]:
    """The shards that are not in their place; a part that speaks of one goes."""
    parts, tars = (target / PARTS).sizes(), target.sizes()
    for number in range(plan.plan.shards):
        if part_name(number) in parts and shard_name(number) not in tars:
            (target / PARTS).remove(part_name(number))
            parts.pop(part_name(number))
    return [number for number in range(plan.plan.shards) if part_name(number) not in parts]


@dataclass(frozen=True)
class Made:
    """What a task says of the shard that it made."""

    number: int
    shard: Shard
    refused: dict[str, int]


def make_shard(number: int, pictures: Iterable[Picture], target: Folder, processing: Processing) -> Made:
    """Put shard `number`, which holds these pictures, into its place, then its part beside it."""
    name = shard_name(number)
    with target.making(name) as local:
        packed = pack(number, pictures, local, processing)
    packed = replace(packed, shard=replace(packed.shard, name=name))
    mark(number, packed, target)
    return Made(number, packed.shard, reasons(packed.refused))


def mark(number: int, packed: Packed, target: Folder) -> None:
    """Say that a shard is in its place; of two tasks that made it at once, as happens when a machine is thought dead,
    one says so, and the other has to have made the same."""
    made = part(packed)
    parts = target / PARTS
    if not parts.create(part_name(number), made) and parts.read(part_name(number)) != made:
        raise ValueError(f"{target.absolute}/{packed.shard.name}: two tasks made different bytes of the same pictures")


def reasons(refused: Iterable[tuple[str, str]]) -> dict[str, int]:
    """How often each reason was given."""
    return dict(sorted(Counter(reason for _, reason in refused).items()))


def part_name(number: int) -> str:
    """The file of a finished shard's part."""
    return f"{number:06}.parquet"


def part(packed: Packed) -> bytes:
    """What is known of a finished shard."""
    facts = json.dumps({"shard": asdict(packed.shard), "refused": packed.refused}).encode()
    data = BytesIO()
    pq.write_table(packed.rows.replace_schema_metadata({_FACTS: facts}), data)
    return data.getvalue()


# the end


def _finish(recipe: Recipe, plan: Planned, target: Folder) -> Manifest:
    removed = clean.removed(target / PARTS) if recipe.clean.wanted else clean.Removed({}, {})
    draft = Manifest(recipe.name, recipe.values(), plan.facts.classes, (), {}, {}, removed.reasons)
    return finish(draft, parts(plan.plan.shards, target), target, recipe.refused_limit, removed.files)


def finish(
    draft: Manifest, packed: Iterable[Packed], target: Folder, limit: float, others: dict[str, bytes] | None = None
) -> Manifest:
    """Put the index, what was left out and `others` beside the shards and, after all of it, the manifest.

    `draft` is the manifest without shards and files. ValueError where a larger share than `limit` was refused.
    """
    with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:
        shards, refused = _write_index(Path(folder), packed)
        counts = reasons((key, reason) for _, key, reason in refused)
        check_refused(draft.name, sum(shard.samples for shard in shards) + len(refused), counts, limit)
        if refused:
            columns = [list(column) for column in zip(*refused, strict=True)]
            pq.write_table(
                pa.table(dict(zip(REFUSED_SCHEMA.names, columns, strict=True)), REFUSED_SCHEMA), Path(folder) / REFUSED
            )
        for name, data in (others or {}).items():
            (Path(folder) / name).write_bytes(data)
        files = {path.name: digest(path) for path in sorted(Path(folder).iterdir())}
        for name in files:
            target.put(Path(folder) / name, name)
    made = replace(draft, shards=tuple(shards), files=files, refused=counts)
    target.write(MANIFEST, made.to_json())
    return made


def _write_index(folder: Path, packed: Iterable[Packed]) -> tuple[list[Shard], list[tuple[int, str, str]]]:
    shards: list[Shard] = []
    refused: list[tuple[int, str, str]] = []
    with pq.ParquetWriter(folder / INDEX, SCHEMA) as index:
        for number, one in enumerate(packed):
            index.write_table(one.rows, row_group_size=max(1, len(one.rows)))
            shards.append(one.shard)
            refused += [(number, key, reason) for key, reason in one.refused]
    return shards, refused


def parts(shards: int, target: Folder, tars: Folder | None = None) -> Iterator[Packed]:
    """What the parts beside the shards say; ValueError where a shard has changed since."""
    sizes, there = (tars or target).sizes(), target / PARTS
    for number in range(shards):
        table = pq.read_table(BytesIO(there.read(part_name(number))))
        facts = json.loads(table.schema.metadata[_FACTS])
        shard = Shard(**facts["shard"])
        if sizes.get(shard.name) != shard.bytes:
            there.remove(part_name(number))
            raise ValueError(
                f"{target.absolute}/{shard.name} has been changed since it was made: "
                f"{sizes.get(shard.name)} bytes, {shard.bytes} were written; start again and it is made anew"
            )
        yield Packed(shard, table.replace_schema_metadata(None), [tuple(one) for one in facts["refused"]])


def check_refused(name: str, samples: int, refused: Mapping[str, int], limit: float) -> None:
    """ValueError, with the reasons, where a larger share of the pictures than `limit` is refused."""
    if sum(refused.values()) > limit * samples:
        said = ", ".join(f"{count:,} {reason}" for reason, count in Counter(refused).most_common())
        raise ValueError(f"{name}: more than {limit:.0%} of {samples:,} pictures are refused: {said}")


def summary(made: Manifest, target: Folder) -> str:
    """A finished set in a line."""
    refused = f", {sum(made.refused.values()):,} refused" if made.refused else ""
    removed = f", {sum(made.removed.values()):,} removed as duplicates" if made.removed else ""
    size = f"{made.size / 1e6:,.1f} MB"
    where = f", at {target.absolute}"
    return f"{made.name}: {made.samples:,} pictures in {len(made.shards)} shards, {size}{refused}{removed}{where}"
