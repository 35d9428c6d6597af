"""dSprites: white shapes on black, drawn from every combination of six factors (Matthey et al. 2017).

The file is an npz of numpy: `imgs` (n, 64, 64), each pixel 0 or 1, and `latents_classes` (n, 6), the factors' numbers.
Its member `metadata` is a pickle and is not touched. Unpacked the pictures would take gigabytes, so a pixel is kept as
the bit that it is.
"""

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import IO

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from numpy.typing import NDArray

from shards.sources import Picture, listing
from shards.sources.archives import apart
from shards.storage import Folder

FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
SIDE = 64
FACTORS = (1, 3, 6, 40, 32, 32)
"""Values of colour, shape, scale, orientation, position from left and from top: as the columns of the factors."""
BINS = 16
_BLOCK = 4096  # pictures unpacked at a time


@dataclass(frozen=True)
class Sprites:
    """Pictures of 64 x 64 pixels, black or white, in memory."""

    numbers: NDArray[np.int64]
    """(n,), of each in the file; its key."""
    bits: NDArray[np.uint8]
    """(n, 64, 8), a bit a pixel, the first in the highest bit."""
    labels: NDArray[np.int64]
    """(n,)"""
    classes: tuple[str, ...] = ()

    @property
    def table(self) -> pa.Table:
        """A row a picture; the offset is its number here, as there are no files."""
        count = len(self)
        keys = [_key(number) for number in self.numbers.tolist()]
        return listing(keys, np.zeros(count), np.arange(count), np.full(count, -1), self.labels[:, None])

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, numbers: NDArray[np.int64]) -> "Sprites":
        """The pictures of these numbers, in this order, copied."""
        return Sprites(self.numbers[numbers], self.bits[numbers], self.labels[numbers], self.classes)

    def __iter__(self) -> Iterator[Picture]:
        for number, bits, label in zip(self.numbers.tolist(), self.bits, self.labels.tolist(), strict=True):
            yield Picture(_key(number), np.unpackbits(bits, axis=-1) * np.uint8(255), (label,))


def _key(number: int) -> str:
    return f"{number:06}"


def location(factors: NDArray[np.int64]) -> NDArray[np.int64]:
    """VTAB's task (Zhai et al. 2019, appendix A): how far from the left, 32 places in 16 classes of two."""
    return factors[:, 4] * BINS // FACTORS[4]


def orientation(factors: NDArray[np.int64]) -> NDArray[np.int64]:
    """VTAB's task (Zhai et al. 2019, appendix A): 40 angles in 16 classes of two and three, by turns: angle / 2.5."""
    return factors[:, 3] * BINS // FACTORS[3]


def read(source: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Bits (n, 64, 8), as of `Sprites`, and factors (n, 6) from the file, or from the folder that holds it.

    ValueError, naming the file, where it is damaged or holds something else; FileNotFoundError where it is not there.
    """
    folder, name = apart(source) if source.endswith(".npz") else (Folder(source), FILE)
    where, data = f"{folder.absolute}/{name}", folder.read(name)
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            with archive.open("latents_classes.npy") as file:
                factors = npy.read_array(file, allow_pickle=False)
            with archive.open("imgs.npy") as file:
                bits = _packed(file)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{where} is damaged or no npz of numpy: {error}") from error
    except KeyError as error:
        raise ValueError(f"{where} is not dSprites: {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"{where} is not dSprites: {error}") from error
    _check(factors, len(bits), where)
    return bits, factors.astype(np.int64)


def _packed(file: IO[bytes]) -> NDArray[np.uint8]:
    """The pictures of an npy file, a bit a pixel, without ever holding all of it."""
    header = npy.read_array_header_2_0 if npy.read_magic(file) == (2, 0) else npy.read_array_header_1_0
    shape, by_column, kind = header(file)
    if len(shape) != 3 or shape[1:] != (SIDE, SIDE) or by_column or kind != np.uint8:
        raise ValueError(f"imgs is {kind} {shape}, not uint8 (n, {SIDE}, {SIDE})")
    bits = np.empty((shape[0], SIDE, SIDE // 8), np.uint8)
    for start in range(0, shape[0], _BLOCK):
        packed = bits[start : start + _BLOCK]
        wanted = len(packed) * SIDE * SIDE
        pixels = np.frombuffer(file.read(wanted), np.uint8)
        if len(pixels) != wanted or pixels.max() > 1:
            word = "other pixels than 0 and 1" if len(pixels) == wanted else "no end"
            raise ValueError(f"imgs has {word} among the pictures from {start:,} on")
        packed[:] = np.packbits(pixels.reshape(-1, SIDE, SIDE), axis=-1)
    return bits


def _check(factors: NDArray, count: int, where: str) -> None:
    if factors.shape != (count, len(FACTORS)) or factors.dtype.kind not in "iu":
        raise ValueError(
            f"{where} is not dSprites: {count:,} pictures, latents_classes is {factors.dtype} {factors.shape}"
        )
    strange = ((factors < 0) | (factors >= np.array(FACTORS))).any(axis=1)
    if strange.any():
        row = int(strange.argmax())
        raise ValueError(f"{where} is not dSprites: picture {row:,} has the factors {factors[row].tolist()}")
