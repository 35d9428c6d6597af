"""The cropped digits of the Street View House Numbers; the splits are the official ones without the extra one."""

from shards.datasets import Dataset
from shards.sources import Arrays, Origin, matlab
from shards.storage import Folder


def read(split: str, origin: Origin) -> Arrays:
    """The pictures of `train` or `test`, 32 x 32."""
    return matlab.digits(Folder(origin.source), split)


DATASET = Dataset(
    name="svhn",
    what="digits of house numbers, 32 x 32, colour",
    licence="non-commercial use only",
    citation="Netzer, Wang, Coates, Bissacco, Wu and Ng 2011, Reading Digits in Natural Images, NIPS workshop",
    classes=tuple("0123456789"),
    splits={"train": 73_257, "test": 26_032},
    read=read,
    source="the folder that holds train_32x32.mat and test_32x32.mat",
)
