"""Bytes to pixels: decoding, and the crop that a picture gets in an epoch.

Legend: n pictures, h w pixels, all pictures RGB and uint8.
"""

from io import BytesIO
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.seed import keys, uniform

Pixels = NDArray[np.uint8]

_ATTEMPTS = 10
_RATIO = (3 / 4, 4 / 3)


class Crops(NamedTuple):
    """For n pictures the box that is kept, in pixels of the original, and whether it is mirrored."""

    left: NDArray[np.int64]
    top: NDArray[np.int64]
    width: NDArray[np.int64]
    height: NDArray[np.int64]
    mirrored: NDArray[np.bool_]


def random_crops(
    width: NDArray[np.int64],
    height: NDArray[np.int64],
    sample: NDArray[np.int64],
    epoch: NDArray[np.int64],
    *,
    seed: int,
    area: float,
    flip: bool,
) -> Crops:
    """The inception crop (Szegedy et al. 2015, section 6) of each picture: a function of (seed, epoch, sample).

    A share of the area drawn uniformly from `area` to 1, an aspect ratio drawn from 3/4 to 4/3 on a logarithmic
    scale, and a uniform place; the first of ten draws that fits, or the whole picture.
    """
    draws = uniform(keys("crop", seed, epoch, sample)[:, None], np.arange(4 * _ATTEMPTS + 1))  # n, 41
    share, shape, x, y = draws[:, 1:].reshape(-1, _ATTEMPTS, 4).transpose(2, 0, 1)  # n, attempts each
    kept = (area + share * (1 - area)) * (width * height)[:, None]
    ratio = np.exp(np.log(_RATIO[0]) + shape * (np.log(_RATIO[1]) - np.log(_RATIO[0])))
    w = np.rint(np.sqrt(kept * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(kept / ratio)).astype(np.int64)
    fits = (w <= width[:, None]) & (h <= height[:, None]) & (w > 0) & (h > 0)
    first = (np.arange(len(fits)), fits.argmax(1))
    some = fits.any(1)
    w, h = np.where(some, w[first], width), np.where(some, h[first], height)
    left = (x[first] * (width - w + 1)).astype(np.int64)
    top = (y[first] * (height - h + 1)).astype(np.int64)
    return Crops(left, top, w, h, (draws[:, 0] < 0.5) & flip)


def placed_crops(
    width: NDArray[np.int64],
    height: NDArray[np.int64],
    sample: NDArray[np.int64],
    epoch: NDArray[np.int64],
    *,
    seed: int,
    share: float,
    flip: bool,
) -> Crops:
    """A crop of `share` of each side, at a uniform place that is a function of (seed, epoch, sample).

    The same as scaling a picture to 1 / share of the wanted size and cutting that out of it (BiT, appendix F).
    """
    draws = uniform(keys("place", seed, epoch, sample)[:, None], np.arange(3))  # n, 3
    w, h = (np.maximum(1, np.rint(side * share)).astype(np.int64) for side in (width, height))
    left = (draws[:, 1] * (width - w + 1)).astype(np.int64)
    top = (draws[:, 2] * (height - h + 1)).astype(np.int64)
    return Crops(left, top, w, h, (draws[:, 0] < 0.5) & flip)


def central_crops(width: NDArray[np.int64], height: NDArray[np.int64], *, share: float) -> Crops:
    """The square in the middle whose side is `share` of the shorter side; 7/8 is the paper's 224 of 256."""
    side = np.maximum(1, np.rint(np.minimum(width, height) * share)).astype(np.int64)
    return Crops((width - side) // 2, (height - side) // 2, side, side, np.zeros(len(side), np.bool_))


def decode(data: bytes) -> Pixels:
    """The picture as (h, w, 3) RGB; ValueError where the bytes are none.

    Without turning by EXIF: `shards` has turned what is to be turned.
    """
    if simplejpeg.is_jpeg(data):
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            return _decode_otherwise(data)
    if not data:
        raise ValueError("not a picture: it has no bytes")
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return _decode_otherwise(data) if found is None else found.astype(np.uint8, copy=False)


def _decode_otherwise(data: bytes) -> Pixels:
    """By Pillow, which knows the formats and colour spaces that the fast decoders refuse."""
    try:
        return np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    except OSError as error:
        raise ValueError(f"not a picture: {error}") from error


def cut(picture: Pixels, crops: Crops, i: int, out: Pixels) -> None:
    """Write crop `i` of a picture, scaled to the size of `out` (h, w, 3), into `out`."""
    left, top, width, height = crops.left.item(i), crops.top.item(i), crops.width.item(i), crops.height.item(i)
    scale(picture, left, top, width, height, out, mirrored=crops.mirrored.item(i))


def scale(
    picture: Pixels,
    left: int,
    top: int,
    width: int,
    height: int,
    out: Pixels,
    *,
    mirrored: bool = False,
    antialiased: bool = True,
) -> None:
    """Write a box of a picture, scaled to the size of `out` (h, w, 3), into `out`; ValueError if it reaches beyond."""
    box = picture[max(top, 0) : top + height, max(left, 0) : left + width]
    if box.shape[:2] != (height, width) or box.size == 0:
        size = f"{picture.shape[1]} x {picture.shape[0]}"
        raise ValueError(f"the box of {width} x {height} at ({left}, {top}) reaches beyond the picture, {size}")
    # Shrinking averages what falls into a pixel; only enlarging may look at four neighbours alone.
    averaged = antialiased and width > out.shape[1] and height > out.shape[0]
    how = cv2.INTER_AREA if averaged else cv2.INTER_LINEAR
    scaled = box if box.shape == out.shape else cv2.resize(box, (out.shape[1], out.shape[0]), interpolation=how)
    out[:] = scaled[:, ::-1] if mirrored else scaled
