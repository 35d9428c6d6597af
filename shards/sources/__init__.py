"""Where pictures come from, one file a format; and what every source gives: pictures that can be taken by number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Picture:
    """One picture of a source: pixels (height, width[, 3]) of bytes, or an encoded file's bytes."""

    key: str
    """Its name in the source, the same on every run, without dots or slashes."""
    data: bytes | NDArray[np.uint8]
    labels: tuple[int, ...]


class Pictures(Protocol):
    """Pictures numbered from 0.

    The job that plans holds all of them and sends each task what `take` gives, so a source whose pictures lie in a
    bucket holds names and offsets and reads when it is iterated over.
    """

    def __len__(self) -> int: ...

    def take(self, numbers: NDArray[np.int64]) -> "Pictures":
        """The pictures of these numbers, in this order, carrying no others along."""
        ...

    def __iter__(self) -> Iterator[Picture]: ...


@dataclass(frozen=True)
class Arrays:
    """Pictures of one size that are in memory: pixels (n, height, width[, 3]) of bytes, one label each."""

    keys: Sequence[str]
    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.pixels) == len(self.labels):
            counts = f"{len(self.keys)} keys, {len(self.pixels)} pictures and {len(self.labels)} labels"
            raise ValueError(f"{counts} do not belong together")

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, numbers: NDArray[np.int64]) -> "Arrays":
        """The pictures of these numbers, in this order, copied."""
        return Arrays([self.keys[int(number)] for number in numbers], self.pixels[numbers], self.labels[numbers])

    def __iter__(self) -> Iterator[Picture]:
        for key, pixels, label in zip(self.keys, self.pixels, self.labels, strict=True):
            yield Picture(key, pixels, (int(label),))
