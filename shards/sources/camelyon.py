"""PatchCamelyon (Veeling et al. 2018): stained tissue, 96 x 96, in files of HDF5, one of pictures, one of labels.

HDF5 is read by h5py, which is needed for this alone.
"""

import gzip
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.sources import Arrays, Origin, Picture, listing
from shards.sources.tfds import Named
from shards.storage import Folder

PARTS = {"train": "train", "validation": "valid", "test": "test"}
SIDE = 96
_AT_ONCE = 1024


@dataclass(frozen=True)
class Patches:
    """All pictures of a split, in their file until some are taken."""

    folder: Folder
    file: str
    keys: list[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] = ()

    @property
    def table(self) -> pa.Table:
        """A row a picture; the offset is its number."""
        count = len(self)
        return listing(self.keys, np.zeros(count), np.arange(count), np.full(count, -1), self.labels[:, None])

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, numbers: NDArray[np.int64]) -> Arrays:
        """The pictures of these numbers, in this order, read into memory: 27 kB each.

        ValueError, naming the file, where it is damaged or holds no pictures or another count of them.
        """
        with _opened(self.folder, self.file, "x") as stored:
            if stored.shape != (len(self), SIDE, SIDE, 3) or stored.dtype != np.uint8:
                what = f"{stored.dtype} {stored.shape}, not uint8 ({len(self)}, {SIDE}, {SIDE}, 3)"
                raise ValueError(f"{self.folder.absolute}/{self.file} holds {what}")
            pixels = np.empty((len(numbers), SIDE, SIDE, 3), np.uint8)
            # Block by block from front to back, since a piece of the file is unpacked as a whole.
            for start in range(0, len(self), _AT_ONCE):
                here = np.flatnonzero((numbers >= start) & (numbers < start + _AT_ONCE))
                if len(here):
                    pixels[here] = stored[start : start + _AT_ONCE][numbers[here] - start]
        keys = [self.keys[number] for number in numbers.tolist()]
        return Arrays(keys, pixels, self.labels[numbers], self.classes)

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.take(np.arange(len(self))))


def patches(split: str, origin: Origin) -> Named:
    """The pictures of `train`, `validation` or `test`, in the order of the file; 1 is where there is a metastasis.

    The source is the folder of the files `camelyonpatch_level_2_split_train_x.h5.gz` and so on, or of what they unpack
    to. ValueError, naming the file, where one is damaged.
    """
    part = PARTS[split]
    folder, start = Folder(origin.source), f"camelyonpatch_level_2_split_{part}"
    pictures, facts = (_named(folder, f"{start}_{letter}.h5") for letter in "xy")
    with _opened(folder, facts, "y") as stored:
        labels = np.asarray(stored[:]).reshape(-1)
    where = f"{folder.absolute}/{facts}"
    if labels.dtype.kind not in "iu" or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{where} has other labels than 0 and 1")
    names = [f"{part}_{number}" for number in range(len(labels))]
    return Named(Patches(folder, pictures, names, labels.astype(np.int64)), names)


def _named(folder: Folder, name: str) -> str:
    for file in (name, f"{name}.gz"):
        if folder.exists(file):
            return file
    raise FileNotFoundError(f"{folder.absolute} holds neither {name}.gz nor {name}")


@contextmanager
def _opened(folder: Folder, name: str, dataset: str) -> Iterator[Any]:
    """A data set of a file, which is unpacked first, to a temporary one, where it is compressed."""
    try:
        import h5py  # type: ignore[import-not-found]  # for this data set alone
    except ModuleNotFoundError as error:
        raise ValueError(f"{folder.absolute}/{name} is read by the package h5py: pip install h5py") from error
    with folder.reading(name) as packed, tempfile.TemporaryFile(prefix="vitscale-") as plain:
        if name.endswith(".gz"):
            try:
                shutil.copyfileobj(gzip.GzipFile(fileobj=packed), plain, 1 << 22)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{folder.absolute}/{name} is damaged: {error}; fetch it again") from error
        try:
            opened = cast(Any, h5py).File(plain if name.endswith(".gz") else packed, "r")
            stored = opened[dataset]
        except (OSError, KeyError) as error:
            raise ValueError(f"{folder.absolute}/{name} is no file of PatchCamelyon: {error}") from error
        with opened:
            yield stored
