"""The contract between who writes a shard set and who reads it.

A set is a folder with `000000.tar ...`, `index.parquet` and, written last, `manifest.json`. The index has one row a
picture and one row group a shard, so that a reader takes it shard by shard. Beside them, where there are any, lie
`refused.parquet` and `duplicates.parquet`: what was left out, and why; and `contamination.parquet`: what the pictures
came from held of test sets. A folder without a manifest is not a set.

A set may describe shards that lie elsewhere (`tars`): then its folder holds everything but the tars.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.storage import Folder

FORMAT = 2
MANIFEST = "manifest.json"
INDEX = "index.parquet"
REFUSED = "refused.parquet"
DUPLICATES = "duplicates.parquet"
CONTAMINATION = "contamination.parquet"

SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("member", pa.string()),  # name of the picture's file in the tar
        ("offset", pa.int64()),  # of the picture's bytes in the tar
        ("size", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("labels", pa.list_(pa.int32())),
    ]
)

REFUSED_SCHEMA = pa.schema([("shard", pa.int32()), ("key", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class Shard:
    """One tar: its name, pictures, bytes and sha256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a shard set is: enough to tell it from any other."""

    name: str
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    files: dict[str, str]
    """The sha256 of the other files beside the manifest, by name."""
    refused: dict[str, int]
    """Pictures that could not be used, by reason; `refused.parquet` names them."""
    removed: dict[str, int] = field(default_factory=dict)
    """Pictures that were taken out as duplicates, by reason; `duplicates.parquet` names them."""
    tars: str = ""
    """Folder or URL of the shards, where they do not lie beside the manifest."""

    @property
    def samples(self) -> int:
        """Pictures in the set."""
        return sum(shard.samples for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def root(self) -> str:
        """One digest over everything: two sets with the same root hold the same bytes in the same order."""
        return sha256(json.dumps(self._values(), sort_keys=True).encode()).hexdigest()

    def _values(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **asdict(self),
            "classes": list(self.classes),
            "shards": [asdict(s) for s in self.shards],
        }

    def to_json(self) -> bytes:
        """The manifest as it stands in `manifest.json`, always the same bytes."""
        counts = {"samples": self.samples, "bytes": self.size, "root": self.root}
        return (json.dumps({**self._values(), **counts}, indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def from_json(data: bytes, where: str) -> "Manifest":
        """Read what `to_json` wrote; ValueError where it is damaged or of a newer format."""
        try:
            values = json.loads(data)
            if values["format"] != FORMAT:
                newer = isinstance(values["format"], int) and values["format"] > FORMAT
                way = "install a newer vitscale to read it" if newer else "make the set again"
                raise ValueError(f"{where} has format {values['format']}, this version reads {FORMAT}: {way}")
            manifest = Manifest(
                name=values["name"],
                recipe=values["recipe"],
                classes=tuple(values["classes"]),
                shards=tuple(Shard(**shard) for shard in values["shards"]),
                files=values["files"],
                refused=values["refused"],
                removed=values["removed"],
                tars=values["tars"],
            )
            root = values["root"]
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{where} is not a manifest: {type(error).__name__} {error}") from error
        if manifest.root != root:
            raise ValueError(f"{where} is damaged: its root digest does not fit what it says")
        return manifest


class ShardSet:
    """A shard set to read: its manifest at once, its index shard by shard.

    ValueError, naming the first file, where the folder is no set or its files do not have the sizes of the manifest.
    """

    def __init__(self, url: str) -> None:
        self.folder = Folder(url)
        self._one_at_a_time = Lock()
        self._copy: Path | None = None
        self.manifest = self._manifest()
        self.tars = Folder(self.manifest.tars) if self.manifest.tars else self.folder
        self._check_sizes()

    def _manifest(self) -> Manifest:
        where = f"{self.folder.absolute}/{MANIFEST}"
        try:
            return Manifest.from_json(self.folder.read(MANIFEST), where)
        except FileNotFoundError:
            if self.folder.sizes():
                raise ValueError(
                    f"{where} does not exist: the set was not finished; make it again with jobs/prepare.py"
                ) from None
            raise ValueError(
                f"there is no shard set at {self.folder.absolute}: no such folder, or an empty one"
            ) from None

    def _check_sizes(self) -> None:
        sizes = self.tars.sizes()
        for shard in self.manifest.shards:
            if shard.name not in sizes:
                raise ValueError(f"{self.tars.absolute}/{shard.name} is missing, though the manifest names it")
            if sizes[shard.name] != shard.bytes:
                raise ValueError(
                    f"{self.tars.absolute}/{shard.name} has {sizes[shard.name]} bytes, not the manifest's {shard.bytes}"
                )
        beside = self.folder.sizes() if self.manifest.tars else sizes
        for name in self.manifest.files:
            if name not in beside:
                raise ValueError(f"{self.folder.absolute}/{name} is missing")

    @cached_property
    def _index(self) -> pq.ParquetFile:
        where = f"{self.folder.absolute}/{INDEX}"
        try:
            index = self._open_index()
        except pa.ArrowException as error:
            raise ValueError(f"{where} is damaged: {error}") from error
        if index.num_row_groups != len(self.manifest.shards):
            raise ValueError(
                f"{where} has {index.num_row_groups} row groups, the manifest names {len(self.manifest.shards)} shards"
            )
        return index

    def _open_index(self) -> pq.ParquetFile:
        if local := self._copy or (self.folder.local and self.folder.local / INDEX):
            return pq.ParquetFile(local, memory_map=True)
        return pq.ParquetFile(BytesIO(self._right(INDEX)))

    def _right(self, name: str) -> bytes:
        """A file beside the manifest; ValueError where its digest is not that of the manifest."""
        for _attempt in range(2):  # a store may have answered with less
            data = self.folder.read(name)
            if sha256(data).hexdigest() == self.manifest.files[name]:
                return data
        raise ValueError(f"{self.folder.absolute}/{name} is damaged: its digest is not that of the manifest")

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Pictures of each shard."""
        return np.array([shard.samples for shard in self.manifest.shards], np.int64)

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """Number of each shard's first picture, counting through the set."""
        return np.concatenate([[0], np.cumsum(self.counts)[:-1]])

    def beside(self, name: str) -> pa.Table | None:
        """`refused.parquet`, `duplicates.parquet` or `contamination.parquet`; None where there was nothing to say.

        ValueError where it is damaged.
        """
        if name not in self.manifest.files:
            return None
        return pq.read_table(BytesIO(self._right(name)))

    def rows(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The index of one shard: a row a picture, in the order of the tar, with the columns of `SCHEMA` or some."""
        with self._one_at_a_time:  # pyarrow's reader is not for several threads
            return self._index.read_row_group(shard, columns=columns)

    def read_index_from(self, copy: Path) -> None:
        """Take the index from a local file with its bytes, so that it need not be held in memory."""
        self._copy = copy
