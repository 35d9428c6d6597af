"""CIFAR-10, whole, from its python or binary archive; the splits are the official ones."""

from shards.datasets import Dataset
from shards.sources import Arrays, Origin, cifar

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read(split: str, origin: Origin) -> Arrays:
    """The pictures of `train` or `test`, 32 x 32."""
    return cifar.read(origin.source, split, cifar.TEN, CLASSES)


DATASET = Dataset(
    name="cifar10",
    what="objects and animals, 32 x 32, colour",
    licence="not stated; its authors ask to be cited",
    citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images, chapter 3",
    classes=CLASSES,
    splits={"train": 50_000, "test": 10_000},
    read=read,
    source=f"{cifar.TEN.python.archive} or {cifar.TEN.binary.archive}, or the folder of it or of its files",
)
