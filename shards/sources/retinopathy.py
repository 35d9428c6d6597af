"""Kaggle's Diabetic Retinopathy Detection (2015): photographs of retinas, of which VTAB takes a scaled and evened form.

That form is of Benjamin Graham, who won the competition, and is called `btgraham-300` in TensorFlow Datasets: the eye
gets a radius of 300 pixels, the local mean colour is taken away and the contrast raised fourfold, what lies beyond 90 %
of the radius is grey or cut off, and a JPEG of quality 72 is made of it.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.sources import Origin, Picture, Ranges
from shards.sources.tfds import Named
from shards.sources.trees import Files
from shards.storage import Folder

LISTS = {
    "train": ("train", "trainLabels.csv", ""),
    "validation": ("test", "retinopathy_solution.csv", "Public"),
    "test": ("test", "retinopathy_solution.csv", "Private"),
}
"""Folder of the pictures, list of the labels, and what its column `Usage` says of those that are meant."""
GRADES = 5
RADIUS, KEPT, QUALITY = 300, 0.9, 72


@dataclass(frozen=True)
class Eyes:
    """Photographs that become their evened form when it is iterated over: some tenths of a second each."""

    photographs: Ranges
    classes: tuple[str, ...] = ()

    @property
    def table(self) -> pa.Table:
        """A row a picture, as of the photographs."""
        return self.photographs.table

    def __len__(self) -> int:
        return len(self.photographs)

    def take(self, numbers: NDArray[np.int64]) -> "Eyes":
        """The pictures of these numbers, in this order."""
        return Eyes(self.photographs.take(numbers), self.classes)

    def __iter__(self) -> Iterator[Picture]:
        for picture in self.photographs:
            assert isinstance(picture.data, bytes)
            yield Picture(picture.key, evened(picture.data), picture.labels)


def retinas(split: str, origin: Origin) -> Named:
    """The pictures of `train`, `validation` or `test` in the order of their list; labels 0 to 4.

    The source is the folder that holds the unpacked folders `train` and `test`, `trainLabels.csv` and
    `retinopathy_solution.csv`. ValueError, naming list and line, where a line is no name and grade.
    """
    source = Folder(origin.source)
    folder, name, usage = LISTS[split]
    where, names, labels = f"{source.absolute}/{name}", [], []
    rows = csv.DictReader(source.read(name).decode(errors="replace").splitlines())
    for row in rows:
        if usage and row.get("Usage") != usage:
            continue
        image, level = row.get("image") or "", row.get("level") or ""
        if not image or level not in tuple("01234"):
            raise ValueError(f"{where}, line {rows.line_num}: no picture's name and a grade from 0 to {GRADES - 1}")
        names.append(image)
        labels.append(int(level))
    if not source.exists(folder):
        raise FileNotFoundError(f"{source.absolute} holds no folder {folder}: unpack {folder}.zip.001 and its others")
    photographs = Files(source / folder).pictures([f"{name}.jpeg" for name in names], labels)
    return Named(Eyes(photographs), names)


def evened(data: bytes) -> bytes:
    """The evened form of a photograph, as JPEG; what cannot be decoded stays as it is, to be refused by that name."""
    import cv2  # takes longer to import than the rest of this package

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        return data
    scale = RADIUS / _radius(image)
    image = cv2.resize(image, None, fx=scale, fy=scale)
    image = cv2.addWeighted(image, 4, cv2.GaussianBlur(image, (0, 0), RADIUS / 30), -4, 128)
    radius = int(RADIUS * KEPT)
    row, column = image.shape[0] // 2, image.shape[1] // 2
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.circle(mask, (column, row), radius, 1, -1)
    image[mask == 0] = 128
    image = image[max(row - radius, 0) : row + radius, max(column - radius, 0) : column + radius]
    made, coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert made, "a picture in memory is encoded"
    return coded.tobytes()


def _radius(image: NDArray[Any]) -> float:
    """Half of how many pixels of the middle row are brighter than a tenth of its mean; half the height where that
    cannot tell."""
    row = image[image.shape[0] // 2].astype(np.int64).sum(axis=1)
    radius = float((row > row.mean() / 10).sum()) / 2
    return radius if radius >= 1 else image.shape[0] / 2
