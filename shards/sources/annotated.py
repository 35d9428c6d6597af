"""Oxford-IIIT Pets and Oxford Flowers-102: pictures in files, with their labels in files of their own.

Either lies there as it was fetched, in archives, which are unpacked once into the downloads, or as it was unpacked.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.sources import Origin, Ranges, is_picture, key, listing, matlab
from shards.sources.archives import unpacked
from shards.storage import Folder


def pets(origin: Origin, split: str, breeds: Sequence[str]) -> Ranges:
    """The pictures that `annotations/<split>.txt` lists, in its order; the label is the place of its breed in `breeds`.

    The source holds `images` or `images.tar.gz`, and `annotations` or `annotations.tar.gz`. Errors are those of
    `listed` and `unpacked`; FileNotFoundError where the source holds neither the one nor the other.
    """
    notes = _part(origin, "annotations", "annotations.tar.gz", lambda name: name.endswith(".txt"))
    name = f"annotations/{split}.txt"
    names, labels = listed(notes.read(name).decode(errors="replace"), breeds, f"{notes.absolute}/{name}")
    root = _part(origin, "images", "images.tar.gz", is_picture)
    return _files(root, "images", [f"{name}.jpg" for name in names], labels)


def flowers(origin: Origin, split: str) -> Ranges:
    """The pictures of a split of `setid.mat` (`trnid`, `valid`, `tstid`), in its order; labels 0 to 101.

    The source holds `imagelabels.mat`, `setid.mat`, and `jpg` or `102flowers.tgz`. Errors are those of
    `matlab.flowers` and `unpacked`; FileNotFoundError where the source does not hold one of the three.
    """
    numbers, labels = matlab.flowers(Folder(origin.source), split)
    root = _part(origin, "jpg", "102flowers.tgz", is_picture)
    return _files(root, "jpg", [f"image_{number:05}.jpg" for number in numbers.tolist()], labels)


def listed(text: str, breeds: Sequence[str], where: str) -> tuple[list[str], NDArray[np.int64]]:
    """Names of pictures, without an extension, and their labels, from a list of Oxford-IIIT Pets.

    A line is a name (breed, _ and a number), the class from 1, the species and the breed within the species; a line
    that begins with # is a comment (README of the data set). ValueError, naming the line, where one is not like this,
    its class is not that of its breed in `breeds`, or its name has been there; `where` names the list.
    """
    numbers: dict[str, int] = {}
    for count, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 4 or not words[1].isdecimal():
            raise ValueError(f"{where} line {count} is not a name and three numbers: {line[:80]!r}")
        name, number = words[0], int(words[1])
        if not 1 <= number <= len(breeds) or name.rpartition("_")[0] != breeds[number - 1]:
            raise ValueError(f"{where} line {count}: {name} is of no breed that is number {number} of {len(breeds)}")
        if name in numbers:
            raise ValueError(f"{where} line {count}: {name} is there twice")
        numbers[name] = number - 1
    if not numbers:
        raise ValueError(f"{where} lists no picture")
    return list(numbers), np.array(list(numbers.values()), np.int64)


def _files(root: Folder, folder: str, names: list[str], labels: NDArray[np.int64]) -> Ranges:
    """Whole files of a folder in `root`, a label each."""
    count = len(names)
    table = listing(
        [key(name) for name in names], np.arange(count), np.zeros(count), np.full(count, -1), labels[:, None]
    )
    return Ranges(root.absolute, pa.array([f"{folder}/{name}" for name in names], pa.string()), table)


def _part(origin: Origin, name: str, archive: str, wanted: Callable[[str], bool]) -> Folder:
    """Where the folder `name` lies: in the source, or in the downloads after unpacking the source's archive."""
    source = Folder(origin.source)
    if source.exists(name):
        return source
    if not source.exists(archive):
        raise FileNotFoundError(f"{source.absolute} holds neither the folder {name} nor {archive}")
    return unpacked(origin, source, archive, wanted)
