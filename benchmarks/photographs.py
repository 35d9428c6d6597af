"""Photographs to measure with, made of the freely licensed ones that installed packages bring.

    python benchmarks/photographs.py [FOLDER] [--count 2000] [--seed 0] [--quick]

Writes FOLDER/full/000000.jpg and so on, about 500 x 375 (one in four upright), and FOLDER/small with the same pictures
at a short side of 256; quality 90, seven of ten with halved colour (4:2:0), the others without (4:4:4). Each is a piece
of a source, scaled, perhaps mirrored, lighter or darker, its white balance shifted, with a camera's noise; no two are
the same. What a picture is depends on the sources, the seed and its number alone.

Sources: of scikit-image what its documentation calls CC0, public domain or free of known restrictions; of matplotlib
the portrait of Grace Hopper by the US Navy, public domain; of scikit-learn its two photographs, CC BY 2.0, by
danielbuechele and vultilion. Packages that are not installed are left out.

Without a folder the pictures are made and thrown away. Last line: as JSON how many there are, of how many photographs,
and the mean size of the full and of the small ones.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from io import BytesIO
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.seed import number, uniform

SOURCES = {
    "skimage": (
        *("data/astronaut.png", "data/brick.png", "data/camera.png", "data/chelsea.png", "data/coffee.png"),
        *("data/grass.png", "data/gravel.png", "data/hubble_deep_field.jpg", "data/ihc.png", "data/retina.jpg"),
        "data/rocket.jpg",
    ),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
QUALITY, SHORT_SIDE = 90, 256
FULL, SMALL = "full", "small"


def sources() -> list[Path]:
    """The photographs at hand, always in the same order; FileNotFoundError where no package brings any."""
    found = [folder / name for package, names in SOURCES.items() for folder in _homes(package) for name in names]
    there = [path for path in found if path.is_file()]
    if not there:
        raise FileNotFoundError(f"no photographs: install one of {', '.join(SOURCES)}")
    return there


def _homes(package: str) -> list[Path]:
    found = find_spec(package)
    return [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []


@cache
def _opened(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def picture(path: Path, number_of_it: int, seed: int) -> Image.Image:
    """Picture `number_of_it`, made of the photograph at `path`."""
    key = number("photograph", seed, number_of_it)
    draws = iter(uniform(key, np.arange(16)).tolist())
    cut = _piece(_opened(path), draws)
    pixels = np.asarray(cut)[:, :: -1 if next(draws) < 0.5 else 1] / 255
    brightness = 0.75 + 0.6 * next(draws)
    pixels = pixels ** (brightness * np.array([0.9 + 0.2 * next(draws) for _ in range(3)]))
    noise = (2 + 10 * next(draws)) / 255 * 12**0.5  # a standard deviation of 2 to 12 of 255
    pixels = pixels + noise * (uniform(number("noise", key), np.arange(pixels.size)).reshape(pixels.shape) - 0.5)
    return Image.fromarray(np.rint(255 * pixels.clip(0, 1)).astype(np.uint8))


def _piece(source: Image.Image, draws: Iterator[float]) -> Image.Image:
    """Some 0.6 to 1 of the largest box that has the wanted shape, in the wanted size."""
    width, height = (round(side * (0.93 + 0.14 * next(draws))) for side in (500, 375))
    if next(draws) < 0.25:
        width, height = height, width
    scale = min(source.width / width, source.height / height) * (0.6 + 0.4 * next(draws))
    left, top = (source.width - width * scale) * next(draws), (source.height - height * scale) * next(draws)
    box = (left, top, left + width * scale, top + height * scale)
    return source.resize((width, height), Image.Resampling.LANCZOS, box)


def shrunk(whole: Image.Image) -> Image.Image:
    """The same with a short side of 256."""
    scale = SHORT_SIDE / min(whole.size)
    return whole.resize((round(whole.width * scale), round(whole.height * scale)), Image.Resampling.LANCZOS)


def encoded(whole: Image.Image, *, halved: bool) -> bytes:
    """As a JPEG, its colour halved along both axes or not."""
    file = BytesIO()
    whole.save(file, "JPEG", quality=QUALITY, subsampling="4:2:0" if halved else "4:4:4")
    return file.getvalue()


def _made(task: tuple[Path, int, int, Path]) -> tuple[int, int, bytes]:
    """Bytes of the full and of the small picture, and the digest of the full one."""
    path, number_of_it, seed, folder = task
    whole = picture(path, number_of_it, seed)
    halved = bool(uniform(number("colour", seed, number_of_it), [0])[0] < 0.7)
    full, small = (encoded(one, halved=halved) for one in (whole, shrunk(whole)))
    name = f"{number_of_it:06}.jpg"
    (folder / FULL / name).write_bytes(full)
    (folder / SMALL / name).write_bytes(small)
    return len(full), len(small), sha256(full).digest()


class Made(NamedTuple):
    """What was made: pictures, of how many photographs; mean kB of a full and of a small one."""

    pictures: int
    photographs: int
    full_kilobytes: float
    small_kilobytes: float


def make(folder: Path, count: int = 2000, seed: int = 0) -> Made:
    """Write `count` pictures, full and small, below `folder`; FileExistsError where there are some."""
    for name in (FULL, SMALL):
        (folder / name).mkdir(parents=True)
    paths = sources()
    tasks = [(paths[i % len(paths)], i, seed, folder) for i in range(count)]
    with Pool() as pool:
        made = pool.map(_made, tasks, chunksize=8)
    full, small, digests = zip(*made, strict=True)
    assert len(set(digests)) == count, "no two pictures are the same"
    return Made(count, len(paths), round(sum(full) / count / 1e3, 1), round(sum(small) / count / 1e3, 1))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, nargs="?", help="without full/ and small/ in it")
    arguments.add_argument("--count", type=int, default=2000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--quick", action="store_true", help="no more than 100 pictures")
    given = arguments.parse_args()
    if given.count < 1:
        arguments.error(f"--count is {given.count}; at least 1 is needed")
    count = min(given.count, 100) if given.quick else given.count
    try:
        with tempfile.TemporaryDirectory() as aside:
            made = make(given.folder or Path(aside), count, given.seed)
    except OSError as error:
        arguments.error(str(error))
    print(json.dumps(made._asdict()))


if __name__ == "__main__":
    main()
