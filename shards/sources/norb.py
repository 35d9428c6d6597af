"""smallNORB and its binary matrices (Huang and LeCun, https://cs.nyu.edu/~ylclab/data/norb-v1.0-small).

A header of little-endian 32-bit numbers (a magic number that holds the type, the number of axes, the length of each
axis, of which at least three are stored), then the elements, the last axis fastest.
"""

import gzip
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.storage import Folder

MAGIC = {0x1E3D4C54: np.dtype("<i4"), 0x1E3D4C55: np.dtype("u1")}
FILES = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing",
}
SIDE = 96
ELEVATIONS, AZIMUTHS = 9, 18


@dataclass(frozen=True)
class Views:
    """Toys as the first of the two cameras sees them."""

    pixels: NDArray[np.uint8]
    """(n, 96, 96)"""
    elevation: NDArray[np.int64]
    """(n,), 0 to 8, in steps of 5 degrees from 30."""
    azimuth: NDArray[np.int64]
    """(n,), 0 to 17, in steps of 20 degrees from 0."""


def views(folder: Folder, split: str) -> Views:
    """The pictures of `train` or `test` from the files `dat` and `info`, each `.mat` or `.mat.gz`.

    ValueError, naming the file, where one is damaged, has another shape, or the two do not belong together.
    """
    pictures, facts = (f"{FILES[split]}-{part}.mat" for part in ("dat", "info"))
    pixels, info = read(folder, pictures), read(folder, facts)
    where = f"{folder.absolute}/{pictures}"
    if pixels.ndim != 4 or pixels.shape[1:] != (2, SIDE, SIDE) or pixels.dtype != np.uint8:
        raise ValueError(f"{where} holds {pixels.dtype} {pixels.shape}, not pairs of pictures (n, 2, {SIDE}, {SIDE})")
    if info.shape != (len(pixels), 4):
        raise ValueError(f"{where} holds {len(pixels):,} pairs, {facts} numbers of shape {info.shape}")
    elevation, azimuth = info[:, 1].astype(np.int64), info[:, 2].astype(np.int64)
    where = f"{folder.absolute}/{facts}"
    _check(elevation, np.isin(elevation, np.arange(ELEVATIONS)), where, "elevation")
    _check(azimuth, np.isin(azimuth, 2 * np.arange(AZIMUTHS)), where, "azimuth")
    return Views(pixels[:, 0].copy(), elevation, azimuth // 2)


def _check(values: NDArray[np.int64], right: NDArray[np.bool_], where: str, word: str) -> None:
    if not right.all():
        row = int((~right).argmax())
        raise ValueError(f"{where} gives picture {row:,} the {word} {values[row]}, which there is not")


def read(folder: Folder, name: str) -> NDArray:
    """The array of bytes or 32-bit numbers in the file `name` or `name.gz` of `folder`.

    ValueError, naming the file, where it is no such file, is cut short or too long; FileNotFoundError where it is not
    there.
    """
    for file in (f"{name}.gz", name):
        if folder.exists(file):
            where, data = f"{folder.absolute}/{file}", folder.read(file)
            try:
                return parse(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data, where)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{where} is damaged: {error}") from error
    raise FileNotFoundError(f"{folder.absolute} holds neither {name}.gz nor {name}")


def parse(data: bytes, where: str) -> NDArray:
    """The array that the bytes of a binary matrix hold; `where` names the file in errors."""
    magic, axes = (int.from_bytes(data[place : place + 4], "little") for place in (0, 4))
    if magic not in MAGIC or not 1 <= axes <= 8:
        raise ValueError(f"{where} is no binary matrix of bytes or 32-bit numbers: magic {magic:#010x}, {axes} axes")
    start = 8 + 4 * max(axes, 3)
    if len(data) < start:
        raise ValueError(f"{where} is cut short: {len(data)} bytes, its header alone has {start}")
    shape = tuple(int(length) for length in np.frombuffer(data, "<u4", axes, offset=8))
    expected = start + int(np.prod(shape, dtype=object)) * MAGIC[magic].itemsize
    if len(data) != expected:
        word = "cut short" if len(data) < expected else "too long"
        sizes = " x ".join(map(str, shape))
        raise ValueError(f"{where} is {word}: {len(data):,} bytes, {expected:,} expected for {sizes}")
    return np.frombuffer(data, MAGIC[magic], offset=start).reshape(shape)
