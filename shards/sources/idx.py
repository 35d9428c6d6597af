"""IDX, the format of MNIST and its family (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist).

A header of big-endian 32-bit numbers (a magic number that holds the type and the number of axes, then the length of
each axis), then the bytes.
"""

import gzip
import zlib
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from shards.storage import Folder

_UBYTE = 8


def read(folder: Folder, name: str, axes: int, *, sha256: str = "") -> NDArray[np.uint8]:
    """The array of bytes, of so many axes, in the file `name` or `name.gz` of `folder`.

    ValueError, naming the file, where it is no such file, is cut short or too long, or where its decompressed bytes
    do not have the digest `sha256`, if one is given; FileNotFoundError where it is not there.
    """
    data, where = _decompressed(folder, name)
    found = parse(data, axes, where)
    if sha256 and _digest(data) != sha256:
        raise ValueError(f"{where} is not the published file: sha256 {_digest(data)}, expected {sha256}")
    return found


def pair(
    folder: Folder, pictures: str, labels: str, *, digests: tuple[str, str] = ("", "")
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels (n, height, width) and labels (n,) of two files; ValueError where their counts differ."""
    pixels = read(folder, pictures, 3, sha256=digests[0])
    classes = read(folder, labels, 1, sha256=digests[1])
    if len(pixels) != len(classes):
        raise ValueError(
            f"{folder.absolute}: {pictures} holds {len(pixels):,} pictures, {labels} {len(classes):,} labels"
        )
    return pixels, classes


def parse(data: bytes, axes: int, where: str) -> NDArray[np.uint8]:
    """The array that the bytes of an IDX file hold; `where` names the file in errors."""
    magic = _UBYTE << 8 | axes
    found = int.from_bytes(data[:4], "big")
    if len(data) < 4 or found != magic:
        raise ValueError(
            f"{where} is no IDX file of bytes with {axes} axes: magic {found:#010x}, expected {magic:#010x}"
        )
    start = 4 + 4 * axes
    if len(data) < start:
        raise ValueError(f"{where} is cut short: {len(data)} bytes, its header alone has {start}")
    shape = tuple(int(length) for length in np.frombuffer(data, ">u4", axes, offset=4))
    expected = start + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        word = "cut short" if len(data) < expected else "too long"
        raise ValueError(
            f"{where} is {word}: {len(data):,} bytes, {expected:,} expected for {' x '.join(map(str, shape))}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _decompressed(folder: Folder, name: str) -> tuple[bytes, str]:
    for file in (f"{name}.gz", name):
        where = f"{folder.absolute}/{file}"
        try:
            data = folder.read(file)
            return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data), where
        except FileNotFoundError:
            continue
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{where} is damaged: {error}") from error
    raise FileNotFoundError(f"{folder.absolute} holds neither {name}.gz nor {name}")


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()
