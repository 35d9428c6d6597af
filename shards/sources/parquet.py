"""Parquet with embedded pictures, as the Hugging Face hub has it: a column of structs of bytes and path, and labels.

Data sets there are cut into files like `train-00000-of-00041.parquet`, and name their classes in the schema's metadata
(https://huggingface.co/docs/datasets/about_dataset_features). Listing reads labels and paths alone.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.sources import LISTING, Origin, Picture, key, listing, numbered
from shards.sources.folders import directly
from shards.storage import Folder

IMAGES = ("image", "img")
"""What the column of pictures may be called; the only one that can be it may have any name."""

LABELS = ("label", "labels", "fine_label", "cls", "class")
"""What the column of labels may be called; of several the first of these."""

_LISTS = LISTING.field("labels").type
_SPLIT = re.compile(r"(.*?)(?:[-_.]\d+)?(?:-of-(\d+))?(?:-[0-9a-f]{16})?\.parquet", re.IGNORECASE)
_AT_ONCE = 4096


@dataclass(frozen=True)
class Rows:
    """Encoded pictures, each a row of one of `files`; read only when it is iterated over."""

    root: str
    """Folder or URL that the names of files are relative to."""
    files: pa.Array
    """Names of the files, as strings."""
    table: pa.Table
    """A row a picture, with the columns of `LISTING`; the offset is the row's number in its file, the size -1."""
    column: str
    """Path, in the schema of Parquet, of the bytes of pictures."""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.table.num_rows

    def take(self, numbers: NDArray[np.int64]) -> "Rows":
        """The pictures of these numbers, in this order, with the names of their files alone."""
        rows = self.table.take(pa.array(numbers)).combine_chunks()
        used, file = np.unique(rows["file"].to_numpy(), return_inverse=True)
        place = rows.schema.get_field_index("file")
        rows = rows.set_column(place, LISTING.field("file"), pa.array(file.astype(np.int32)))
        return Rows(self.root, self.files.take(pa.array(used)), rows, self.column, self.classes)

    def __iter__(self) -> Iterator[Picture]:
        """The pictures in order; a row without bytes gives none (`b""`).

        Each row group that is needed is read once. What is asked of it waits on the local disk until its turn, so that
        memory holds one row group, and the disk no more than what is still to come of groups that were begun.
        ValueError, naming the file, where one is damaged or has become shorter since it was listed.
        """
        with TemporaryDirectory(prefix="pictures-") as folder:
            groups, number = _Groups(self, Path(folder)), 0
            for batch in self.table.select(["key", "labels"]).to_batches(max_chunksize=_AT_ONCE):
                for row in batch.to_pylist():
                    yield Picture(row["key"], groups.data(number), tuple(row["labels"]))
                    number += 1


