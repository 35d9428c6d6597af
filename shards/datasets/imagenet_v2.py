"""ImageNet-V2: a second test set for ImageNet, gathered as the first was; the part whose frequencies match its own."""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from shards.datasets import Dataset
from shards.datasets.imagenet1k import DEVKIT, devkit
from shards.sources import LISTING, Origin, Ranges, folders, tars
from shards.storage import Folder

ARCHIVE = "imagenetv2-matched-frequency.tar.gz"
FOLDER = "imagenetv2-matched-frequency-format-val"
"""What the archive unpacks to: a folder a class, named by its number."""
CLASSES = 1000


def read(split: str, origin: Origin) -> Ranges:
    """The pictures in the order of classes and names, the same from the archive and from what it unpacks to.

    A folder's name counts the WordNet numbers of ImageNet in order; their names are `origin.classes`, which must have
    that order, else what the devkit says, if it is there. FileNotFoundError where the pictures are missing; errors are
    else those of `tars.read` and `folders.read`.
    """
    folder = Folder(origin.source)
    numbers = tuple(str(number) for number in range(CLASSES))
    told = replace(origin, classes=numbers)
    if folder.exists(FOLDER):
        found = folders.read(replace(told, source=(folder / FOLDER).absolute))
    elif folder.exists(ARCHIVE):
        found = tars.read(replace(told, source=(folder / ARCHIVE).absolute))
    else:
        raise FileNotFoundError(f"{folder} holds neither {ARCHIVE} nor the folder {FOLDER}")
    return _ordered(found, origin.classes or _wnids(folder))


def _wnids(folder: Folder) -> tuple[str, ...]:
    kit = devkit(folder)
    return kit.wnids if kit else ()


def _ordered(found: Ranges, classes: tuple[str, ...]) -> Ranges:
    """Named alike whichever form they came in, and in one order."""
    keys = [key.removeprefix(f"{FOLDER}-") for key in found.table["key"].to_pylist()]
    order = np.lexsort((np.array(keys), tars.labels_of(found)))
    place = LISTING.get_field_index("key")
    table = found.table.set_column(place, LISTING.field("key"), pa.array(keys, pa.string()))
    return replace(found, table=table.take(pa.array(order)), classes=classes)


DATASET = Dataset(
    name="imagenet_v2",
    what="a second test set for ImageNet (matched frequency)",
    licence="MIT; the pictures remain their owners'",
    citation="Recht, Roelofs, Schmidt and Shankar 2019, Do ImageNet Classifiers Generalize to ImageNet?, ICML, "
    "arXiv:1902.10811",
    classes=CLASSES,
    splits={"test": 10_000},
    read=read,
    source=f"the folder that holds {ARCHIVE}, or {FOLDER}, and, for the names of classes, {DEVKIT}.tar.gz",
)
