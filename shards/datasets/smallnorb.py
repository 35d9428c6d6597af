"""Two tasks of VTAB on smallNORB (Zhai et al. 2019, appendix A): from which side and from how high a toy is seen.

The splits are the official ones, of which VTAB takes half of the test's for validation.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shards.datasets import Dataset
from shards.sources import Arrays, Origin, norb
from shards.storage import Folder

Task = Callable[[norb.Views], NDArray[np.int64]]

AZIMUTHS = tuple(f"{angle} degrees" for angle in range(0, 360, 20))
ELEVATIONS = tuple(f"{angle} degrees" for angle in range(30, 75, 5))


def azimuth(views: norb.Views) -> NDArray[np.int64]:
    """The side that a toy is seen from, as a class."""
    return views.azimuth


def elevation(views: norb.Views) -> NDArray[np.int64]:
    """The height that a toy is seen from, as a class."""
    return views.elevation


def read(task: Task, split: str, origin: Origin) -> Arrays:
    """The pictures of `train` or `test`, 96 x 96, from the first camera, labelled by a task."""
    found = norb.views(Folder(origin.source), split)
    return Arrays([f"{split}-{number:05}" for number in range(len(found.pixels))], found.pixels, task(found))


def _dataset(name: str, what: str, task: Task, classes: tuple[str, ...]) -> Dataset:
    return Dataset(
        name=name,
        what=what,
        licence="research; not to be sold",
        citation="LeCun, Huang and Bottou 2004, Learning Methods for Generic Object Recognition, CVPR",
        classes=classes,
        splits={"train": 24_300, "test": 24_300},
        read=partial(read, task),
        source=f"the folder that holds {norb.FILES['train']}-dat.mat.gz, …-info.mat.gz and those of the test",
    )


DATASETS = (
    _dataset("smallnorb_azimuth", "the side a toy is seen from, 96 x 96, grey", azimuth, AZIMUTHS),
    _dataset("smallnorb_elevation", "the height a toy is seen from, 96 x 96, grey", elevation, ELEVATIONS),
)
