"""The decoding kernel alone: crops of photographs a CPU-second, beside what else cuts the same crops.

    python benchmarks/kernel.py [--quick]

The pictures are pieces and variations of the two photographs that scikit-learn brings, about 500 x 375, quality 90, two
thirds of them with halved colour; the crops are a training run's (5 % of the area and more, 224 x 224 in the end), the
same for all. One core; the methods take turns, and each figure is a median over the rounds, of which --quick has fewer.

`kernel_over_pillow`: Pillow decodes, crops and scales (BILINEAR). `kernel_over_simplejpeg_area`: simplejpeg decodes,
and OpenCV scales (INTER_AREA). `kernel_over_ceiling`: the kernel asked for the box in its own size, that is the partial
decode and a copy of the rows. Beside them how near the results are to Pillow's. Last line: the figures as JSON.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from statistics import median
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from peers.contest import divide_rounds, report, take_turns
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.data import decode
from pipeline.data.image import random_crops

Pixels = NDArray[np.uint8]
SIDE = 224


class Work(NamedTuple):
    """A picture and its crop."""

    data: bytes
    left: int
    top: int
    width: int
    height: int
    mirrored: bool


def photograph(source: Pixels, random: np.random.Generator) -> bytes:
    """A piece of a photograph, about 500 x 375, perhaps mirrored, turned, lighter or darker, as a JPEG."""
    share = random.uniform(0.8, 1)
    height, width = (round(length * share) for length in source.shape[:2])
    top, left = (
        random.integers(0, whole - part + 1) for whole, part in zip(source.shape, (height, width), strict=False)
    )
    piece = source[top : top + height, left : left + width][:: random.choice([1, -1]), :: random.choice([1, -1])]
    size = (round(500 * random.uniform(0.95, 1.05)), round(375 * random.uniform(0.95, 1.05)))
    lit = (255 * (piece / 255) ** random.uniform(0.8, 1.25)).astype(np.uint8)
    file = BytesIO()
    scaled = Image.fromarray(lit).resize(size, Image.Resampling.LANCZOS)
    scaled.save(file, "JPEG", quality=90, subsampling=random.choice([2, 2, 0]))
    return file.getvalue()


def works(count: int) -> list[Work]:
    random = np.random.default_rng(0)
    sources = load_sample_images().images
    files = [photograph(sources[i % len(sources)], random) for i in range(count)]
    sizes = np.array([Image.open(BytesIO(data)).size for data in files])
    numbers = np.arange(count)
    crops = random_crops(sizes[:, 0], sizes[:, 1], numbers, 0 * numbers, seed=0, area=0.05, flip=True)
    return [Work(data, *(column.item(i) for column in crops)) for i, data in enumerate(files)]


def kernel(work: Work, out: Pixels) -> Pixels:
    decode.crop_picture(*work[:5], out, mirrored=work.mirrored)
    return out


def partial_decode(work: Work, out: Pixels) -> Pixels:
    box = out.reshape(-1)[: work.height * work.width * 3].reshape(work.height, work.width, 3)
    decode.crop_picture(*work[:5], box)
    return box


def pillow(work: Work, out: Pixels) -> Pixels:
    box = work.left, work.top, work.left + work.width, work.top + work.height
    picture = Image.open(BytesIO(work.data)).convert("RGB").crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    out[:] = np.asarray(picture)[:, ::-1] if work.mirrored else np.asarray(picture)
    return out


def simplejpeg_area(work: Work, out: Pixels) -> Pixels:
    whole = simplejpeg.decode_jpeg(work.data)
    box = whole[work.top : work.top + work.height, work.left : work.left + work.width]
    scaled = cv2.resize(box, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    out[:] = scaled[:, ::-1] if work.mirrored else scaled
    return out


def seconds(method: Callable[[Work, Pixels], Pixels], todo: list[Work], out: Pixels) -> float:
    """CPU time for all of them."""
    began = time.process_time()
    for work in todo:
        method(work, out)
    return time.process_time() - began


def rounds(todo: list[Work], count: int) -> dict[str, list[float]]:
    """The CPU time of every method in every round."""
    out, large = np.empty((SIDE, SIDE, 3), np.uint8), np.empty((1000, 1000, 3), np.uint8)
    methods = {method.__name__: partial(seconds, method, todo, out) for method in (kernel, pillow, simplejpeg_area)}
    methods["partial_decode"] = partial(seconds, partial_decode, todo, large)
    return take_turns({name: lambda number, method=method: method() for name, method in methods.items()}, count)


def decibels(ours: Pixels, theirs: Pixels) -> float:
    """The peak signal-to-noise ratio."""
    error = np.mean((ours.astype(float) - theirs) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def fidelity(todo: list[Work]) -> list[float]:
    """How near the kernel's crops are to Pillow's."""
    ours, theirs = np.empty((2, SIDE, SIDE, 3), np.uint8)
    return [decibels(kernel(work, ours), pillow(work, theirs)) for work in todo]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five rounds")
    quick = parser.parse_args().quick
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    todo = works(300)
    times = rounds(todo, 5 if quick else 11)
    rates = {name: len(todo) / median(some) for name, some in times.items()}
    for name, rate in rates.items():
        print(f"{name:>16}: {rate:7.0f} pictures a CPU-second")
    peers = {"pillow": "pillow", "simplejpeg_area": "simplejpeg_area", "ceiling": "partial_decode"}
    near = fidelity(todo[:100])
    figures = {
        "compiled": decode.vitscale_crop is not None,
        "kernel_per_second": rates["kernel"],
        "decibels_to_pillow_least": min(near),
        "decibels_to_pillow_median": median(near),
    }
    ratios = {f"kernel_over_{peer}": divide_rounds(times[name], times["kernel"]) for peer, name in peers.items()}
    report(ratios, figures)


if __name__ == "__main__":
    main()
