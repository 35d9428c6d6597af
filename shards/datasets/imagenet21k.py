"""ImageNet-21k in its two releases, and the subset of the newer one that leaves rare classes out."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.chance import permuted
from shards.datasets import Dataset
from shards.datasets.imagenet1k import LICENCE
from shards.sources import Origin, Ranges, tars

PROCESSED = "imagenet21k_processed"
COMMON = 500
"""Pictures that a class must have to be kept (Ridnik et al. 2021, on preprocessing ImageNet-21K)."""
HELD_OUT = 50
"""Pictures of each kept class that are for validation (the same)."""


def read(split: str, origin: Origin) -> Ranges:
    """All pictures; the classes are the WordNet numbers in order."""
    return tars.read(origin)


def read_processed(split: str, origin: Origin) -> Ranges:
    """The pictures of `train` or `val` of the classes that have at least `COMMON`, in the order of the source.

    Which `HELD_OUT` of a class are for validation depends on their keys and its name alone, so not on how the tars
    were packed, nor on the other classes.
    """
    found = tars.read(origin)
    labels = tars.labels_of(found)
    counts = np.bincount(labels, minlength=len(found.classes))
    kept = np.flatnonzero(counts >= COMMON)
    held_out = np.zeros(len(found), bool)
    held_out[_held_out(found, labels, counts, kept)] = True
    place = np.full(len(found.classes), -1)
    place[kept] = np.arange(len(kept))
    wanted = np.flatnonzero((place[labels] >= 0) & (held_out == (split == "val")))
    return tars.relabelled(
        found.take(wanted), place[labels[wanted]], tuple(found.classes[number] for number in kept.tolist())
    )


def _held_out(
    found: Ranges, labels: NDArray[np.int32], counts: NDArray[np.int64], kept: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The numbers of the pictures that are for validation."""
    table = pa.table({"label": pa.array(labels), "key": found.table["key"]})
    order = pc.call_function(
        "sort_indices", [table], pc.SortOptions([("label", "ascending"), ("key", "ascending")])
    ).to_numpy()
    first = np.cumsum(counts) - counts
    places = [
        first[label] + permuted(np.arange(HELD_OUT), int(counts[label]), PROCESSED, found.classes[label])
        for label in kept.tolist()
    ]
    return order[np.concatenate([np.zeros(0, np.int64), *places])].astype(np.int64)


WINTER21 = "winter21_whole.tar.gz, or the folder of its class tars"
DENG = "Deng et al. 2009, CVPR, doi:10.1109/CVPR.2009.5206848"

DATASETS = (
    Dataset(
        name="imagenet21k",
        what="photographs of all synsets, release of winter 2021",
        licence=LICENCE,
        citation=DENG,
        classes=19_167,
        splits={"train": 13_153_500},
        read=read,
        source=WINTER21,
    ),
    Dataset(
        name="imagenet21k_fall11",
        what="photographs of all synsets, release of fall 2011",
        licence=LICENCE,
        citation=DENG,
        classes=21_841,
        splits={"train": 14_197_122},
        read=read,
        source="fall11_whole.tar, or the folder of its class tars",
    ),
    Dataset(
        name=PROCESSED,
        what="the classes of winter 2021 that have 500 pictures or more",
        licence=LICENCE,
        citation=f"Ridnik et al. 2021, arXiv:2104.10972; pictures: {DENG}",
        classes=10_450,
        splits={"train": 11_060_223, "val": 522_500},
        read=read_processed,
        source=WINTER21,
    ),
)
