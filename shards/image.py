"""Encoded pictures: made from pixels, and looked at before they are packed.

A picture that cannot be used is an answer with a named reason, not an exception: among millions there are always some.
"""

from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# OpenCV's wheel brings the classic zlib, whose output does not depend on the processor; Pillow's brings zlib-ng,
# whose output may. The settings stand here so that no other default changes the bytes.
_PNG = [
    cv2.IMWRITE_PNG_COMPRESSION,
    6,
    cv2.IMWRITE_PNG_STRATEGY,
    cv2.IMWRITE_PNG_STRATEGY_FILTERED,
    cv2.IMWRITE_PNG_FILTER,
    cv2.IMWRITE_PNG_ALL_FILTERS,
]

_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
_MOST_PIXELS = 1 << 27


class Refused(StrEnum):
    """Why a picture is left out."""

    EMPTY = "empty"
    NOT_A_PICTURE = "not a picture"
    OTHER_FORMAT = "neither PNG, JPEG nor WebP"
    TOO_LARGE = "too large"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class Look:
    """An encoded picture that decodes: its width and height in pixels and the extension of its format."""

    width: int
    height: int
    extension: str


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels (height, width) or (height, width, 3), red first, as a PNG: grey stays grey, same pixels, same bytes."""
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)) or pixels.ndim < 2 or 0 in pixels.shape:
        raise ValueError(f"no picture has pixels of shape {pixels.shape} and type {pixels.dtype}")
    whole, data = cv2.imencode(".png", pixels if pixels.ndim == 2 else pixels[..., ::-1], _PNG)
    assert whole, "a picture of bytes can always be encoded"
    return data.tobytes()


def look(data: bytes) -> Look | Refused:
    """Decode a picture wholly and say what it is, or why it is refused."""
    if not data:
        return Refused.EMPTY
    try:
        with Image.open(BytesIO(data)) as picture:
            if picture.format not in _EXTENSIONS:
                return Refused.OTHER_FORMAT
            if picture.width * picture.height > _MOST_PIXELS:
                return Refused.TOO_LARGE
            picture.load()
            return Look(picture.width, picture.height, _EXTENSIONS[picture.format])
    except UnidentifiedImageError:
        return Refused.NOT_A_PICTURE
    except Image.DecompressionBombError:
        return Refused.TOO_LARGE
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise
        return Refused.TRUNCATED if "truncated" in str(error).lower() else Refused.DAMAGED
