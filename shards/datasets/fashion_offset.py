"""Where a garment lies: a structured task in the manner of VTAB's dSprites-position (Zhai et al. 2019, appendix A).

Each test picture of Fashion-MNIST is put somewhere on a black canvas; its place from left to right is to be told, in
equal bins, and its place from top to bottom is none of the label's business.
"""

import numpy as np
from numpy.typing import NDArray

from shards.chance import mixed, number
from shards.datasets import Dataset, fashion_mnist, thousand, thousand_splits
from shards.sources import Arrays, Origin

COUNT = 10_000
CANVAS, SIDE = 56, 28
BINS, PLACES = 8, 3  # places in each bin
MARGIN = (CANVAS - SIDE - BINS * PLACES) // 2


def read(split: str, origin: Origin) -> Arrays:
    """The pictures of a split, 56 x 56; the source is that of Fashion-MNIST."""
    numbers = thousand("fashion_offset", split, COUNT)
    garments = fashion_mnist.read("test", origin).pixels[numbers]
    across, down = offsets(numbers)
    pixels = np.zeros((len(numbers), CANVAS, CANVAS), np.uint8)
    for canvas, garment, left, top in zip(pixels, garments, across, down, strict=True):
        canvas[top : top + SIDE, left : left + SIDE] = garment
    labels = ((across - MARGIN) // PLACES).astype(np.uint8)
    return Arrays([f"{number:05}" for number in numbers], pixels, labels)


def offsets(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels from the left and from the top, for each picture, by its number in Fashion-MNIST's test set."""
    across = mixed(number("fashion_offset", "across"), numbers) % np.uint64(BINS * PLACES)
    down = mixed(number("fashion_offset", "down"), numbers) % np.uint64(CANVAS - SIDE + 1)
    return across.astype(np.int64) + MARGIN, down.astype(np.int64)


def _bin(number: int) -> str:
    first = MARGIN + number * PLACES
    return f"{first} to {first + PLACES - 1} pixels"


DATASET = Dataset(
    name="fashion_offset",
    what="how far from the left an article of clothing lies, 56 x 56, grey",
    licence="MIT",
    citation="pictures: Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747",
    classes=tuple(_bin(number) for number in range(BINS)),
    splits=thousand_splits(COUNT),
    read=read,
)
