"""Fingerprints of pictures: what copies of a picture are found by among millions.

A perceptual hash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1)
keeps signs of a picture's lowest cosine coefficients. Here it is taken of several views of a small grey thumbnail: of
the whole, and of what remains when edges are cut away, so that a picture that was cropped, or that got a caption strip,
has its match in a view of the other one. A view is a window of each axis, and cutting the window and transforming what
is in it are one linear operator: all views together cost two products of small matrices. How well copies are found is
measured by `benchmarks/dedup.py`; the figures are in `benchmarks/RESULTS.md`.

Legend: b batch, p pixels along an axis of the thumbnail, s spans of an axis, f frequencies, v views.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray

from shards.header import header
from shards.image import MOST_PIXELS, Processing, Refused, process
from shards.sources import Picture

SIDE = 64
"""Pixels along each side of a thumbnail."""

SPANS = ((0.0, 1.0), *((start / 30, start / 30 + 0.9) for start in range(4)))
"""Windows of an axis, in shares of its length; a view is one of them for the rows and one for the columns."""

VIEWS = len(SPANS) ** 2
"""Hashes of a picture; the first is of the whole of it."""

FLAT = 2.0
"""A view whose grey levels deviate by less than this (root mean square of its low frequencies) has no hash."""

PRINTS = pa.schema(
    [
        ("digest", pa.binary(16)),  # BLAKE2b of the encoded bytes, or of the pixels
        ("width", pa.int32()),  # of the thumbnail's original in pixels, 0 where it does not decode
        ("height", pa.int32()),
        ("hashes", pa.binary(8 * VIEWS)),  # little-endian, 0 for a flat view; null where it does not decode
    ]
)

_BITS, _BATCH = 64, 256
_HIGHEST = 9
# The lowest in any direction; without the mean, which is no more than the brightness.
_FREQUENCIES = sorted(product(range(_HIGHEST + 1), repeat=2), key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))
_ROW, _COLUMN = np.array(_FREQUENCIES[1 : 1 + _BITS]).T
_ODD = np.packbits(_COLUMN % 2 == 1, bitorder="little").view("<u8")[0]


@dataclass(frozen=True)
class Fingerprint:
    """What copies of one picture are found by."""

    digest: bytes
    """BLAKE2b of 16 bytes, of the encoded bytes or of the pixels."""
    width: int
    height: int
    hashes: NDArray[np.uint64]
    """(v,), 0 for a flat view."""


def fingerprint(data: bytes | NDArray[np.uint8]) -> Fingerprint | None:
    """Of an encoded picture or of pixels (height, width[, 3]); None where it does not decode."""
    small = _small(data)
    return Fingerprint(digest(data), *small[1:], hashed(small[0][None])[0]) if small else None


def fingerprints(pictures: Iterable[Picture]) -> pa.Table:
    """A row of `PRINTS` for each picture, in their order."""
    digests, sizes, made, waiting = [], [], [], []
    for picture in pictures:
        digests.append(digest(picture.data))
        small = _small(picture.data)
        sizes.append(small[1:] if small else (0, 0))
        waiting.append(small[0] if small else np.zeros((SIDE, SIDE), np.uint8))
        if len(waiting) == _BATCH:
            made.append(hashed(np.stack(waiting)))
            waiting = []
    if waiting:
        made.append(hashed(np.stack(waiting)))
    return _table(digests, np.array(sizes, np.int32).reshape(-1, 2), made)


def _table(digests: list[bytes], sizes: NDArray[np.int32], made: list[NDArray[np.uint64]]) -> pa.Table:
    found = np.concatenate([np.zeros((0, VIEWS), np.uint64), *made])
    columns = [pa.array(digests, pa.binary(16)), pa.array(sizes[:, 0]), pa.array(sizes[:, 1])]
    return _with_hashes(pa.table(columns, PRINTS.names[:-1]), found, sizes[:, 0] > 0)


def _with_hashes(prints: pa.Table, hashes: NDArray[np.uint64], valid: NDArray[np.bool_]) -> pa.Table:
    buffers = [np.packbits(valid, bitorder="little").tobytes(), hashes.astype("<u8").tobytes()]
    kind = pa.binary(8 * hashes.shape[1])
    column = pa.FixedSizeBinaryArray.from_buffers(kind, len(hashes), [pa.py_buffer(buffer) for buffer in buffers])
    return prints.select(PRINTS.names[:-1]).append_column("hashes", column)


def wholes(prints: pa.Table) -> pa.Table:
    """A table of `PRINTS` with no hashes but those of the whole pictures, a tenth of its size."""
    return _with_hashes(prints, unpacked(prints, 1), np.asarray(prints["hashes"].is_valid()))


def unpacked(prints: pa.Table, views: int = VIEWS) -> NDArray[np.uint64]:
    """The first hashes of each row of `PRINTS`, (n, views); 0 where there is none."""
    held = prints.schema.field("hashes").type.byte_width // 8
    parts = [np.zeros((0, min(views, held)), "<u8")]
    for chunk in prints["hashes"].chunks:
        if len(chunk):
            values = np.frombuffer(chunk.buffers()[1], "<u8", len(chunk) * held, 8 * held * chunk.offset)
            valid = np.asarray(chunk.is_valid())[:, None]
            parts.append(np.where(valid, values.reshape(-1, held)[:, :views], 0))
    return np.concatenate(parts).astype(np.uint64, copy=False)


def digest(data: bytes | NDArray[np.uint8]) -> bytes:
    """BLAKE2b of 16 bytes; pixels are taken with their shape."""
    if isinstance(data, bytes):
        return blake2b(data, digest_size=16).digest()
    return blake2b(f"{data.shape}".encode() + np.ascontiguousarray(data).tobytes(), digest_size=16).digest()


def thumbnail(data: bytes | NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """Grey pixels (p, p), each the mean of its area of the stretched picture; None where it does not decode."""
    small = _small(data)
    return small[0] if small else None


def mirrored(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The hashes that the views would have in the picture's mirror image: odd frequencies change their sign."""
    return np.where(hashes == 0, hashes, hashes ^ _ODD)


