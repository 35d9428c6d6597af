"""The handwritten digits that come with scikit-learn, as a task of 1,000 training pictures."""

import numpy as np

from shards.datasets import Dataset, checked, packaged, thousand, thousand_splits
from shards.sources import Arrays, Origin

COUNT = 1797
SHA256 = "a19cb3d96bba7deace8ee5a513a6eb7bad0403d528f00bf4d351b6a7a55baa91"


def read(split: str, origin: Origin) -> Arrays:
    """The pictures of a split, 8 x 8, their 17 shades spread over 0 to 255."""
    found = packaged("digits", "sklearn.datasets", "scikit-learn", origin.source).load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    keys = [f"{number:04}" for number in range(COUNT)]
    whole = checked("digits", Arrays(keys, pixels, found.target.astype(np.uint8)), SHA256)
    return whole.take(thousand("digits", split, COUNT))


DATASET = Dataset(
    name="digits",
    what="handwritten digits, 8 x 8, grey",
    licence="CC BY 4.0",
    citation="Alpaydin and Kaynak 1998, UCI Optical Recognition of Handwritten Digits, doi:10.24432/C50P49",
    classes=tuple("0123456789"),
    splits=thousand_splits(COUNT),
    read=read,
)
