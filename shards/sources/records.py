"""DMLab as VTAB publishes it: files of TensorFlow's records, in which each record is a `tf.train.Example`.

A record is its length (8 bytes, little endian), a checksum of that, the bytes, a checksum of them (TensorFlow,
`core/lib/io/record_writer.h`). An Example is a protocol buffer (`core/example/example.proto`): a map from names to
lists of bytes, floats or whole numbers. What is listed of a picture is where its bytes lie, and it is read from there.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from shards.sources import Origin, Ranges, key, listing
from shards.sources.archives import apart, unpacked
from shards.sources.tfds import Named
from shards.storage import Folder

ARCHIVE = "dmlab.tar.gz"
_LONGEST = 1 << 30


class Span(NamedTuple):
    """A run of bytes of a record."""

    start: int
    end: int


def mazes(split: str, origin: Origin) -> Named:
    """The pictures of `train`, `validation` or `test`, which VTAB labels in 6 classes.

    The source is `dmlab.tar.gz`, the folder of its files (`dmlab-train.tfrecord…`), or a folder that holds the archive.
    ValueError, naming file and place, where one is damaged.
    """
    folder, files = _files(origin, f"dmlab-{split}.tfrecord")
    names, keys, places, offsets, sizes, labels = [], [], [], [], [], []
    for place, file in enumerate(files):
        where = f"{folder.absolute}/{file}"
        with folder.reading(file) as opened:
            for start, data in records(opened, where):
                image, name, label = _picture(data, f"{where}, record at byte {start:,}")
                names.append(name)
                keys.append(key(name))
                places.append(place)
                offsets.append(start + image.start)
                sizes.append(image.end - image.start)
                labels.append(label)
    table = listing(keys, places, offsets, sizes, np.asarray(labels, np.int64).reshape(-1, 1))
    return Named(Ranges(folder.absolute, pa.array(files, pa.string()), table), names)


def records(file: BinaryIO, where: str) -> Iterator[tuple[int, bytes]]:
    """Place of its first byte, and the bytes, of each record of a file.

    The checksums of lengths are looked at, those of the bytes are not: a damaged picture is refused when it is decoded.
    ValueError, naming the file, where a length is damaged or the file ends within a record.
    """
    place = 0
    while head := file.read(12):
        size = int.from_bytes(head[:8], "little")
        if len(head) < 12 or masked(head[:8]) != int.from_bytes(head[8:], "little") or size > _LONGEST:
            raise ValueError(f"{where} is no file of records, or is damaged at byte {place:,}")
        data = file.read(size + 4)
        if len(data) != size + 4:
            raise ValueError(f"{where} ends within the record at byte {place:,}")
        yield place + 12, data[:-4]
        place += 16 + size


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC = _crc_table()


def masked(data: bytes) -> int:
    """The CRC-32C of a few bytes (RFC 3720, appendix B.4), turned and shifted as records have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def example(data: bytes) -> dict[str, list[Span] | list[int]]:
    """The lists of an Example by name, of bytes as their places in `data`; lists of floats are empty.

    ValueError where it is none.
    """
    found: dict[str, list[Span] | list[int]] = {}
    for _, features in _spans(data, Span(0, len(data)), 1):
        for _, entry in _spans(data, features, 1):
            name, values = b"", Span(0, 0)
            for number, span in _fields(data, entry):
                if number == 1 and isinstance(span, Span):
                    name = data[span.start : span.end]
                elif number == 2 and isinstance(span, Span):
                    values = span
            found[name.decode(errors="replace")] = _list(data, values)
    return found


def _list(data: bytes, feature: Span) -> list[Span] | list[int]:
    for number, span in _spans(data, feature):
        if number == 1:
            return [value for _, value in _spans(data, span, 1)]
        if number == 3:
            return _whole(data, span)
    return []


def _whole(data: bytes, span: Span) -> list[int]:
    """Whole numbers, one by one or packed; those below 0 stand as their complement to 2^64."""
    found: list[int] = []
    for _, value in _fields(data, span):
        if isinstance(value, int):
            found.append(value)
            continue
        at = value.start
        while at < value.end:
            number, at = _varint(data, at, value.end)
            found.append(number)
    return [number - (1 << 64) if number >> 63 else number for number in found]


def _spans(data: bytes, span: Span, wanted: int = 0) -> Iterator[tuple[int, Span]]:
    """The fields that hold bytes, all, or those of one number."""
    for number, value in _fields(data, span):
        if isinstance(value, Span) and (not wanted or number == wanted):
            yield number, value


def _fields(data: bytes, span: Span) -> Iterator[tuple[int, Span | int]]:
    """Number and value of each field of a message: bytes by their place, else a whole number."""
    at, end = span
    while at < end:
        tag, at = _varint(data, at, end)
        value: Span | int
        match tag & 7:
            case 0:
                value, at = _varint(data, at, end)
            case 2:
                size, at = _varint(data, at, end)
                value, at = Span(at, at + size), at + size
            case 1 | 5 as kind:
                size = 8 if kind == 1 else 4
                value, at = int.from_bytes(data[at : at + size], "little"), at + size
            case kind:
                raise ValueError(f"no Example: a field of type {kind}")
        if at > end:
            raise ValueError("no Example: a field is longer than what holds it")
        yield tag >> 3, value


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A whole number, seven bits a byte, and where it ends."""
    value = 0
    for place in range(at, min(at + 10, end)):
        value |= (data[place] & 0x7F) << 7 * (place - at)
        if data[place] < 0x80:
            return value, place + 1
    raise ValueError("no Example: a number has no end")


def _picture(data: bytes, where: str) -> tuple[Span, str, int]:
    """Place of the picture, its name and its label."""
    try:
        found = example(data)
        (image,), (name,), (label,) = found["image"], found["filename"], found["label"]
    except KeyError as error:
        raise ValueError(f"{where} has no {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(image, Span) or not isinstance(name, Span) or not isinstance(label, int):
        raise ValueError(f"{where}: image, filename and label are not bytes, bytes and a number")
    return image, data[name.start : name.end].decode(errors="replace"), label


def _files(origin: Origin, start: str) -> tuple[Folder, list[str]]:
    """Where the files of a split lie, and their names in order; unpacked where an archive holds them."""
    folder, name = apart(origin.source)
    source = folder if name == ARCHIVE else Folder(origin.source)
    for place in (source, source / "dmlab") if name != ARCHIVE else ():
        if files := sorted(name for name in place.sizes() if name.startswith(start)):
            return place, files
    if not source.exists(ARCHIVE):
        raise FileNotFoundError(f"{source.absolute} holds neither {start}… nor {ARCHIVE}")
    root = unpacked(origin, source, ARCHIVE, lambda path: path.rpartition("/")[2].startswith("dmlab-"))
    files = sorted(path for path, _ in root.find() if path.rpartition("/")[2].startswith(start))
    if not files:
        raise ValueError(f"{source.absolute}/{ARCHIVE} holds no {start}…: it is another archive")
    return root, files
