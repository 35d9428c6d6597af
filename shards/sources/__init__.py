"""Where pictures come from, one file a format; and what every source gives: pictures that can be taken by number.

There are two kinds. `Ranges` are encoded pictures that lie somewhere as runs of bytes (files, members of tars), listed
without being read, so that a corpus of any size is planned from its listing. `Arrays` are pixels that a small data set
brings in one piece.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from shards.storage import Folder

# Its functions are made when it is imported, where no type checker sees them.
pc: Any = pyarrow.compute

LISTING = pa.schema(
    [
        ("key", pa.string()),
        ("file", pa.int32()),  # number of the file that holds it
        ("offset", pa.int64()),  # of its first byte in that file
        ("size", pa.int64()),  # in bytes; -1 is all of the file
        ("labels", pa.list_(pa.int32())),
    ]
)

PICTURES = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm"})
"""Extensions, in lower case, of files that are taken for pictures."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")

Spread = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterable[Any]]
"""Does `work(*argument)` for each argument, perhaps on many machines; the results come in the arguments' order."""


def serially(work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """The simplest `Spread`: one after the other, here."""
    return (work(*argument) for argument in arguments)


@dataclass(frozen=True)
class Origin:
    """What a source is told by who asks for its pictures."""

    source: str = ""
    """A folder, file or URL; the usual place of the data set if empty."""
    downloads: Folder = field(default_factory=lambda: Folder("."))
    """Keeps what has to be fetched or unpacked."""
    spread: Spread = serially
    """Does the parts of a large listing."""
    classes: tuple[str, ...] = ()
    """Names of the classes in their order, where the user gives them."""
    keep_sound: bool = False
    """Take what is sound of a damaged file, rather than raise."""
    say: Callable[[str], None] = print
    """Is told, a line each, what a person should know: what is skipped, fetched, unpacked."""


@dataclass(frozen=True)
class Picture:
    """One picture of a source: pixels (height, width[, 3]) of bytes, or an encoded file's bytes."""

    key: str
    """Its name in the source, the same on every run, without dots or slashes."""
    data: bytes | NDArray[np.uint8]
    labels: tuple[int, ...]


class Pictures(Protocol):
    """Pictures numbered from 0.

    The job that plans holds all of them and sends each task what `take` gives, so a source whose pictures lie in a
    bucket holds names and offsets and reads when it is iterated over.
    """

    @property
    def table(self) -> pa.Table:
        """A row a picture, with the columns of `LISTING`."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, as the source knows them; empty where it does not."""
        ...

    def __len__(self) -> int: ...

    def take(self, numbers: NDArray[np.int64]) -> "Pictures":
        """The pictures of these numbers, in this order, carrying no others along."""
        ...

    def __iter__(self) -> Iterator[Picture]: ...


@dataclass(frozen=True)
class Arrays:
    """Pictures of one size that are in memory: pixels (n, height, width[, 3]) of bytes, one label each."""

    keys: Sequence[str]
    pixels: NDArray[np.uint8]
    labels: NDArray[Any]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.pixels) == len(self.labels):
            counts = f"{len(self.keys)} keys, {len(self.pixels)} pictures and {len(self.labels)} labels"
            raise ValueError(f"{counts} do not belong together")

    @property
    def table(self) -> pa.Table:
        """A row a picture; the offset is its number, as there are no files."""
        count = len(self)
        return listing(self.keys, np.zeros(count), np.arange(count), np.full(count, -1), self.labels[:, None])

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, numbers: NDArray[np.int64]) -> "Arrays":
        """The pictures of these numbers, in this order, copied."""
        keys = [self.keys[int(number)] for number in numbers]
        return Arrays(keys, self.pixels[numbers], self.labels[numbers], self.classes)

    def __iter__(self) -> Iterator[Picture]:
        for key, pixels, label in zip(self.keys, self.pixels, self.labels, strict=True):
            yield Picture(key, pixels, (int(label),))


