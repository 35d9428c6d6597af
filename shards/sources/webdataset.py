"""WebDataset shards made elsewhere (by webdataset itself, img2dataset, timm): indexed where they lie, not copied.

A shard is a tar, in any dialect. Members whose path is the same up to the first dot of its last part lie side by side
and are one sample: a picture, its label, and whatever else its maker added (https://github.com/webdataset/webdataset,
"The WebDataset Format"). A row of the index says where in the tar the picture's bytes are.
"""

import json
import mmap
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from braceexpand import braceexpand

from shards.image import Look, Refused, look
from shards.manifest import SCHEMA, Shard
from shards.pack import Packed
from shards.storage import Folder

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""What a picture's member may be called, in any case of letters; of several in one sample the first of these."""

FIELDS = ("label", "labels", "cls", "class")
"""Where labels are looked for in a sample's JSON; the first that is there."""

# The first bytes of gzip, bzip2, xz and Zstandard files.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_UNREADABLE = "is compressed and cannot be read by place: unpack it or make shards anew"

# Members that webdataset takes for remarks on the shard.
_REMARK = re.compile(r"__[^/]*__($|/)")
_WHOLE = re.compile(r"\s*[0-9]{1,10}(\.0)?\s*")
_LARGEST = 2**31 - 1


def expand(url: str) -> tuple[Folder, list[str]]:
    """The folder and the names of its shards that `url` means.

    A folder means every `*.tar` directly in it, in order; `.../{00000..00099}.tar`, in the notation that webdataset
    reads, means just these, whether they are there or not, as does the URL of one tar. FileNotFoundError where a
    folder holds none, ValueError where the pattern is no pattern of files of one folder or names compressed tars.
    """
    if url.endswith(_COMPRESSED_NAMES):
        raise ValueError(f"{url} {_UNREADABLE}")
    if "{" in url or url.endswith(".tar"):
        return _expanded(url)
    folder = Folder(url)
    names = sorted(folder.sizes())
    if tars := [name for name in names if name.endswith(".tar") and not name.startswith(".")]:
        return folder, tars
    if compressed := [name for name in names if name.endswith(_COMPRESSED_NAMES)]:
        raise ValueError(f"{folder}/{compressed[0]} {_UNREADABLE}")
    raise FileNotFoundError(f"there is no *.tar in {folder}")


def _expanded(url: str) -> tuple[Folder, list[str]]:
    try:
        places = list(braceexpand(url))
    except ValueError as error:
        raise ValueError(f"{url} is no pattern of shards such as {{00000..00099}}.tar: {error}") from error
    folders = {place[: len(place) - len(_last(place))] or "." for place in places}
    names = [_last(place) for place in places]
    if len(folders) > 1:
        raise ValueError(f"{url} means files of {len(folders)} folders; the shards of a set lie in one")
    if len(set(names)) != len(names):
        raise ValueError(f"{url} means the same file twice")
    return Folder(folders.pop()), names


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def split(path: str) -> tuple[str, str] | None:
    """A member's key and its extension in lower case: all up to the first dot of the last part, and what follows.

    None where there is no such dot, and for hidden files, which macOS adds to tars.
    """
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and dot else None


def index_shard(folder: Folder, name: str, number: int, field: str = "") -> Packed:
    """The index of one foreign tar, as shard `number` of a set; the tar is read once, and not changed.

    The labels of a picture are the number in its `cls`, or a number or list of numbers in its `json`: under the name
    `field`, and then there only, or else the first of `FIELDS`. Keys and names of members stay what they are. Samples
    without a picture or a label, and pictures that do not decode, are refused. ValueError, naming file and offset,
    where the tar is cut short, damaged or compressed, where a label is no number, and where two samples have one key.
    """
    where = f"{folder}/{name}"
    rows: dict[str, list[Any]] = {column: [] for column in SCHEMA.names}
    refused: list[tuple[str, str]] = []
    with _mapped(folder, name) as tar:
        shard_sha256 = sha256(tar).hexdigest()
        for key, members in _samples(_members(tar, where), where):
            found = _sample(tar, members, field, where)
            if isinstance(found, Refused):
                refused.append((key, found.value))
                continue
            picture, seen, labels = found
            values = (number, key, picture.name, picture.offset_data, picture.size, seen.width, seen.height, labels)
            for column, value in zip(rows.values(), values, strict=True):
                column.append(value)
        shard = Shard(name, len(rows["key"]), len(tar), shard_sha256)
    return Packed(shard, pa.table(rows, SCHEMA), refused)


