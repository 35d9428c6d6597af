"""Caltech-101, DTD, SUN397, EuroSAT and NWPU-RESISC45: pictures whose class is the folder that they lie in.

Splits are those of TensorFlow Datasets, and so are the names in `Named`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shards.sources import Origin, is_picture
from shards.sources.names import CALTECH, DTD, EUROSAT, RESISC, SUN
from shards.sources.tfds import Named
from shards.sources.trees import Tree, Zip, found
from shards.storage import Folder

CALTECH_TAR, CALTECH_ZIP = "101_ObjectCategories.tar.gz", "caltech-101.zip"
DRAWN, DRAWN_WITH = 30, 1234
"""So many pictures of each of Caltech's classes are for training, and the seed of NumPy that draws them."""

TEXTURES = {"train": "train1", "validation": "val1", "test": "test1"}
"""Lists of DTD's first division."""

SCENES = {"train": "sun397_tfds_tr.txt", "validation": "sun397_tfds_va.txt", "test": "sun397_tfds_te.txt"}
"""Lists of SUN397, as the package `tensorflow_datasets` has them in its folder `image_classification`."""


def caltech(split: str, origin: Origin) -> Named:
    """The pictures of `train`, 30 drawn of each class, or of `test`, all others; labels count classes in lower case.

    The draw is that of TensorFlow Datasets where it met folders and files in the order of their names; it takes them as
    the disk lists them, so that its own may differ. The source is the folder `101_ObjectCategories`, its `.tar.gz`, the
    `caltech-101.zip` around it, or a folder with one of these. ValueError where a class is strange or too small.
    """
    tree = _caltech(origin)
    by_folder: dict[str, list[str]] = {}
    for name in tree.names():
        folder, slash, last = name.rpartition("/")
        if slash:
            by_folder.setdefault(folder, []).append(last)
    chance, chosen, labels = np.random.RandomState(DRAWN_WITH), [], []
    for folder, files in sorted(by_folder.items()):
        if len(files) < DRAWN:
            raise ValueError(f"{tree.where}/{folder} holds {len(files)} files, {DRAWN} are to be drawn of each class")
        drawn = set(chance.choice(len(files), DRAWN, replace=False).tolist())
        wanted = [name for place, name in enumerate(files) if (place in drawn) == (split == "train")]
        pictures = [f"{folder}/{name}" for name in wanted if is_picture(name)]
        chosen += pictures
        labels += [_label(folder.lower(), CALTECH, tree)] * len(pictures)
    return Named(tree.pictures(chosen, labels), chosen)


def textures(split: str, origin: Origin) -> Named:
    """DTD's pictures of `train`, `validation` or `test` by the lists of its first division, in their order.

    The source is the folder `dtd`, `dtd-r1.0.1.tar.gz`, or a folder with one of these.
    """
    tree = found(origin, ("dtd",), ("dtd-r1.0.1.tar.gz",), "labels")
    names = _lines(tree.read([f"labels/{TEXTURES[split]}.txt"])[0])
    labels = [_label(name.partition("/")[0], DTD, tree) for name in names]
    return Named(tree.pictures([f"images/{name}" for name in names], labels, short=True), names)


def scenes(split: str, origin: Origin) -> Named:
    """SUN397's pictures of `train`, `validation` or `test` by the lists of TensorFlow Datasets, in their order.

    The source is a folder that holds the lists (`SCENES`) and `SUN397` or `SUN397.tar.gz`.
    """
    tree = found(origin, ("SUN397",), ("SUN397.tar.gz",), "a")
    source = Folder(origin.source)
    if not source.exists(SCENES[split]):
        raise FileNotFoundError(
            f"{source.absolute} holds no {SCENES[split]}: this list of VTAB's division comes with the package "
            "tensorflow-datasets, in tensorflow_datasets/image_classification"
        )
    names = _lines(source.read(SCENES[split]))
    labels = [_label(name.rpartition("/")[0][3:], SUN, tree) for name in names]
    return Named(tree.pictures([name.lstrip("/") for name in names], labels), names)


def satellites(split: str, origin: Origin) -> Named:
    """All of EuroSAT's pictures in red, green and blue, which are `train`.

    The source is the folder `2750` (or `EuroSAT_RGB`, as it is called by now), its zip, or a folder with one of these.
    """
    tree = found(origin, ("2750", "EuroSAT_RGB"), ("EuroSAT.zip", "EuroSAT_RGB.zip"), EUROSAT[0])
    return _by_folder(tree, EUROSAT)


def aerial(split: str, origin: Origin) -> Named:
    """All of NWPU-RESISC45's pictures, which are `train`.

    The source is the folder `NWPU-RESISC45`, a zip or tar of it, or a folder with one of these; there is no reader here
    for the `.rar` that it is published as.
    """
    archives = [f"NWPU-RESISC45.{end}" for end in ("zip", "tar", "tar.gz")]
    if Folder(origin.source).exists("NWPU-RESISC45.rar") and not Folder(origin.source).exists("NWPU-RESISC45"):
        raise ValueError(f"{origin.source}/NWPU-RESISC45.rar has to be unpacked first: unrar x NWPU-RESISC45.rar")
    return _by_folder(found(origin, ("NWPU-RESISC45",), archives, RESISC[0]), RESISC)


def _by_folder(tree: Tree, classes: Sequence[str]) -> Named:
    """All pictures, called there by their class and their file."""
    names = [name for name in tree.names() if is_picture(name) and "/" in name]
    labels = [_label(name.partition("/")[0], classes, tree) for name in names]
    return Named(tree.pictures(names, labels, short=True), [name.replace("/", "_") for name in names])


def _caltech(origin: Origin) -> Tree:
    """The class folders, taken out of the tar in the zip where that is what there is."""
    source = Folder(origin.source)
    inside = origin.source.endswith(f"/{CALTECH_ZIP}") or (
        source.exists(CALTECH_ZIP) and not source.exists(CALTECH_TAR) and not source.exists("101_ObjectCategories")
    )
    if inside and not source.exists("accordion"):
        folder = Folder(origin.source.removesuffix(f"/{CALTECH_ZIP}"))
        packed = Zip(folder, CALTECH_ZIP, "")
        names = [name for name in packed.names() if name.rpartition("/")[2] == CALTECH_TAR]
        if not names:
            raise ValueError(f"{packed.where} holds no {CALTECH_TAR}: it is another archive")
        origin.downloads.write(CALTECH_TAR, packed.read(names[:1])[0])
        origin = replace(origin, source=origin.downloads.absolute)
    return found(origin, ("101_ObjectCategories",), (CALTECH_TAR,), "accordion")


def _lines(data: bytes) -> list[str]:
    return [line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()]


def _label(name: str, classes: Sequence[str], tree: Tree) -> int:
    if name not in classes:
        raise ValueError(f"{tree.where}: {name} is none of the {len(classes)} classes")
    return classes.index(name)
