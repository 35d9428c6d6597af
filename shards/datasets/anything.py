"""Pictures that have no recipe of their own, by the form they come in: `prepare.py folder --name birds --source …`."""

from collections.abc import Callable
from dataclasses import replace

from shards.datasets import Dataset
from shards.manifest import ShardSet
from shards.sources import Origin, Pictures, folders, lists, parquet, sets, tars


def read_folder(split: str, origin: Origin) -> Pictures:
    """All pictures below the source."""
    return folders.read(origin)


def read_tars(split: str, origin: Origin) -> Pictures:
    """All pictures in the tars of the source."""
    return tars.read(origin)


def read_parquet(split: str, origin: Origin) -> Pictures:
    """The rows of the split's files (`train-00000-of-00041.parquet`), or of all where the split is `all`."""
    return parquet.read(origin, "" if split == "all" else split)


def read_list(split: str, origin: Origin) -> Pictures:
    """The pictures that a list names, relative to the folder it lies in."""
    folder, slash, name = origin.source.rpartition("/")
    return lists.read(replace(origin, source=folder if slash else "."), name)


def read_set(split: str, origin: Origin) -> Pictures:
    """The pictures of a shard set."""
    return sets.read(ShardSet(origin.source))


def _any(name: str, what: str, source: str, read: Callable[[str, Origin], Pictures], run: int = 1) -> Dataset:
    return Dataset(name, what, "not stated", "none", 0, {"all": None}, read, source, run)


ROWS = 100
"""Rows of a row group as Hugging Face's datasets write pictures: a shard takes all that it reads of one."""


DATASETS = (
    _any("folder", "your pictures, in class folders", "the folder that holds the class folders", read_folder),
    _any("tars", "your pictures, in tars", "a tar of class tars or of class folders, or a folder of tars", read_tars),
    _any("parquet", "your pictures, in Parquet", "a Parquet file or a folder of them", read_parquet, ROWS),
    _any("set", "the pictures of a shard set, to be scaled or cleaned", "the shard set", read_set),
    _any("list", "your pictures, by a list", "a list of paths and labels: .txt, .csv or .jsonl", read_list),
)