@dataclass(frozen=True)
class Ranges:
    """Encoded pictures, each a run of bytes of one of `files`; read only when it is iterated over."""

    root: str
    """Folder or URL that the names of files are relative to."""
    files: pa.Array
    """Names of the files, as strings; a name that is a path from / or a URL stands for itself."""
    table: pa.Table
    """A row a picture, with the columns of `LISTING`."""
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.table.num_rows

    def take(self, numbers: NDArray[np.int64]) -> "Ranges":
        """The pictures of these numbers, in this order, with the names of their files alone."""
        rows = self.table.take(pa.array(numbers)).combine_chunks()
        used, file = np.unique(rows["file"].to_numpy(), return_inverse=True)
        place = rows.schema.get_field_index("file")
        rows = rows.set_column(place, "file", pa.array(file.astype(np.int32)))
        return Ranges(self.root, self.files.take(pa.array(used)), rows, self.classes)

    def __iter__(self) -> Iterator[Picture]:
        from shards.sources.ranges import read  # it knows this class

        columns = self.table.select(["key", "labels"]).to_pydict()
        for key, labels, data in zip(columns["key"], columns["labels"], read(self), strict=True):
            yield Picture(key, data, tuple(labels))

    def place(self, number: int) -> tuple[str, int, int]:
        """URL, offset and size of a picture; ValueError or OSError name a place by them."""
        row = self.table.slice(number, 1).to_pylist()[0]
        return located(self.root, self.files[row["file"]].as_py()), row["offset"], row["size"]


def joined(root: str, parts: Sequence[Ranges], classes: tuple[str, ...] = ()) -> Ranges:
    """Several listings under one root, one behind the other."""
    first = np.cumsum([0, *(len(part.files) for part in parts)])
    tables = []
    for start, part in zip(first.tolist(), parts, strict=False):
        place = part.table.schema.get_field_index("file")
        column = pc.add(part.table["file"], pa.scalar(start, pa.int32()))
        tables.append(part.table.set_column(place, LISTING.field("file"), column))
    files = pa.concat_arrays([part.files.cast(pa.string()) for part in parts]) if parts else pa.array([], pa.string())
    return Ranges(root, files, pa.concat_tables([LISTING.empty_table(), *tables]), classes)


def listing(keys: Any, file: Any, offset: Any, size: Any, labels: Any) -> pa.Table:
    """A table of `LISTING` from columns; `labels` holds a sequence of numbers for each picture."""
    columns = (
        pa.array(keys, pa.string()),
        pa.array(np.asarray(file, np.int32)),
        pa.array(np.asarray(offset, np.int64)),
        pa.array(np.asarray(size, np.int64)),
        _lists(labels),
    )
    return pa.Table.from_arrays(list(columns), schema=LISTING)


def _lists(labels: Any) -> pa.Array:
    if isinstance(labels, np.ndarray):
        flat = pa.array(labels.astype(np.int32).reshape(-1))
        return pa.ListArray.from_arrays(np.arange(len(labels) + 1, dtype=np.int32) * labels.shape[1], flat)
    return pa.array(labels, LISTING.field("labels").type)


def located(root: str, name: str) -> str:
    """The path or URL of a file that is named relative to `root`."""
    return name if "://" in name or name.startswith("/") else f"{root.rstrip('/')}/{name}"


def key(path: str) -> str:
    """What a picture is called in a shard: its path without the extension, in letters, digits, - and _.

    The folder is left out where the name begins with it, as ImageNet's do (`n01440764/n01440764_18.JPEG`). Where
    characters had to be replaced, or the path is long, a digest of it follows, so that different paths stay different.
    """
    stem, dot, extension = path.rpartition(".")
    if not dot or "/" in extension:
        stem = path
    folder, _, name = stem.rpartition("/")
    if folder and name.startswith(f"{folder.rpartition('/')[2]}_"):
        stem = name
    safe = _UNSAFE.sub("_", stem.strip("/").replace("/", "-"))
    if safe == stem.replace("/", "-") and len(safe) <= 90:
        return safe
    return f"{safe[:70]}-{blake2b(path.encode(), digest_size=6).hexdigest()}"


def is_picture(path: str) -> bool:
    """Whether the extension is one of a picture's; hidden files are none."""
    name = path.rpartition("/")[2]
    return not name.startswith(".") and name.rpartition(".")[2].lower() in PICTURES


def numbered(names: Sequence[str], classes: Sequence[str], where: str) -> dict[str, int]:
    """The number of each of `names` in `classes`; ValueError names the first that is in no class list."""
    numbers = {name: number for number, name in enumerate(classes)}
    if len(numbers) != len(classes):
        raise ValueError(f"the class list has a name twice: {len(classes)} names, {len(numbers)} different ones")
    strange = [name for name in names if name not in numbers]
    if strange:
        raise ValueError(
            f"{where} has {len(strange)} classes that the class list of {len(classes)} does not have: {strange[0]}"
        )
    return numbers
