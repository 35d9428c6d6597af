"""ImageNet as the ILSVRC 2012 challenge has it, from the tars as they are downloaded."""

import re
import tarfile
import zlib
from dataclasses import replace
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from shards.datasets import Dataset
from shards.sources import Origin, Ranges, listing, numbered, tars
from shards.storage import Folder

TRAIN = "ILSVRC2012_img_train.tar"
VALIDATION = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})$")
LICENCE = "non-commercial research (image-net.org)"
CITATION = "Russakovsky et al. 2015, International Journal of Computer Vision 115(3), arXiv:1409.0575"


def read(split: str, origin: Origin) -> Ranges:
    """The pictures of `train` or `val`; the classes are the WordNet numbers in order."""
    if split == "val":
        return validation(origin)
    return tars.read(replace(origin, source=f"{origin.source.rstrip('/')}/{TRAIN}"))


class Devkit(NamedTuple):
    """What the development kit of ILSVRC 2012 says of the validation pictures."""

    wnids: tuple[str, ...]
    """The classes in order: the WordNet numbers of the synsets that have no others below them."""
    truth: NDArray[np.int64]
    """The class of each picture, in the order of the files' names: (n,)."""


def validation(origin: Origin) -> Ranges:
    """The pictures of ILSVRC 2012's validation set, in the order of their names, each with its class.

    The source is the folder that holds `ILSVRC2012_img_val.tar` and, packed or unpacked, the devkit. Classes are
    `origin.classes`, which then have to be WordNet numbers, else these in order. FileNotFoundError where either is
    missing; ValueError where they do not belong together.
    """
    folder = Folder(origin.source)
    kit = devkit(folder)
    if kit is None:
        raise FileNotFoundError(f"{folder} holds neither {DEVKIT}.tar.gz nor {DEVKIT}, where the classes are")
    pictures, numbers = validation_files(origin)
    if int(numbers.max()) > len(kit.truth):
        raise ValueError(f"{folder}: picture {numbers.max():,} has no class; the devkit has {len(kit.truth):,}")
    classes = origin.classes or kit.wnids
    place = numbered(kit.wnids, classes, str(folder))
    labels = np.array([place[wnid] for wnid in kit.wnids])[kit.truth[numbers - 1]]
    return tars.relabelled(pictures, labels, classes)


def validation_files(origin: Origin) -> tuple[Ranges, NDArray[np.int64]]:
    """The pictures of `ILSVRC2012_img_val.tar` in the folder `origin.source`, without labels, and their numbers (n,).

    Both are in the order of the numbers that the names end with, from 1. ValueError where two have one number.
    """
    folder = Folder(origin.source)
    found = tars.scanned(origin, folder, VALIDATION).pictures
    names = [_VALIDATION_NAME.search(name) for name in found.table["key"].to_pylist()]
    if not names or None in names:
        raise ValueError(f"{folder}/{VALIDATION} is not ImageNet's: {_strange(found, names)}")
    numbers = np.array([int(name[1]) for name in names if name], np.int64)
    order = np.argsort(numbers)
    ordered = numbers[order]
    if ordered[0] < 1 or (np.diff(ordered) == 0).any():
        raise ValueError(f"{folder}/{VALIDATION} has two pictures of one number, or one of number 0")
    rows = found.take(order).table
    keys = [f"ILSVRC2012_val_{number:08}" for number in ordered.tolist()]
    none = [()] * len(rows)
    table = listing(keys, rows["file"].to_numpy(), rows["offset"].to_numpy(), rows["size"].to_numpy(), none)
    return Ranges(found.root, found.files, table), ordered


def _strange(found: Ranges, names: list[re.Match[str] | None]) -> str:
    if not names:
        return "it holds no picture"
    return f"its picture {found.table['key'][names.index(None)].as_py()} is not named ILSVRC2012_val_00000001 or so"


def devkit(folder: Folder) -> Devkit | None:
    """The devkit in `folder`, unpacked or as `ILSVRC2012_devkit_t12.tar.gz`; None where there is none.

    Its `meta.mat` has a struct array `synsets` with `ILSVRC2012_ID`, `WNID` and `num_children`; its ground truth has
    the ID of a picture's class on each line. ValueError, naming the file, where these are damaged or do not fit.
    """
    files = _devkit_files(folder)
    if files is None:
        return None
    where = f"{folder}/{DEVKIT}"
    wnid_of = _leaves(files["meta.mat"], f"{where}, meta.mat")
    wnids = tuple(sorted(wnid_of.values()))
    place = {wnid: number for number, wnid in enumerate(wnids)}
    ids = _ids(files[_TRUTH], len(wnids), f"{where}, {_TRUTH}")
    return Devkit(wnids, np.array([place[wnid_of[each]] for each in ids], np.int64))


def _devkit_files(folder: Folder) -> dict[str, bytes] | None:
    data, packed = folder / DEVKIT / "data", f"{DEVKIT}.tar.gz"
    wanted = ("meta.mat", _TRUTH)
    if folder.exists(DEVKIT):
        return {name: data.read(name) for name in wanted}
    if not folder.exists(packed):
        return None
    try:
        with tarfile.open(fileobj=BytesIO(folder.read(packed)), mode="r:gz") as tar:
            return {name: _member(tar, f"{DEVKIT}/data/{name}") for name in wanted}
    except (tarfile.TarError, EOFError, OSError, KeyError, zlib.error) as error:
        raise ValueError(f"{folder}/{packed} is damaged, or no devkit: {error}") from error


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is no file")
    return file.read()


def _leaves(data: bytes, where: str) -> dict[int, str]:
    """The WordNet number of each ID that classifiers are to tell apart."""
    try:
        synsets = np.atleast_1d(loadmat(BytesIO(data), squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"] == 0]
        found = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
    except (ValueError, TypeError, KeyError, IndexError, MatReadError) as error:
        raise ValueError(f"{where} is damaged, or not the devkit's: {error}") from error
    if sorted(found) != list(range(1, len(leaves) + 1)) or len(set(found.values())) != len(leaves):
        raise ValueError(f"{where}: the IDs of its {len(leaves):,} classes are not the numbers from 1, one each")
    return found


def _ids(data: bytes, count: int, where: str) -> list[int]:
    lines = data.decode("ascii", "replace").split()
    for number, line in enumerate(lines, 1):
        if not line.isdecimal() or not 1 <= int(line) <= count:
            raise ValueError(f"{where}, line {number:,}: {line[:40]!r} is no ID from 1 to {count:,}")
    return [int(line) for line in lines]


DATASET = Dataset(
    name="imagenet1k",
    what="photographs of 1,000 kinds of things",
    licence=LICENCE,
    citation=CITATION,
    classes=1000,
    splits={"train": 1_281_167, "val": 50_000},
    read=read,
    source=f"the folder that holds {TRAIN}, {VALIDATION} and {DEVKIT}.tar.gz",
)
