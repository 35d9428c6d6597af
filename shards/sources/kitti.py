"""KITTI's pictures for detection (Geiger et al. 2012): what is seen from a car, with the places of what is in it.

A line of a label file is an object: type, truncation, occlusion, angle, a box of four, three sizes, its x, y and z in
metres before the camera, rotation (readme of the object development kit). TensorFlow Datasets divides the pictures that
have labels by the drives that they come from, so that no drive is in two splits.
"""

from collections.abc import Sequence

import numpy as np

from shards.sources import Origin
from shards.sources.clevr import below
from shards.sources.tfds import Named
from shards.sources.trees import found

VEHICLES = ("Car", "Van", "Truck")
FAR = (-100.0, 8.0, 20.0, 999.0)
"""Edges of the classes (google-research/task_adaptation, `data/kitti.py`), beyond whose last there is no vehicle."""
NONE = 1000.0
SEED, SHARE = 123, 10
"""NumPy's seed that draws drives, and how many of a hundred are for validation, and for testing."""


def vehicles(split: str, origin: Origin) -> Named:
    """The pictures of `train`, `validation` or `test`, labelled by VTAB's task (Zhai et al. 2019, appendix A): how far
    the nearest vehicle is; an edge belongs to the nearer class.

    The source is a folder that holds `training`, or `data_object_image_2.zip` and `data_object_label_2.zip`, and
    `mapping` (or `devkit/mapping`) or `devkit_object.zip`. ValueError, naming the file, where one is damaged.
    """
    chosen = _split(split, origin)
    labels = found(origin, ("training",), ("data_object_label_2.zip",), "label_2")
    files = [f"label_2/{number:06}.txt" for number in chosen]
    classes = []
    for file, data in zip(files, labels.read(files), strict=True):
        try:
            classes.append(distance(data.decode(errors="replace")))
        except ValueError as error:
            raise ValueError(f"{labels.where}: {file}: {error}") from error
    pictures = found(origin, ("training",), ("data_object_image_2.zip",), "image_2")
    names = [f"{number:06}.png" for number in chosen]
    return Named(pictures.pictures([f"image_2/{name}" for name in names], classes, short=True), names)


def distance(text: str) -> int:
    """The class of a picture, by its label file."""
    nearest = NONE
    for count, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if words and len(words) != 15:
            raise ValueError(f"line {count} has {len(words)} words, an object has 15: {line[:60]!r}")
        if words and words[0] in VEHICLES:
            nearest = min(nearest, float(np.float32(words[13])))
    if not FAR[0] < nearest <= NONE:
        raise ValueError(f"the nearest vehicle's distance is {nearest}, which there is not")
    return below(nearest, FAR)


def _split(split: str, origin: Origin) -> list[int]:
    """The numbers of the pictures of a split, in order."""
    kit = found(origin, ("devkit", "devkit_object"), ("devkit_object.zip",), "mapping")
    files = kit.read(["mapping/train_rand.txt", "mapping/train_mapping.txt"])
    places, drives = (data.decode(errors="replace") for data in files)
    try:
        lines = [int(word) - 1 for word in places.split(",")]
        named = [line.split()[1] for line in drives.splitlines() if line.strip()]
        by_drive = [named[line] for line in lines]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{kit.where}: the files in mapping do not say where pictures come from: {error}") from error
    wanted = divided(by_drive)[split]
    return [number for number, drive in enumerate(by_drive) if drive in wanted]


def divided(drives: Sequence[str]) -> dict[str, set[str]]:
    """The drives of each split, drawn as TensorFlow Datasets draws them."""
    every, chance = sorted(set(drives)), np.random.RandomState(SEED)
    count = max(1, SHARE * len(every) // 100)
    test = {every[place] for place in chance.choice(len(every), count, replace=False)}
    left = [drive for drive in every if drive not in test]
    validation = {left[place] for place in chance.choice(len(left), count, replace=False)}
    return {"train": set(left) - validation, "validation": validation, "test": test}
