"""CLEVR (Johnson et al. 2017): drawn scenes of three to ten objects, with what is known of each in JSON."""

import json
from collections.abc import Callable, Sequence

import numpy as np

from shards.sources import Origin
from shards.sources.tfds import Named
from shards.sources.trees import found

FOLDERS = {"train": "train", "validation": "val"}
COUNTS = range(3, 11)
"""How many objects a scene may have."""
NEAR = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
"""Edges of the classes of distance (google-research/task_adaptation, `data/clevr.py`)."""

Task = Callable[[Sequence[Sequence[float]]], int]
"""The label of a scene, by the `pixel_coords` of its objects: x, y and the distance from the camera."""


def count(objects: Sequence[Sequence[float]]) -> int:
    """VTAB's task (Zhai et al. 2019, appendix A): how many objects there are, from three on."""
    if len(objects) not in COUNTS:
        raise ValueError(f"{len(objects)} objects, not {COUNTS[0]} to {COUNTS[-1]}")
    return len(objects) - COUNTS[0]


def distance(objects: Sequence[Sequence[float]]) -> int:
    """VTAB's task (Zhai et al. 2019, appendix A): how far the nearest object is; an edge is of the nearer class."""
    # Single precision, as these numbers have in TensorFlow Datasets.
    nearest = min((np.float32(place[2]) for place in objects), default=np.float32(0))
    if not NEAR[0] < nearest <= NEAR[-1]:
        raise ValueError(f"the nearest object's distance is {nearest}, not above {NEAR[0]:g} and up to {NEAR[-1]:g}")
    return below(float(nearest), NEAR)


def below(value: float, edges: Sequence[float]) -> int:
    """The number of the last of `edges`, which rise, that is below the value."""
    return int(np.searchsorted(np.asarray(edges), value, side="left")) - 1


def scenes(task: Task, split: str, origin: Origin) -> Named:
    """The pictures of `train` or `validation`, which has the labels that the official test set has not.

    The source is the folder `CLEVR_v1.0`, its zip, or a folder with one of these. ValueError, naming file and picture,
    where a scene is none that CLEVR has.
    """
    tree = found(origin, ("CLEVR_v1.0",), ("CLEVR_v1.0.zip",), "scenes")
    name = f"scenes/CLEVR_{FOLDERS[split]}_scenes.json"
    where = f"{tree.where}/{name}"
    try:
        listed = json.loads(tree.read([name])[0])["scenes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} holds no scenes: {error}") from error
    names, labels = [], []
    for place, scene in enumerate(listed):
        try:
            names.append(str(scene["image_filename"]))
            labels.append(task([one["pixel_coords"] for one in scene["objects"]]))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{where}: scene {place:,} is none of CLEVR's: {error!r}") from error
    folder = f"images/{FOLDERS[split]}"
    return Named(tree.pictures([f"{folder}/{name}" for name in names], labels, short=True), names)