def hashed(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Hashes (b, v) of thumbnails (b, p, p): 64 signs each, 0 for a flat view."""
    grey = thumbnails.astype(np.float32)
    spectrum = _OPERATOR @ grey @ _OPERATOR.T  # b (s f) (s f)
    spans, lowest = len(SPANS), _HIGHEST + 1
    split = spectrum.reshape(-1, spans, lowest, spans, lowest)
    low = np.moveaxis(split[:, :, _ROW, :, _COLUMN], 0, -1).reshape(len(grey), VIEWS, _BITS)
    packed = np.packbits(np.ascontiguousarray(low > 0), axis=-1, bitorder="little")
    bits = packed.view("<u8")[..., 0].astype(np.uint64)
    return np.where(np.sqrt(np.square(low).sum(-1)) < FLAT, np.uint64(0), bits)


def _operator() -> NDArray[np.float32]:
    """(s f, p): the cosine transform (type II) of each window, scaled so that coefficients are grey levels."""
    rows = []
    edges = np.arange(SIDE + 1) / SIDE
    for start, end in SPANS:
        cover = np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], start), 0, None) / (end - start)
        middle = (np.clip(edges[1:], start, end) + np.clip(edges[:-1], start, end)) / 2
        for frequency in range(_HIGHEST + 1):
            wave = np.cos(np.pi * frequency * (middle - start) / (end - start)) * (2**0.5 if frequency else 1)
            wave -= (wave * cover).sum() if frequency else 0  # so that brightness leaves no trace in it
            rows.append(wave * cover)
    return np.array(rows, np.float32)


_OPERATOR = _operator()


def _small(data: bytes | NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int, int] | None:
    """Thumbnail, width and height; None for what the shards would refuse, but for a JPEG that is cut short."""
    if not isinstance(data, bytes):
        return _reduced(data), data.shape[1], data.shape[0]
    found = header(data)
    if isinstance(found, Refused) or (found and found.width * found.height > MOST_PIXELS):
        return None
    if found and found.plain and found.extension == "jpg":
        try:
            # Scaled by the decoder: most of the work at full size is spared.
            grey = simplejpeg.decode_jpeg(data, "GRAY", min_height=SIDE, min_width=SIDE, strict=False)
            return _reduced(grey[..., 0]), found.width, found.height
        except ValueError:  # a kind that this decoder does not know; the other may
            pass
    plain = process(data, Processing(check="header"))
    if isinstance(plain, Refused):
        return None
    grey = cv2.imdecode(np.frombuffer(plain[0], np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if grey is None else (_reduced(np.asarray(grey, np.uint8)), plain[1].width, plain[1].height)


def _reduced(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if pixels.ndim == 3 else pixels
    return np.asarray(cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)