class _Groups:
    """The row groups that hold certain rows: each is read when first asked for, and what is wanted of it is kept in a
    file until all of that has been asked for."""

    def __init__(self, rows: Rows, kept: Path) -> None:
        self._rows, self._kept = rows, kept
        self._file = rows.table["file"].to_numpy()
        self._row = rows.table["offset"].to_numpy().copy()  # becomes the row in its group
        group = np.zeros(len(self._row), np.int64)
        for file in np.unique(self._file):
            here = self._file == file
            group[here], self._row[here] = self._located(int(file), self._row[here])
        pairs = np.stack([self._file, group])
        self._groups, self._of, self._left = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
        self._of = self._of.reshape(-1)
        self._order = np.argsort(self._of, kind="stable")
        self._first = np.cumsum([0, *self._left])
        self._spans: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def data(self, number: int) -> bytes:
        """The bytes of a picture, by its number; each may be asked for once."""
        group = int(self._of[number])
        if group not in self._spans:
            self._spans[group] = self._read(group)
        wanted, starts = self._spans[group]
        place = int(np.searchsorted(wanted, self._row[number]))
        with self._path(group).open("rb") as file:
            file.seek(starts[place])
            found = file.read(starts[place + 1] - starts[place])
        self._left[group] -= 1
        if not self._left[group]:
            self._path(group).unlink()
            del self._spans[group]
        return found

    def _read(self, group: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Keep what is wanted of a group; its rows, in order, and where the bytes of each start and the last end."""
        wanted = np.unique(self._row[self._order[self._first[group] : self._first[group + 1]]])
        file, number = self._groups[:, group].tolist()
        ends = [0]
        with _opened(self._rows.root, self._name(file)) as parquet, self._path(group).open("wb") as kept:
            column = parquet.read_row_group(number, columns=[self._rows.column]).column(0)
            if pa.types.is_struct(column.type):
                (column,) = column.flatten()
            for row in wanted.tolist():
                ends.append(ends[-1] + kept.write(column[row].as_buffer() or b""))
        return wanted, np.array(ends)

    def _located(self, file: int, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Group, and row in it, of rows of a file."""
        with _opened(self._rows.root, self._name(file)) as parquet:
            meta = parquet.metadata
            ends = np.cumsum([meta.row_group(number).num_rows for number in range(meta.num_row_groups)])
        if rows.max() >= meta.num_rows:
            where = f"{self._rows.root}/{self._name(file)}"
            raise ValueError(f"{where} has {meta.num_rows:,} rows, and row {rows.max()} was listed: it has changed")
        group = np.searchsorted(ends, rows, side="right")
        return group, rows - np.concatenate([[0], ends])[group]

    def _name(self, file: int) -> str:
        return self._rows.files[file].as_py()

    def _path(self, group: int) -> Path:
        return self._kept / str(group)


@dataclass(frozen=True)
class Part:
    """What the listing of a file gives."""

    column: str
    labels: pa.Array
    """A list of numbers a row."""
    keys: pa.Array | None
    """Made of the paths that come with the pictures; None where one has none."""
    classes: tuple[str, ...]
    """As the file's metadata name them."""


def read(origin: Origin, prefix: str = "") -> Rows:
    """The pictures of a Parquet file, or of those files of a folder whose names begin with the split `prefix`.

    The order is that of the names of files, then of rows. Classes are `origin.classes`, else those of the files; where
    these are the same in another order, labels follow them. Keys come from the paths of the pictures where those tell
    all of them apart, else from file and row. ValueError, naming the file, where it is no Parquet file, has no column
    of pictures or of labels, a row with no label or with one out of range, or where one of a series of files is
    missing; FileNotFoundError where there is none.
    """
    root, names = _files(origin, prefix)
    parts: list[Part] = list(origin.spread(listed, [(root, name) for name in names]))
    for name, part in zip(names, parts, strict=True):
        if (part.column, part.classes) != (parts[0].column, parts[0].classes):
            raise ValueError(f"{root}/{name} has other columns or classes than {names[0]}; choose those of one split")
    classes, order = _classes(origin.classes, parts[0].classes, f"{root}/{names[0]}")
    labels = [_numbered(part.labels, order, classes, f"{root}/{n}") for n, part in zip(names, parts, strict=True)]
    counts = [len(part.labels) for part in parts]
    if not sum(counts):
        raise ValueError(f"{root}/{names[0]} holds no rows")
    rows = np.concatenate([np.arange(count) for count in counts])
    files = np.repeat(np.arange(len(names)), counts)
    table = listing(_keys(names, parts), files, rows, np.full(len(rows), -1), pa.concat_arrays(labels))
    return Rows(root, pa.array(names, pa.string()), table, parts[0].column, classes)


def listed(root: str, name: str) -> Part:
    """Labels and paths of one file."""
    where = f"{root}/{name}"
    with _opened(root, name) as parquet:
        schema = parquet.schema_arrow
        image, label = _image(schema, where), _label(schema, where)
        struct = pa.types.is_struct(image.type)
        path = struct and image.type.get_field_index("path") >= 0
        found = parquet.read(columns=[label.name, *([f"{image.name}.path"] if path else [])])
    keys = None
    if path:
        (paths,) = found[image.name].flatten()
        keys = None if paths.null_count else pa.array([key(each) for each in paths.to_pylist()], pa.string())
    column = f"{image.name}.bytes" if struct else image.name
    return Part(column, _lists(found[label.name], where), keys, _names(schema, label.name))


@contextmanager
def _opened(root: str, name: str) -> Iterator[pq.ParquetFile]:
    """A file of Parquet; ValueError, naming it, where it is none or is damaged."""
    where = f"{root}/{name}"
    try:
        with Folder(root).reading(name) as file:
            yield pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where} is no Parquet file, or is damaged: {_line(error)}") from error
    except OSError as error:
        # What Arrow finds wrong with bytes is an OSError that has neither a number nor, as a store's has, a cause.
        if type(error) is OSError and error.errno is None and error.__cause__ is None:
            raise ValueError(f"{where} is damaged: {_line(error)}") from error
        raise


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _files(origin: Origin, prefix: str) -> tuple[str, list[str]]:
    """The folder and, in order, the names of the files."""
    if not origin.source:
        raise ValueError("a Parquet file, or a folder of them, is needed: --source")
    if origin.source.lower().endswith(".parquet"):
        root, _, name = Folder(origin.source).absolute.rpartition("/")
        return root, [name]
    folder = Folder(origin.source)
    folders, files = directly(folder)
    there = [name for name in files if name.lower().endswith(".parquet") and not name.startswith(".")]
    # `train` is not to choose `train_extra` or `trainval`.
    chosen = [name for name in there if re.match(rf"{re.escape(prefix)}(?!_?[A-Za-z])", name)] if prefix else there
    if not chosen:
        called = f" called {prefix}" if prefix else ""
        others = (
            f"; its files: {', '.join(there[:3])}" if there else f"; its folders: {', '.join(folders[:5]) or 'none'}"
        )
        raise FileNotFoundError(f"{folder.absolute} holds no Parquet files{called}{others}")
    _check_whole(folder.absolute, chosen)
    splits = sorted({_split(name) for name in chosen})
    if len(splits) > 1:
        origin.say(f"{folder.absolute}: files of {', '.join(splits)} are taken together")
    return folder.absolute, chosen


