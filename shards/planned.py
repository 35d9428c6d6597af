"""The plan of a build on disk: a Parquet file with a row a picture and a row group a shard.

It is written once, from the listing of the source; whoever goes on with the build works from it, so a source that is
large or far away is listed once. What the listing has to keep is checked here: no two pictures of one key, no label
outside the classes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.plan import Plan
from shards.sources import LISTING, Picture, Pictures, Ranges

# Its functions are made when it is imported, where no type checker sees them.
pc: Any = pyarrow.compute

SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),  # number in the listing
        ("key", pa.string()),
        ("source", pa.string()),  # the file that holds it; empty where the source is no files
        ("offset", pa.int64()),
        ("length", pa.int64()),  # in bytes; -1 is all of the file
        ("labels", LISTING.field("labels").type),
        ("shard", pa.int32()),
        ("place", pa.int32()),
    ]
)
_FACTS = b"vitscale"
_STEP = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What holds for all of a plan: how many pictures were listed, the listing's digest, the classes, the root of the
    files, and whether the pictures are ranges of files at all."""

    listed: int
    digest: str
    classes: tuple[str, ...]
    root: str
    ranges: bool


@dataclass(frozen=True)
class Labelled:
    """Pictures with other labels than their source says."""

    pictures: Pictures
    labels: list[list[int]]

    def __iter__(self) -> Iterator[Picture]:
        for picture, labels in zip(self.pictures, self.labels, strict=True):
            yield Picture(picture.key, picture.data, tuple(labels))


class Planned:
    """A plan that was written; `pictures` is needed again only where the source is no files."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path, memory_map=True)
        values = json.loads(self._file.schema_arrow.metadata[_FACTS])
        self.plan = Plan(**values.pop("plan"))
        self.facts = Facts(**{**values, "classes": tuple(values["classes"])})

    def shard(self, number: int, pictures: Pictures | None) -> Ranges | Labelled:
        """The pictures of a shard, in the order of the tar."""
        rows = self._file.read_row_group(number)
        if pictures is not None:
            return Labelled(pictures.take(rows["sample"].to_numpy()), rows["labels"].to_pylist())
        sources = rows["source"].combine_chunks().dictionary_encode()
        columns = [rows["key"], sources.indices, rows["offset"], rows["length"], rows["labels"]]
        table = pa.Table.from_arrays([_one(column) for column in columns], schema=LISTING)
        return Ranges(self.facts.root, sources.dictionary, table)


def _one(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def write(
    pictures: Pictures,
    facts: Facts,
    plan: Plan,
    path: Path,
    *,
    kept: NDArray[np.int64] | None = None,
    labels: pa.Array | None = None,
) -> None:
    """Write the plan of the pictures whose numbers are `kept`, all if None, with these labels if they are given."""
    table = pictures.table.combine_chunks()
    if labels is not None:
        table = table.set_column(table.schema.get_field_index("labels"), LISTING.field("labels"), labels)
    files = pictures.files if isinstance(pictures, Ranges) else pa.array([""])
    values = {**facts.__dict__, "classes": list(facts.classes), "plan": plan.__dict__}
    schema = SCHEMA.with_metadata({_FACTS: json.dumps(values).encode()})
    with pq.ParquetWriter(path, schema, use_dictionary=cast(bool, ["source"])) as writer:
        for shard in range(plan.shards):
            numbers = plan.numbers(shard)
            numbers = numbers if kept is None else kept[numbers]
            rows = table.take(pa.array(numbers))
            columns = {
                "sample": pa.array(numbers),
                "key": rows["key"],
                "source": files.take(_one(rows["file"])),
                "offset": rows["offset"],
                "length": rows["size"],
                "labels": rows["labels"],
                "shard": pa.array(np.full(len(numbers), shard, np.int32)),
                "place": pa.array(np.arange(len(numbers), dtype=np.int32)),
            }
            group = pa.table([_one(columns[name]) for name in SCHEMA.names], schema)
            writer.write_table(group, row_group_size=max(1, len(numbers)))


def checked(pictures: Pictures, classes: tuple[str, ...], where: str) -> Facts:
    """What there is to say of a listing; ValueError where two pictures have one key or a label fits no class."""
    table = pictures.table
    if not table.num_rows:
        raise ValueError(f"{where} has no pictures")
    classes = classes or pictures.classes or _numbers(table)
    _check_labels(table, classes, where)
    ranges = isinstance(pictures, Ranges)
    root = pictures.root if isinstance(pictures, Ranges) else ""
    return Facts(table.num_rows, _digest(pictures, where), classes, root, ranges)


def _numbers(table: pa.Table) -> tuple[str, ...]:
    """The classes of a source that knows no names."""
    most = pc.max(pc.list_flatten(table["labels"])).as_py()
    return tuple(str(number) for number in range((most if most is not None else -1) + 1))


def _check_labels(table: pa.Table, classes: tuple[str, ...], where: str) -> None:
    labels = pc.list_flatten(table["labels"])
    least, most = (pc.min_max(labels)[name].as_py() for name in ("min", "max"))
    if least is None or (least >= 0 and most < len(classes)):
        return
    label = least if least < 0 else most
    parent = pc.list_parent_indices(table["labels"]).to_numpy()
    picture = table["key"][int(parent[np.flatnonzero(labels.to_numpy() == label)[0]])].as_py()
    raise ValueError(f"{where}: picture {picture} has the label {label}, there are {len(classes)} classes")


def _digest(pictures: Pictures, where: str) -> str:
    """The sha256 of a listing; ValueError where a key is there twice."""
    found, table = sha256(), pictures.table
    hashes = np.empty(table.num_rows, np.int64)
    for start in range(0, table.num_rows, _STEP):
        rows = table.slice(start, _STEP).combine_chunks()
        keys = rows["key"].to_pylist()
        hashes[start : start + len(keys)] = np.fromiter(map(hash, keys), np.int64, len(keys))
        found.update("\n".join(keys).encode())
        for column in ("file", "offset", "size"):
            found.update(rows[column].to_numpy().tobytes())
        found.update(pc.list_value_length(rows["labels"]).to_numpy().tobytes())
        found.update(pc.list_flatten(rows["labels"]).to_numpy().tobytes())
    _check_keys(pictures, table, hashes, where)
    return found.hexdigest()


def _check_keys(pictures: Pictures, table: pa.Table, hashes: NDArray[np.int64], where: str) -> None:
    """By their hashes, as millions of strings are slow to compare; what hashes alike is then compared itself."""
    order = np.sort(hashes)
    twice = order[1:][order[1:] == order[:-1]]
    if not len(twice):
        return
    numbers = np.flatnonzero(np.isin(hashes, twice))
    keys = table["key"].take(pa.array(numbers)).to_pylist()
    seen: dict[str, int] = {}
    for number, key in zip(numbers.tolist(), keys, strict=True):
        if key in seen:
            first, second = (_place(pictures, one) for one in (seen[key], number))
            raise ValueError(f"{where} has two pictures of the key {key!r}: {first} and {second}")
        seen[key] = number


def _place(pictures: Pictures, number: int) -> str:
    """Where a picture lies, for people."""
    if not isinstance(pictures, Ranges):
        return f"number {number}"
    url, offset, size = pictures.place(number)
    return url if size < 0 or not offset else f"{url} at byte {offset:,}"
