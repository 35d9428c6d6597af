"""The order in which TensorFlow Datasets keeps the examples of a split (its `core/hashing.py` and `core/shuffle.py`).

Examples have names there, mostly those of the files, and lie in the order of the MD5 of the split's name and theirs. So
what `train[:800]` means can be worked out where the names are known, without that package.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import md5

import numpy as np
from numpy.typing import NDArray

from shards.sources import Pictures


def order(split: str, names: Sequence[str | int]) -> NDArray[np.int64]:
    """The places in `names` of the examples of a split, in the order in which they are kept."""
    begun = md5(split.encode(), usedforsecurity=False)
    digests = []
    for name in names:
        digest = begun.copy()
        digest.update(str(name).encode())
        digests.append(digest.digest())
    return np.array(sorted(range(len(digests)), key=digests.__getitem__), np.int64)


@dataclass(frozen=True)
class Named:
    """The pictures of a whole split, with the names that they have in TensorFlow Datasets."""

    pictures: Pictures
    names: Sequence[str | int]

    def part(self, split: str, first: int, last: int | None) -> Pictures:
        """The pictures from place `first` to below `last` in the order of the split."""
        return self.pictures.take(order(split, self.names)[first:last])
