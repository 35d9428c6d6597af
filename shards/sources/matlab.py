"""What comes in files of MATLAB: digits of SVHN (http://ufldl.stanford.edu/housenumbers), labels of Flowers-102."""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from shards.sources import Arrays
from shards.storage import Folder

FLOWERS = 102


def read(folder: Folder, name: str, *variables: str) -> list[NDArray]:
    """The variables of a file that MATLAB saved, axes as in MATLAB; those of its version 7.3 are not read.

    ValueError, naming the file, where it is damaged or not such a file, or a variable is missing or no array of
    numbers; FileNotFoundError where it is not there.
    """
    from scipy.io import loadmat  # takes longer to import than the rest of this package

    where, data = f"{folder.absolute}/{name}", folder.read(name)
    try:
        found = loadmat(BytesIO(data), variable_names=variables)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{where} is damaged or no file of MATLAB 4 to 7.2: {error}") from error
    for variable in variables:
        if variable not in found or getattr(found[variable], "dtype", np.dtype(object)).kind not in "iuf":
            raise ValueError(f"{where} holds no array of numbers {variable!r}")
    return [found[variable] for variable in variables]


def digits(folder: Folder, split: str) -> Arrays:
    """The pictures (n, 32, 32, 3) of `train`, `test` or `extra`, from `<split>_32x32.mat`; the label is the digit.

    ValueError, naming the file, where its arrays are no pictures with one label from 1 to 10 (which is 0) each.
    """
    name = f"{split}_32x32.mat"
    pixels, labels = read(folder, name, "X", "y")
    where = f"{folder.absolute}/{name}"
    if pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"{where} holds no pictures: X is {pixels.dtype} {pixels.shape}, not uint8 (32, 32, 3, n)")
    if labels.size != pixels.shape[3]:
        raise ValueError(f"{where} holds {pixels.shape[3]:,} pictures and {labels.size:,} labels")
    chosen = _whole(labels, 1, 10, f"{where}: y") % 10
    keys = [f"{split}-{number:06}" for number in range(len(chosen))]
    return Arrays(keys, np.ascontiguousarray(np.moveaxis(pixels, 3, 0)), chosen)


def flowers(folder: Folder, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers, from 1, and the labels, from 0, of the pictures in a split: `trnid`, `valid` or `tstid`.

    From `setid.mat` and `imagelabels.mat`, whose labels begin at 1. ValueError, naming the file, where a picture has no
    label, a label no class, or a picture is there twice.
    """
    every = read(folder, "imagelabels.mat", "labels")[0]
    chosen = read(folder, "setid.mat", split)[0]
    labels = _whole(every, 1, FLOWERS, f"{folder.absolute}/imagelabels.mat: labels") - 1
    where = f"{folder.absolute}/setid.mat: {split}"
    numbers = _whole(chosen, 1, len(labels), where)
    if len(np.unique(numbers)) != len(numbers):
        raise ValueError(f"{where} has a picture twice")
    return numbers, labels[numbers - 1]


def _whole(values: NDArray, least: int, most: int, where: str) -> NDArray[np.int64]:
    """The values in a row, if all are whole numbers from `least` to `most`."""
    flat = values.reshape(-1)
    strange = ~((flat >= least) & (flat <= most)) | (flat % 1 != 0)
    if strange.any():
        place = int(strange.argmax())
        raise ValueError(f"{where} has {flat[place]} at place {place:,}, not a whole number from {least} to {most:,}")
    return flat.astype(np.int64)
