"""What the header of an encoded picture says, and whether its bytes go on to the end: without decoding a pixel.

JPEG by the markers of ITU-T T.81 (annex B), PNG by the chunks of the W3C's specification (section 5, each with its
CRC), WebP by the RIFF container of RFC 9649. About ten microseconds a picture: it decides over what is decoded at all.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import StrEnum


class Refused(StrEnum):
    """Why a picture is left out."""

    EMPTY = "empty"
    NOT_A_PICTURE = "not a picture"
    TOO_LARGE = "too large"
    ANIMATED = "animated"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    NO_PICTURE = "no picture"
    NO_LABEL = "no label"


@dataclass(frozen=True, slots=True)
class Header:
    """Width and height in pixels as stored, the format's extension, and whether it is plain.

    Plain is what every decoder turns into the same 8-bit grey or RGB picture: no CMYK, alpha, palette, 16 bits,
    animation, nor a turn that EXIF asks for.
    """

    width: int
    height: int
    extension: str
    plain: bool
    grey: bool = False
    animated: bool = False


def header(data: bytes) -> Header | Refused | None:
    """The header of a JPEG, PNG or WebP; None for the bytes of anything else."""
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return _png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (IndexError, struct.error):
        return Refused.TRUNCATED
    return None if data else Refused.EMPTY


# Start of frame: all codes from C0 to CF but C4 (Huffman tables), C8 (reserved) and CC (arithmetic conditioning).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _jpeg(data: bytes) -> Header | Refused:
    place, turn = 2, 1
    frame: tuple[int, int, int, int] | None = None
    while True:
        while data[place] != 0xFF:  # what some writers leave between segments
            place += 1
        while data[place] == 0xFF:
            place += 1
        marker = data[place]
        if marker == 0xD9:
            return Refused.DAMAGED
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers that stand alone
            place += 1
            continue
        length = data[place + 1] << 8 | data[place + 2]
        if marker in _FRAMES:
            frame = struct.unpack_from(">BHHB", data, place + 3)
        elif marker == 0xE1 and data[place + 3 : place + 9] == b"Exif\0\0":
            turn = _orientation(data[place + 9 : place + 1 + length])
        place += 1 + length
        if marker == 0xDA:
            break
    if not frame or not frame[1] or not frame[2]:
        return Refused.DAMAGED
    # Nothing but the end of the picture reads FF D9 behind the start of a scan.
    if data.rfind(b"\xff\xd9", place) < 0:
        return Refused.TRUNCATED
    depth, height, width, colours = frame
    return Header(width, height, "jpg", depth == 8 and colours in (1, 3) and turn == 1, colours == 1)


def _png(data: bytes) -> Header | Refused:
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    plain, animated, place, pixels = depth == 8 and colour in (0, 2), False, 8, False
    while True:
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        (crc,) = struct.unpack_from(">I", data, end)
        if crc != zlib.crc32(memoryview(data)[place + 4 : end]):
            return Refused.DAMAGED
        if name == b"IEND":
            break
        pixels |= name == b"IDAT"
        if name == b"tRNS" or (name == b"eXIf" and _orientation(data[place + 8 : end]) != 1):
            plain = False
        animated |= name == b"acTL" and struct.unpack_from(">I", data, place + 8)[0] > 1
        place = end + 4
    if not width or not height or not pixels:
        return Refused.DAMAGED
    return Header(width, height, "png", plain and not animated, colour == 0, animated)


def _webp(data: bytes) -> Header | Refused:
    if len(data) < 8 + struct.unpack_from("<I", data, 4)[0]:
        return Refused.TRUNCATED
    kind = data[12:16]
    if kind == b"VP8X":
        flags = data[20]
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        plain = not flags & (0x10 | 0x08 | 0x02)  # alpha, EXIF, animation
        return Header(width, height, "webp", plain, animated=bool(flags & 0x02))
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, "webp", not bits >> 28 & 1)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        if width & 0x3FFF and height & 0x3FFF:
            return Header(width & 0x3FFF, height & 0x3FFF, "webp", True)
    return Refused.DAMAGED


def _orientation(exif: bytes) -> int:
    """Tag 0x0112 of the first directory of a TIFF header; 1, as it is, where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if not order:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == 0x0112 and kind == 3:
                value = struct.unpack_from(f"{order}H", exif, entry + 8)[0]
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
