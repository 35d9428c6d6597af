"""ImageNet's validation pictures with the reassessed labels (ReaL), of which a picture may have several."""

import json

import numpy as np

from shards.datasets import Dataset
from shards.datasets.imagenet1k import CITATION, DEVKIT, LICENCE, VALIDATION, devkit, validation_files
from shards.sources import Origin, Ranges, tars
from shards.storage import Folder

LABELS = "real.json"
PICTURES, CLASSES = 50_000, 1000


def read(split: str, origin: Origin) -> Ranges:
    """The pictures that have a label, with all their labels, in the order of their names.

    Labels count the WordNet numbers of ImageNet in order; their names are `origin.classes`, which must have that
    order, else what the devkit says, if it is there. FileNotFoundError where pictures or labels are missing.
    """
    folder = Folder(origin.source)
    labels = parse(folder.read(LABELS), f"{folder}/{LABELS}")
    pictures, numbers = validation_files(origin)
    if int(numbers.max()) > PICTURES:
        raise ValueError(f"{folder}/{VALIDATION}: picture {numbers.max():,} is none of the {PICTURES:,}")
    labelled = np.array([bool(labels[number - 1]) for number in numbers.tolist()])
    classes = origin.classes or _wnids(folder)
    chosen = [labels[number - 1] for number in numbers[labelled].tolist()]
    return tars.relabelled(pictures.take(np.flatnonzero(labelled)), chosen, classes)


def _wnids(folder: Folder) -> tuple[str, ...]:
    kit = devkit(folder)
    return kit.wnids if kit else ()


def parse(data: bytes, where: str = LABELS) -> tuple[tuple[int, ...], ...]:
    """The labels of each validation picture, in the order of the files' names, from the bytes of `real.json`.

    ValueError, naming the file, unless these are 50,000 lists, each of different numbers from 0 to 999.
    """
    try:
        lists = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(lists, list) or len(lists) != PICTURES:
        count = f"{len(lists):,} of them" if isinstance(lists, list) else type(lists).__name__
        raise ValueError(f"{where} is not ReaL's: it should hold {PICTURES:,} lists of labels, and holds {count}")
    for number, labels in enumerate(lists, 1):
        if not _are_labels(labels):
            raise ValueError(f"{where}: {str(labels)[:60]} of picture {number:,} are no labels from 0 to {CLASSES - 1}")
    return tuple(map(tuple, lists))


def _are_labels(labels: object) -> bool:
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < CLASSES for label in labels):
        return False
    return len(set(labels)) == len(labels)


DATASET = Dataset(
    name="imagenet_real",
    what="ImageNet's validation pictures, labelled anew",
    licence=f"{LICENCE}; labels Apache-2.0",
    citation=f"Beyer et al. 2020, arXiv:2006.07159; pictures: {CITATION}",
    classes=CLASSES,
    splits={"val": 46_837},
    read=read,
    source=f"the folder that holds {VALIDATION}, {LABELS} and, for the names of classes, {DEVKIT}.tar.gz",
)
