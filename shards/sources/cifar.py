"""CIFAR-10 and CIFAR-100 in the two versions of https://www.cs.toronto.edu/~kriz/cifar.html, python and binary.

A picture is 32 x 32 bytes of red, then of green, then of blue, row by row. The binary version puts the label before
each picture as one byte (two in CIFAR-100, of which the second counts); the python version pickles a whole batch. Both
have the pictures in the same order.

Unpickling runs what a pickle asks for, so it is given nothing to run: the few names that these files hold stand for
things of this file, and any other is refused.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.sources import Arrays
from shards.sources.archives import apart, members
from shards.storage import Folder

SIDE = 32
SIZE = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Version:
    """Where one version of the data keeps what."""

    archive: str
    folder: str
    """In the archive."""
    batches: Mapping[str, tuple[str, ...]]
    """By split, in their order."""
    names: str
    """The file with the names of the classes."""


@dataclass(frozen=True)
class Kind:
    """CIFAR-10 or CIFAR-100."""

    python: Version
    binary: Version
    labels: bytes
    """The labels' name in a pickled batch."""
    names: bytes
    """The class names' name in a pickle."""
    before: int
    """Bytes of labels before a picture in the binary version; the last counts."""


TEN = Kind(
    Version(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        "batches.meta",
    ),
    Version(
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)},
        "batches.meta.txt",
    ),
    b"labels",
    b"label_names",
    1,
)
HUNDRED = Kind(
    Version("cifar-100-python.tar.gz", "cifar-100-python", {"train": ("train",), "test": ("test",)}, "meta"),
    Version(
        "cifar-100-binary.tar.gz",
        "cifar-100-binary",
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt",
    ),
    b"fine_labels",
    b"fine_label_names",
    2,
)


def read(source: str, split: str, kind: Kind, classes: Sequence[str]) -> Arrays:
    """The pictures (n, 32, 32, 3) of `train` or `test`, the same from either version.

    The source is an archive, the folder that it unpacks to, or a folder that holds one of them. ValueError, naming the
    file, where one is damaged or something else, or its class names are not `classes`; FileNotFoundError where there is
    none.
    """
    version, files, where = _found(source, split, kind)
    if version.names in files:
        _check_names(files[version.names], version, kind, tuple(classes), f"{where}/{version.names}")
    decode = _pickled if version is kind.python else _records
    parts = [decode(files[name], kind, f"{where}/{name}") for name in version.batches[split]]
    pixels, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    _check_labels(parts, [f"{where}/{name}" for name in version.batches[split]], len(classes))
    pictures = np.ascontiguousarray(np.moveaxis(pixels.reshape(-1, 3, SIDE, SIDE), 1, 3))
    return Arrays([f"{split}-{number:05}" for number in range(len(labels))], pictures, labels)


def _found(source: str, split: str, kind: Kind) -> tuple[Version, dict[str, bytes], str]:
    """The version that is there, the bytes of its files by name, and where they lie."""
    if source.endswith((".tar.gz", ".tgz", ".tar")):
        return _in_archive(*apart(source), split, kind)
    folder, versions = Folder(source), (kind.python, kind.binary)
    for version in versions:
        for place in (folder, folder / version.folder):
            if place.exists(version.batches[split][0]):
                names = [name for name in (version.names,) if place.exists(name)]
                return version, {name: place.read(name) for name in (*version.batches[split], *names)}, place.absolute
    for version in versions:
        if folder.exists(version.archive):
            return _in_archive(folder, version.archive, split, kind)
    wanted = " nor ".join(f"{version.archive} nor {version.batches[split][0]}" for version in versions)
    raise FileNotFoundError(f"{folder.absolute} holds neither {wanted}")


def _in_archive(folder: Folder, archive: str, split: str, kind: Kind) -> tuple[Version, dict[str, bytes], str]:
    where = f"{folder.absolute}/{archive}"
    versions = (kind.python, kind.binary)
    wanted = {name for version in versions for name in (*version.batches[split], version.names)}
    paths = ((path.rpartition("/")[2], data) for path, data in members(folder, archive))
    files = {name: data for name, data in paths if name in wanted}
    for version in versions:
        missing = [name for name in version.batches[split] if name not in files]
        if len(missing) < len(version.batches[split]):
            if missing:
                raise ValueError(f"{where} holds no {missing[0]}; fetch it again")
            return version, files, where
    raise ValueError(f"{where} holds neither {' nor '.join(version.batches[split][0] for version in versions)}")


def _pickled(data: bytes, kind: Kind, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels (n, 3072) and labels of a batch of the python version."""
    batch = unpickled(data, where)
    pixels = batch.get(b"data")
    labels = batch.get(kind.labels)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != SIZE:
        raise ValueError(f"{where} is no batch of CIFAR: b'data' is no array (n, {SIZE})")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{where} is no batch of this CIFAR: {kind.labels!r} is no list of numbers")
    if len(labels) != len(pixels):
        raise ValueError(f"{where} holds {len(pixels):,} pictures and {len(labels):,} labels")
    return pixels, np.array(labels, np.int64)


def _records(data: bytes, kind: Kind, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels (n, 3072) and labels of a file of the binary version."""
    size = kind.before + SIZE
    if not data or len(data) % size:
        raise ValueError(f"{where} has {len(data):,} bytes, not a multiple of a record's {size:,}; fetch it again")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    return records[:, kind.before :], records[:, kind.before - 1].astype(np.int64)


def _check_labels(parts: Sequence[tuple[Any, NDArray[np.int64]]], places: Sequence[str], count: int) -> None:
    for (_, labels), where in zip(parts, places, strict=True):
        strange = (labels < 0) | (labels >= count)
        if strange.any():
            place = int(strange.argmax())
            raise ValueError(f"{where}: picture {place:,} has the label {labels[place]}, there are {count} classes")


def _check_names(data: bytes, version: Version, kind: Kind, classes: tuple[str, ...], where: str) -> None:
    if version is kind.python:
        listed = unpickled(data, where).get(kind.names)
        raw = listed if isinstance(listed, list) else []
    else:
        raw = data.split()
    names = tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in raw)
    if names != classes:
        raise ValueError(f"{where} does not name the {len(classes)} classes of this data set: {', '.join(names)[:80]}")


def unpickled(data: bytes, where: str) -> dict[Any, Any]:
    """The dictionary in a pickle, made of numbers, bytes, lists and arrays of bytes; nothing that it names is run.

    Strings of Python 2 are bytes. ValueError, naming the file and the name that it asks for, where the pickle holds
    anything else, or is damaged.
    """
    try:
        found = _Unpickler(BytesIO(data), encoding="bytes").load()
        held = {name: value.array() if isinstance(value, _Array) else value for name, value in found.items()}
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{where} is not a pickle of CIFAR: {error}") from error
    return held


class _Type:
    """What stands for a numpy.dtype; only that of bytes is one."""

    def __init__(self, name: bytes | str, *_: object) -> None:
        if name not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of {name!r}, not of bytes")

    def __setstate__(self, state: object) -> None:
        """The byte order and the like, which bytes do not have."""


class _Array:
    """What stands for a numpy.ndarray: its shape, whether by columns, and its bytes, as numpy writes them."""

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> NDArray[np.uint8]:
        _, shape, kind, by_column, data = self.state
        if not isinstance(kind, _Type):
            raise pickle.UnpicklingError("an array without a type")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_column else "C")


def _encoded(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into a pickle that Python 2 can read."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encoded,
}


class _Unpickler(pickle.Unpickler):
    """Knows the names that an array of bytes needs, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]
