"""The handwritten digits that come with scikit-learn, as a task of 1,000 training pictures."""

import numpy as np

from shards.datasets import Dataset, no_source, thousand, thousand_splits
from shards.sources import Arrays
from shards.storage import Folder

COUNT = 1797


def read(split: str, source: str, downloads: Folder) -> Arrays:
    """The pictures of a split, 8 x 8, their 17 shades spread over 0 to 255."""
    no_source("digits", "scikit-learn", source)
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    numbers = thousand("digits", split, COUNT)
    return Arrays([f"{number:04}" for number in numbers], pixels[numbers], found.target[numbers].astype(np.uint8))


DATASET = Dataset(
    name="digits",
    what="handwritten digits, 8 x 8, grey",
    licence="CC BY 4.0",
    citation="Alpaydin and Kaynak 1998, UCI Optical Recognition of Handwritten Digits, doi:10.24432/C50P49",
    classes=tuple("0123456789"),
    splits=thousand_splits(COUNT),
    read=read,
)