@contextmanager
def _mapped(folder: Folder, name: str) -> Iterator[mmap.mmap]:
    """The bytes of a file; where the folder is remote, those of a copy for as long."""
    with tempfile.TemporaryDirectory(prefix="vitscale-") as kept:
        path = _fetched(folder, name, Path(kept))
        if not path.stat().st_size:
            raise ValueError(f"{folder}/{name} is empty: fetch or make it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _fetched(folder: Folder, name: str, kept: Path) -> Path:
    path = (folder.local or kept) / name
    try:
        if not folder.local:
            folder.get(name, path)
        if path.is_file():
            return path
    except FileNotFoundError:
        pass
    raise FileNotFoundError(f"{folder}/{name} does not exist")


def _members(tar: mmap.mmap, where: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar; ValueError unless all of it is sound, to the mark of its end."""
    if tar[:6].startswith(_COMPRESSED):
        raise ValueError(f"{where} {_UNREADABLE}")
    end = 0
    for member, end in _walk(tar, where):
        if end > len(tar):
            raise ValueError(
                f"{where} is cut short: it ends at byte {len(tar):,}, within {member.name}, "
                f"which starts at byte {member.offset_data:,}; fetch or make it again"
            )
        if member.isreg() and member.sparse:
            raise ValueError(
                f"{where}: {member.name} at byte {member.offset:,} is stored with holes: make the tar anew"
            )
        if member.isreg():
            yield member
    _check_end(tar, end, where)


def _walk(tar: mmap.mmap, where: str) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Members, and where the next one's header is."""
    end = 0
    try:
        # A name that is not UTF-8 is spelt out in ASCII, since an index is text.
        with tarfile.open(fileobj=tar, mode="r:", errors="backslashreplace") as members:
            for member in members:
                end = members.offset
                yield member, end
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(f"{where} is no tar, or damaged, at byte {end:,} ({error}); fetch or make it again") from error


def _check_end(tar: mmap.mmap, end: int, where: str) -> None:
    """Python's tarfile takes whatever is no header for the end; it is one where zeros follow, and nothing else."""
    if len(tar) < end + tarfile.BLOCKSIZE:
        raise ValueError(
            f"{where} is cut short: it ends at byte {len(tar):,} without the mark of a tar's end; "
            "fetch or make it again"
        )
    if any(tar[end : end + tarfile.BLOCKSIZE]):
        raise ValueError(f"{where} is damaged: at byte {end:,} is no header of a member; fetch or make it again")
    if tar[end:].strip(b"\0"):
        raise ValueError(
            f"{where} goes on behind its end at byte {end:,}, where no reader looks: join tars with tar --concatenate"
        )


def _samples(members: Iterable[tarfile.TarInfo], where: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Key and members, by extension, of each sample."""
    named = ((split(member.name), member) for member in members if not _REMARK.match(member.name))
    before: set[str] = set()
    for key, group in groupby(((*name, member) for name, member in named if name), key=lambda each: each[0]):
        sample: dict[str, tarfile.TarInfo] = {}
        for _, extension, member in group:
            if key in before or extension in sample:
                raise ValueError(
                    f"{where}: two samples have the key {key!r}, the second at byte {member.offset:,}; keys are to be "
                    "different and the members of a sample to lie side by side"
                )
            sample[extension] = member
        before.add(key)
        yield key, sample


def _sample(
    tar: mmap.mmap, members: dict[str, tarfile.TarInfo], field: str, where: str
) -> tuple[tarfile.TarInfo, Look, list[int]] | Refused:
    """The picture's member, how it looks, and its labels."""
    picture = next((members[extension] for extension in EXTENSIONS if extension in members), None)
    if not picture:
        return Refused.NO_PICTURE
    labels = _labels(tar, members, field, where)
    if labels is None:
        return Refused.NO_LABEL
    seen = look(_data(tar, picture))
    return seen if isinstance(seen, Refused) else (picture, seen, labels)


def _data(tar: mmap.mmap, member: tarfile.TarInfo) -> bytes:
    return tar[member.offset_data : member.offset_data + member.size]


def _labels(tar: mmap.mmap, members: dict[str, tarfile.TarInfo], field: str, where: str) -> list[int] | None:
    if "cls" in members and not field:
        return _numbers(tar, members["cls"], lambda data: data.decode(), where)
    if "json" not in members:
        return None
    return _numbers(tar, members["json"], lambda data: _chosen(json.loads(data), field), where)


def _chosen(values: Any, field: str) -> Any:
    given = (values.get(name) for name in ([field] if field else FIELDS)) if isinstance(values, dict) else ()
    return next((value for value in given if value is not None), None)


def _numbers(tar: mmap.mmap, member: tarfile.TarInfo, read: Callable[[bytes], Any], where: str) -> list[int] | None:
    try:
        given = read(_data(tar, member))
        return None if given is None else [_number(one) for one in (given if isinstance(given, list) else [given])]
    except ValueError as error:
        raise ValueError(
            f"{where}: {member.name} at byte {member.offset:,} gives no label ({error}); "
            "labels are whole numbers from 0, and another field of a json can be chosen"
        ) from error


def _number(value: Any) -> int:
    """A whole number, as such, as a float (which tables with gaps make of it) or as text."""
    if isinstance(value, str | float) and _WHOLE.fullmatch(str(value)):
        value = int(float(value))
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        raise ValueError(f"{str(value)[:60]!r} is none")
    return value
