"""Encoded pictures: made from pixels, looked at, and turned into what a shard holds.

A picture that cannot be used is an answer with a named reason, not an exception: among millions there are always some.
"""

from dataclasses import dataclass
from io import BytesIO
from typing import Literal, NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from shards.area import shrink
from shards.header import Header, Refused, header

__all__ = ["KEEP", "Look", "Processing", "Refused", "encode", "look", "process"]

Pixels = NDArray[np.uint8]

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
MOST_PIXELS = 1 << 27


class Look(NamedTuple):
    """An encoded picture that can be used: its width and height in pixels and the extension of its format."""

    width: int
    height: int
    extension: str


@dataclass(frozen=True)
class Processing:
    """What is done to the pictures of a source. Small enough and plain ones keep their bytes."""

    short_side: int = 0
    """Larger pictures are scaled down, by averaging areas, until their shorter side has so many pixels; 0 scales
    none."""
    format: Literal["jpeg", "webp"] = "jpeg"
    """What scaled pictures are encoded as."""
    quality: int = 95
    """Of JPEG and WebP, 1 to 100."""
    check: Literal["decode", "header"] = "decode"
    """Whether each picture is decoded before it is kept, or only its header, length and (PNG) checksums are looked
    at."""

    def __post_init__(self) -> None:
        if self.short_side < 0:
            raise ValueError(f"short_side is {self.short_side}; 0 keeps the size, else it is a number of pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it lies between 1 and 100")


KEEP = Processing()


def encode(pixels: Pixels) -> bytes:
    """Pixels (height, width) or (height, width, 3), red first, as a PNG: grey stays grey, same pixels, same bytes."""
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)) or pixels.ndim < 2 or 0 in pixels.shape:
        raise ValueError(f"no picture has pixels of shape {pixels.shape} and type {pixels.dtype}")
    whole, data = cv2.imencode(".png", pixels if pixels.ndim == 2 else pixels[..., ::-1], _PNG)
    assert whole, "a picture of bytes can always be encoded"
    return data.tobytes()


def look(data: bytes) -> Look | Refused:
    """Decode a JPEG, PNG or WebP wholly and say what it is, or why it is refused."""
    found = header(data)
    if isinstance(found, Refused):
        return found
    if found is None:
        return Refused.NOT_A_PICTURE
    return _checked(data, found)


def process(data: bytes, processing: Processing = KEEP) -> tuple[bytes, Look] | Refused:
    """The bytes that a shard holds of an encoded picture, or why it is refused.

    Plain JPEG, PNG and WebP keep their bytes unless they are to be scaled. Everything else that Pillow can read (CMYK,
    palette, alpha on white, 16 bits, turned by EXIF, GIF, BMP, TIFF) becomes plain RGB or grey of the same look:
    JPEG if it was one, else PNG. Too many pixels are refused before any is decoded.
    """
    found = header(data)
    if isinstance(found, Refused):
        return found
    if found and found.animated:
        return Refused.ANIMATED
    if found and found.width * found.height > MOST_PIXELS:
        return Refused.TOO_LARGE
    if found is None or not found.plain:
        return _remade(data, found, processing)
    if processing.short_side and min(found.width, found.height) > processing.short_side:
        return _scaled(data, found, processing)
    if processing.check == "header":
        return data, Look(found.width, found.height, found.extension)
    seen = _checked(data, found)
    return seen if isinstance(seen, Refused) else (data, seen)


def _checked(data: bytes, found: Header) -> Look | Refused:
    """Decode, as cheaply as shows every fault."""
    if found.width * found.height > MOST_PIXELS:
        return Refused.TOO_LARGE
    if found.extension == "jpg":
        try:
            # At an eighth of the size all of the entropy coding is read, which is where faults are.
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
            return Look(found.width, found.height, "jpg")
        except ValueError:  # CMYK, or a warning that may mean nothing: Pillow knows
            pass
    picture = _opened(data)
    return picture if isinstance(picture, Refused) else Look(found.width, found.height, found.extension)


def _opened(data: bytes) -> Image.Image | Refused:
    """By Pillow, decoded."""
    try:
        picture = Image.open(BytesIO(data))
        if picture.width * picture.height > MOST_PIXELS:
            return Refused.TOO_LARGE
        if getattr(picture, "n_frames", 1) > 1 and picture.format not in ("TIFF", "MPO"):
            return Refused.ANIMATED
        picture.load()
        return picture
    except UnidentifiedImageError:
        return Refused.NOT_A_PICTURE
    except Image.DecompressionBombError:
        return Refused.TOO_LARGE
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:  # what Pillow's decoders raise
        return Refused.TRUNCATED if "truncated" in str(error).lower() else Refused.DAMAGED


def _remade(data: bytes, found: Header | None, processing: Processing) -> tuple[bytes, Look] | Refused:
    """A picture that is not plain, as one that is."""
    picture = _opened(data)
    if isinstance(picture, Refused):
        return picture
    pixels = _plain(picture)
    height, width = pixels.shape[:2]
    if processing.short_side and min(height, width) > processing.short_side:
        return _encoded(_shrunk(pixels, processing.short_side), processing)
    if found and found.extension == "jpg":
        return _encoded(pixels, Processing(quality=processing.quality))
    return encode(pixels), Look(width, height, "png")


def _plain(picture: Image.Image) -> Pixels:
    """Pixels (height, width[, 3]), turned as EXIF says, alpha on white."""
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode in ("I;16", "I;16B", "I;16L", "I"):
        return np.clip(np.rint(np.asarray(picture) / 257), 0, 255).astype(np.uint8)
    if picture.mode in ("1", "L") and "transparency" not in picture.info:
        return np.asarray(picture.convert("L"))
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        above = picture.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB"))
    return np.asarray(picture.convert("RGB"))


def _scaled(data: bytes, found: Header, processing: Processing) -> tuple[bytes, Look] | Refused:
    pixels = _decoded(data, found)
    return pixels if isinstance(pixels, Refused) else _encoded(_shrunk(pixels, processing.short_side), processing)


def _decoded(data: bytes, found: Header) -> Pixels | Refused:
    """The pixels of a plain picture."""
    if found.extension == "jpg":
        try:
            return _flat(simplejpeg.decode_jpeg(data, "GRAY" if found.grey else "RGB", strict=True))
        except ValueError:
            pass
    picture = _opened(data)
    return picture if isinstance(picture, Refused) else _plain(picture)


def _flat(pixels: Pixels) -> Pixels:
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def _shrunk(pixels: Pixels, short_side: int) -> Pixels:
    """Scaled so that the shorter side has `short_side` pixels; a pixel is the mean of the area it covers."""
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    return shrink(pixels, max(short_side, round(height * scale)), max(short_side, round(width * scale)))


def _encoded(pixels: Pixels, processing: Processing) -> tuple[bytes, Look]:
    height, width = pixels.shape[:2]
    if processing.format == "webp":
        seen = pixels if pixels.ndim == 2 else pixels[..., ::-1]
        whole, data = cv2.imencode(".webp", seen, [cv2.IMWRITE_WEBP_QUALITY, processing.quality])
        assert whole, "a picture of bytes can always be encoded"
        return data.tobytes(), Look(width, height, "webp")
    colours = ("GRAY", "Gray") if pixels.ndim == 2 else ("RGB", "420")
    pixels = np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[..., None])
    data = simplejpeg.encode_jpeg(pixels, processing.quality, *colours)
    return data, Look(width, height, "jpg")
