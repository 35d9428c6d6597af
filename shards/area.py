"""Scaling pictures down by averaging areas, in whole numbers: the same bytes on every processor.

`area.c` says how; it is compiled when the project is installed. Where it has not been, numpy does the same, to the
last bit and some fifty times slower. (OpenCV's INTER_AREA calculates with floats: within one shade of this.)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import vitscale_area
except ModuleNotFoundError:
    vitscale_area = None

Pixels = NDArray[np.uint8]


def shrink(pixels: Pixels, height: int, width: int) -> Pixels:
    """Pixels (h, w) or (h, w, 3) as (height, width[, 3]), no larger: each is the mean of the area that it covers."""
    if vitscale_area is None:
        return reference(pixels, height, width)
    out = np.empty((height, width, *pixels.shape[2:]), np.uint8)
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    vitscale_area.shrink(np.ascontiguousarray(pixels), out, *pixels.shape[:2], channels, height, width)
    return out


def reference(pixels: Pixels, height: int, width: int) -> Pixels:
    """The same in numpy."""
    rows = _averaged(pixels.astype(np.uint32), height, 64) >> 7  # eight bits behind the point
    columns = _averaged(rows.swapaxes(0, 1), width, 1 << 22) >> 23
    return columns.swapaxes(0, 1).astype(np.uint8)


def _averaged(values: NDArray[Any], to: int, half: int) -> NDArray[Any]:
    """Weighted sums along the first axis, plus `half` for the rounding."""
    first, weights = _weights(len(values), to)
    total = np.full((to, *values.shape[1:]), half, np.uint32)
    for place, weight in enumerate(weights.T):
        there = values[np.minimum(first + place, len(values) - 1)]
        total += weight.reshape(-1, *[1] * (values.ndim - 1)).astype(np.uint32) * there
    return total


def _weights(length: int, to: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each of `to` target pixels the first source pixel under it, and the weights from there on, in 2^-15."""
    begin = np.arange(to)[:, None] * length
    source = begin // to + np.arange(-(-length // to) + 1)
    right = np.minimum((source + 1) * to, begin + length)
    until = ((right - begin) * 65536 + length) // (2 * length)
    return begin[:, 0] // to, np.diff(until, axis=1, prepend=0)
