"""List files beside pictures: text as VTAB-1k's lists have it, CSV, or JSONL, of paths and labels.

Lists are read as streams, and the pictures they name are not looked at.
"""

import csv
import json
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from io import TextIOWrapper
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from shards.sources import Origin, Ranges, joined, key, listing, numbered
from shards.storage import Folder

PATHS = ("path", "file", "filename", "file_name", "image")
"""What a CSV's column or a JSON object's member of paths may be called; of several the first of these."""

LABELS = ("label", "labels", "class")
"""What those of labels may be called."""

Entry = tuple[int, str, Sequence[int | str]]
"""Number of the line, path, labels."""

_NUMBER = re.compile(r"[+-]?\d+")
_LARGEST = np.iinfo(np.int32).max
_AT_ONCE = 1 << 16


def read(origin: Origin, list_name: str, *, folder: str = "", count: int = 0) -> Ranges:
    """The pictures that a list names, in its order, each to be read whole; the list `list_name` lies in `folder` of
    `origin.source`, and its paths start from there.

    By its extension a list is CSV with a header (`.csv`), an object of JSON a line (`.jsonl`), or else lines of a
    path, a blank and a label, in which the path may hold blanks. A cell of CSV may hold several labels, with `;`
    between them, or blanks where they are numbers or the column is called `labels`. Labels are numbers, or names of
    `origin.classes`; without those, names that no list of classes knows become the classes in their order, unless
    there are to be `count` classes.

    ValueError names list and line of a label that is none or is out of range, of a path that leaves the folder and of
    a picture that is there twice; FileNotFoundError where there is no such list.
    """
    if not origin.source:
        raise ValueError(f"a folder that holds {list_name} is needed: --source")
    root = Folder(origin.source) / folder if folder else Folder(origin.source)
    where, labels, lines = f"{root.absolute}/{list_name}", _Labels(origin.classes, count), array("q")
    parts = []
    entries = _entries(root, list_name, origin.classes)
    while chunk := list(islice(entries, _AT_ONCE)):
        parts.append(_part(root, where, chunk, labels))
        lines.extend(line for line, _, _ in chunk)
    if not parts:
        raise ValueError(f"{where} names no picture")
    found = joined(root.absolute, parts, labels.classes)
    _check_different(found, lines, where)
    return labels.in_order(found)


class _Labels:
    """Numbers of labels, as they are met; names that are new are numbered too where no classes are given."""

    def __init__(self, classes: Sequence[str], count: int) -> None:
        self._known = numbered((), classes, "")
        self._count = len(classes) or count
        self._new: dict[str, int] = {}
        self._names: bool | None = None  # the first label decides

    @property
    def classes(self) -> tuple[str, ...]:
        """The names in the order of their numbers."""
        return tuple(self._known or self._new)

    def number(self, label: int | str) -> int:
        """ValueError says what is wrong with it."""
        if isinstance(label, str) and label in self._known:
            return self._known[label]
        numeral = isinstance(label, int) or bool(_NUMBER.fullmatch(label))
        if self._names is None:
            self._names = not numeral and not self._count
        if self._names and not numeral:
            return self._new.setdefault(str(label), len(self._new))
        if self._names or not numeral:
            raise ValueError(self._strange(label))
        return self._checked(int(label))

    def in_order(self, pictures: Ranges) -> Ranges:
        """The pictures with names that were met numbered in their order rather than as they were met."""
        if not self._new:
            return pictures
        names = sorted(self._new)
        order = np.empty(len(names), np.int32)
        order[[self._new[name] for name in names]] = np.arange(len(names))
        column = pictures.table["labels"].combine_chunks()
        column = pa.ListArray.from_arrays(column.offsets, pa.array(order).take(column.values))
        place = pictures.table.schema.get_field_index("labels")
        table = pictures.table.set_column(place, pictures.table.schema.field(place), column)
        return Ranges(pictures.root, pictures.files, table, tuple(names))

    def _checked(self, number: int) -> int:
        if number < 0:
            raise ValueError(f"label {number} is negative; labels start from 0")
        if number >= (self._count or _LARGEST + 1):
            raise ValueError(f"label {number} is out of range: there are {self._count or _LARGEST + 1:,} classes")
        return number

    def _strange(self, label: int | str) -> str:
        if self._known:
            return f"{label!r} is not a label: neither a number nor one of the {len(self._known):,} classes"
        kind = "name, as in the lines before" if self._new else "number"
        return f"{label!r} is not a label: no {kind}"