def _split(name: str) -> str:
    found = _SPLIT.fullmatch(name)
    return found[1].strip("0123456789-_.") if found else ""


def _check_whole(root: str, names: Sequence[str]) -> None:
    """Raise where a series says of itself that it has more files than are there."""
    said: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if (found := _SPLIT.fullmatch(name)) and found[2]:
            said.setdefault((found[1], int(found[2])), []).append(name)
    for (split, count), there in said.items():
        if len(there) < count:
            raise ValueError(
                f"{root} holds {len(there)} of the {count} files of {split or 'its series'}: fetch the rest"
            )


def _image(schema: pa.Schema, where: str) -> pa.Field:
    fields = list(schema)
    structs = [field for field in fields if pa.types.is_struct(field.type) and _of_bytes(field.type)]
    plain = [field for field in fields if _is_binary(field.type)]
    named = [field for name in IMAGES for field in (*structs, *plain) if field.name == name]
    for found in (named[:1], structs, plain):
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"{where} has no column of pictures, called {' or '.join(IMAGES)}; its columns: {_described(schema)}"
    )


def _of_bytes(struct: Any) -> bool:
    place = struct.get_field_index("bytes")
    return place >= 0 and _is_binary(struct.field(place).type)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _label(schema: pa.Schema, where: str) -> pa.Field:
    for name in LABELS:
        if schema.get_field_index(name) >= 0:
            found = schema.field(name)
            if pa.types.is_integer(_element(found.type)):
                return found
            raise ValueError(f"{where}: labels in the column {name} are {found.type}; they have to be integers")
    raise ValueError(
        f"{where} has no column of labels, called {' or '.join(LABELS)}; its columns: {_described(schema)}"
    )


def _element(kind: Any) -> pa.DataType:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if lists else kind


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Names of the classes, by the features that the hub's library keeps in the schema."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = said.get("info", {}).get("features", {}).get(label, {})
        while "names" not in feature:  # several labels a picture: the feature of one is wrapped up
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        return tuple(map(str, feature["names"]))
    except (ValueError, KeyError, AttributeError, TypeError, IndexError):
        return ()


def _lists(column: pa.ChunkedArray, where: str) -> pa.Array:
    """A list of numbers a row; ValueError names the first row that has none."""
    whole = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    element = _element(whole.type)
    if element == whole.type:
        flat, counts = whole.drop_null(), whole.is_valid().to_numpy(False).astype(np.int64)
    else:
        lists = whole.cast(pa.large_list(element))
        flat, counts = lists.flatten(), np.diff(lists.offsets.to_numpy()) * lists.is_valid().to_numpy(False)
    if not counts.all():
        raise ValueError(f"{where}, row {int(np.argmin(counts))}: no label")
    if flat.null_count:
        raise ValueError(f"{where}: a label among several is null")
    try:
        return pa.ListArray.from_arrays(np.cumsum([0, *counts], dtype=np.int32), flat.cast(pa.int32())).cast(_LISTS)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where} has a label out of range: {_line(error)}") from error


def _classes(
    given: Sequence[str], found: Sequence[str], where: str
) -> tuple[tuple[str, ...], NDArray[np.int32] | None]:
    """Names of the classes, and what becomes of each number; None where they stay."""
    if not given or tuple(given) == tuple(found):
        return tuple(given or found), None
    if found and len(given) != len(found):
        raise ValueError(f"{where} has {len(found):,} classes, the class list {len(given):,}")
    if set(given) == set(found):
        numbers = numbered(found, given, where)
        return tuple(given), np.array([numbers[name] for name in found], np.int32)
    return tuple(given), None


def _numbered(labels: pa.Array, order: NDArray[np.int32] | None, classes: Sequence[str], where: str) -> pa.Array:
    """Labels by the order of classes; ValueError names the first row of one that is out of range."""
    flat = labels.values.to_numpy()
    bad = np.flatnonzero((flat < 0) | (flat >= (len(classes) or np.iinfo(np.int32).max)))
    if len(bad):
        row = int(np.searchsorted(labels.offsets.to_numpy(), bad[0], side="right")) - 1
        what = "a split without labels?" if flat[bad[0]] < 0 else f"there are {len(classes):,} classes"
        raise ValueError(f"{where}, row {row}: label {flat[bad[0]]} is out of range: {what}")
    if order is None:
        return labels
    return pa.ListArray.from_arrays(labels.offsets, pa.array(order[flat])).cast(_LISTS)


def _keys(names: Sequence[str], parts: Sequence[Part]) -> pa.Array:
    by_path = [part.keys for part in parts if part.keys is not None]
    if len(by_path) == len(parts):
        keys = pa.concat_arrays(by_path)
        if len(keys.unique()) == len(keys):
            return keys
    stems = [key(name) for name in names]
    made = [f"{stem}-{row:06}" for stem, part in zip(stems, parts, strict=True) for row in range(len(part.labels))]
    return pa.array(made, pa.string())