def _entries(root: Folder, name: str, classes: Collection[str]) -> Iterator[Entry]:
    """The entries of a list; errors of the file, and of its form, name it."""
    where = f"{root.absolute}/{name}"
    parse: Callable[[Iterable[str], Collection[str]], Iterator[Entry]]
    parse = {"csv": _csv, "jsonl": _jsonl}.get(name.rpartition(".")[2].lower(), _text)
    try:
        with root.reading(name) as data, TextIOWrapper(data, "utf-8-sig", newline="") as file:
            yield from parse(file, frozenset(classes))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8: {error.reason} at byte {error.start}") from error
    except _Malformed as error:
        raise ValueError(f"{where}, line {error.line}: {error}") from error


class _Malformed(Exception):
    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def _text(file: Iterable[str], _: Collection[str]) -> Iterator[Entry]:
    for line, text in enumerate(file, 1):
        words = text.strip().rsplit(None, 1)
        if len(words) == 1:
            raise _Malformed(line, f"{words[0]!r} has no label behind it, as in images/1.jpg 17")
        if words:
            yield line, words[0], (words[1],)


def _csv(file: Iterable[str], classes: Collection[str]) -> Iterator[Entry]:
    rows = csv.reader(file)
    try:
        header = [cell.strip().lower() for cell in next(rows, [])]
        path, label = _column(header, PATHS), _column(header, LABELS)
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) <= max(path, label):
                raise _Malformed(rows.line_num, f"{len(row)} cells, where the header has {len(header)}")
            yield rows.line_num, row[path], _cell(row[label].strip(), header[label] == "labels", classes)
    except csv.Error as error:
        raise _Malformed(rows.line_num, f"no CSV: {error}") from error


def _column(header: Sequence[str], names: Sequence[str]) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise _Malformed(1, f"no column is called {' or '.join(names)}; the header is: {', '.join(header)}")


def _cell(cell: str, several: bool, classes: Collection[str]) -> Sequence[str]:
    """The labels of a cell. Names of classes hold blanks more often than not."""
    if cell in classes:
        return (cell,)
    if ";" in cell:
        return [part.strip() for part in cell.split(";") if part.strip()]
    parts = cell.split()
    separate = several or all(part in classes or _NUMBER.fullmatch(part) for part in parts)
    return parts if separate else (cell,)


def _jsonl(file: Iterable[str], _: Collection[str]) -> Iterator[Entry]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            found = json.loads(text)
        except ValueError as error:
            raise _Malformed(line, f"no JSON: {error}") from error
        path, labels = _member(line, found, PATHS), _member(line, found, LABELS)
        labels = labels if isinstance(labels, list) else [labels]
        strange = [label for label in labels if not isinstance(label, int | str) or isinstance(label, bool)]
        if strange:
            raise _Malformed(line, f"{json.dumps(strange[0])} is not a label")
        if not isinstance(path, str):
            raise _Malformed(line, f"{json.dumps(path)} is not a path")
        yield line, path, labels


def _member(line: int, found: Any, names: Sequence[str]) -> Any:
    for name in names:
        if isinstance(found, dict) and name in found:
            return found[name]
    raise _Malformed(line, f"no object with a member {' or '.join(names)}")


def _part(root: Folder, where: str, chunk: Sequence[Entry], labels: _Labels) -> Ranges:
    paths, numbers = [], []
    for line, path, said in chunk:
        try:
            paths.append(_inside(path, root.absolute))
            numbers.append([labels.number(label) for label in said])
            if not said:
                raise ValueError(f"{path} has no label")
        except ValueError as error:
            raise ValueError(f"{where}, line {line}: {error}") from error
    count = len(paths)
    table = listing([key(path) for path in paths], np.arange(count), np.zeros(count), np.full(count, -1), numbers)
    return Ranges(root.absolute, pa.array(paths, pa.string()), table)


def _inside(path: str, root: str) -> str:
    """The path from the folder of the list; one that begins with / begins there, as does one that holds that folder."""
    plain = path.strip().replace("\\", "/").removeprefix(f"{root.rstrip('/')}/")
    parts = [part for part in plain.split("/") if part not in ("", ".")]
    if ".." in parts or "://" in plain:
        raise ValueError(f"{path} leaves the folder of the list")
    if not parts:
        raise ValueError("no path")
    return "/".join(parts)


def _check_different(pictures: Ranges, lines: Sequence[int], where: str) -> None:
    keys = pictures.table["key"]
    if len(keys.unique()) == len(keys):
        return
    first: dict[str, int] = {}
    for row, name in enumerate(keys.to_pylist()):
        before = first.setdefault(name, row)
        if before != row:
            path, other = pictures.files[row].as_py(), pictures.files[before].as_py()
            what = "is there twice" if path == other else f"has the key {name} of {other}"
            raise ValueError(f"{where}, line {lines[row]}: {path} {what} (line {lines[before]})")
