"""How fast shards are made: ratios over named peers, each on one core, on the same pictures, in turns.

    python benchmarks/prepare.py [--quick] [--peers PYTHON]

Repacking (bytes kept, headers looked at, sha256 taken):
- `repack_over_shardwriter`: a stock loop with `webdataset.ShardWriter`, which takes no digest;
- `repack_over_shardwriter_and_digest`: the same, and a sha256 of its shard;
- `repack_over_mdswriter`: MosaicML's `MDSWriter`, without digests too;
- `repack_over_tar`: `tar`, followed by a sha256 of the result by openssl, or by sha256sum where that is not there;
- `repack_over_floor`: reading, hashing and writing the same bytes and nothing else, which bounds all the others.

Re-encoding to a short side of 256: `reencode_over_pillow` against a loop with Pillow, `reencode_over_bare` against the
sum of the bare calls of simplejpeg and OpenCV, `reencode_over_img2dataset` against img2dataset's resizer.

`two_over_one`: a whole build with Ray, by two workers and by one.

PYTHON is an interpreter that has mosaicml-streaming and img2dataset, whose dependencies do not go together with ours;
`benchmarks/peers/install.sh PEERS` makes PEERS/bin/python. Without it these two ratios are left out. The pictures are
drawn here (1/f noise, 500 x 375, about 80 kB as JPEG) and lie in memory (/dev/shm) where there is such a place, so that
no disk is measured. --quick takes fewer rounds of fewer pictures, as many for each worker. Last line: the medians as
JSON.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from statistics import median

from peers.contest import divide_rounds, report, take_turns

ROOT = Path(__file__).resolve().parents[1]
SHORT_SIDE, QUALITY = 256, 95


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="fewer pictures and rounds")
    arguments.add_argument("--peers", default="", help="an interpreter with mosaicml-streaming and img2dataset")
    arguments.add_argument("--contestant", default="", help=argparse.SUPPRESS)
    arguments.add_argument("--folder", default="", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.contestant:
        print(json.dumps(CONTESTANTS[given.contestant](Path(given.folder))))
        return
    rounds, count = (3, 1600) if given.quick else (7, 4000)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vitscale-", dir=memory) as folder:
        draw(Path(folder) / "pictures", count)
        race(Path(folder), rounds, given.peers, count)


def race(folder: Path, rounds: int, peers: str, count: int) -> None:
    """Let all run in turns and say how they did."""
    names = [name for name in CONTESTANTS if peers or name not in FOREIGN]
    turns = {
        name: lambda number, name=name: seconds(name, folder, peers if name in FOREIGN else sys.executable)
        for name in names
    }
    times = take_turns(turns, rounds, warm=0)  # each contestant warms up in its own process
    for name in names:
        shown = ", ".join(f"{count / one:,.0f}" for one in times[name])
        print(f"{name:<22}{count / median(times[name]):>9,.0f} pictures/s   [{shown}]", flush=True)
    pairs = {ratio: pair for ratio, pair in RATIOS.items() if pair[1] in times}
    report({ratio: divide_rounds(times[theirs], times[ours]) for ratio, (ours, theirs) in pairs.items()})


def seconds(name: str, folder: Path, python: str) -> float:
    """What a contestant says it took, in a process of its own."""
    command = [python, __file__, "--contestant", name, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    environment.pop("RAY_ADDRESS")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def draw(folder: Path, count: int) -> None:
    """Different pictures, in four class folders; 40 scenes, cut at `count` places."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(768)[:, None], np.fft.fftfreq(1024)[None]) + 1e-3
    scenes = []
    for _ in range(40):
        waves = chance.normal(size=(3, 768, 1024)) + 1j * chance.normal(size=(3, 768, 1024))
        noise = np.fft.ifft2(waves / frequency**1.3).real
        noise = (noise - noise.mean((1, 2), keepdims=True)) / noise.std((1, 2), keepdims=True)
        scenes.append(np.clip(128 + 48 * noise, 0, 255).astype(np.uint8).transpose(1, 2, 0))
    for number in range(count):
        left, top = chance.integers(0, 1024 - 500), chance.integers(0, 768 - 375)
        target = folder / f"n{number % 4:08}" / f"n{number % 4:08}_{number}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes[number % 40][top : top + 375, left : left + 500]).save(target, quality=92)


# Each takes a folder with `pictures/`, does its work on one core and returns its seconds.


def alone() -> None:
    """On one core: the last, since interrupts mostly go to the first."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def files(folder: Path) -> list[tuple[Path, int]]:
    """Every picture and its class, classes mixed."""
    every = sorted((folder / "pictures").glob("*/*"), key=lambda path: int(path.stem.rpartition("_")[2]))
    return [(path, int(path.parent.name[1:])) for path in every]


def repack(folder: Path) -> float:
    import numpy as np

    from shards.image import Processing
    from shards.pack import pack
    from shards.sources import Origin, folders

    alone()
    source = folders.read(Origin(str(folder / "pictures"), say=str))
    pack(0, source.take(np.arange(10)), folder / "warm.tar")
    began = time.perf_counter()
    pack(0, folders.read(Origin(str(folder / "pictures"), say=str)), folder / "ours.tar", Processing(check="header"))
    return took(began, folder / "ours.tar")


def shardwriter(folder: Path, digest: bool = False) -> float:
    from webdataset import ShardWriter

    def write(every: list[tuple[Path, int]]) -> None:
        (folder / "wds").mkdir(exist_ok=True)
        with ShardWriter(str(folder / "wds" / "%06d.tar"), maxcount=10**6, maxsize=1e12, verbose=0) as writer:
            for path, label in every:
                writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": label})
        if digest:
            with (folder / "wds" / "000000.tar").open("rb") as made:
                hashlib.file_digest(made, "sha256")

    alone()
    every = files(folder)
    write(every[:10])
    began = time.perf_counter()
    write(every)
    return took(began, folder / "wds")


def mdswriter(folder: Path) -> float:
    import types

    # Its pictures' classes need torchvision, which nothing here uses.
    sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
    from streaming import MDSWriter

    def write(name: str, every: list[tuple[Path, int]]) -> None:
        columns = {"key": "str", "jpg": "bytes", "cls": "int"}
        with MDSWriter(out=str(folder / name), columns=columns) as writer:
            for path, label in every:
                writer.write({"key": path.stem, "jpg": path.read_bytes(), "cls": label})

    alone()
    every = files(folder)
    write("warm", every[:10])
    shutil.rmtree(folder / "warm")
    began = time.perf_counter()
    write("mds", every)
    return took(began, folder / "mds")


def tar(folder: Path) -> float:
    alone()
    digest = ["openssl", "dgst", "-sha256"] if shutil.which("openssl") else ["sha256sum"]
    began = time.perf_counter()
    subprocess.run(["tar", "-C", str(folder), "-cf", str(folder / "plain.tar"), "pictures"], check=True)
    subprocess.run([*digest, str(folder / "plain.tar")], check=True, stdout=subprocess.DEVNULL)
    return took(began, folder / "plain.tar")


def floor(folder: Path) -> float:
    """What no writer of shards with digests goes below: read each file, take its sha256, write it."""
    alone()
    every = [(str(path), path.stat().st_size) for path, _ in files(folder)]
    digest = hashlib.sha256()
    began = time.perf_counter()
    target = os.open(folder / "floor", os.O_CREAT | os.O_WRONLY)
    for path, size in every:
        source = os.open(path, os.O_RDONLY)
        data = os.read(source, size)
        os.close(source)
        digest.update(data)
        os.write(target, data)
    os.close(target)
    return took(began, folder / "floor")


def took(began: float, made: Path) -> float:
    """Seconds until now; what was made goes."""
    spent = time.perf_counter() - began
    shutil.rmtree(made) if made.is_dir() else made.unlink()
    return spent


def encoded(folder: Path) -> list[bytes]:
    """As many pictures as decoding needs to be measured; the rates count all."""
    return [path.read_bytes() for path, _ in files(folder)[:REENCODED]]


REENCODED = 600


def each(folder: Path, work: Callable[[bytes], object]) -> float:
    """Seconds for all pictures, from a part of them."""
    alone()
    data = encoded(folder)
    work(data[0])
    began = time.perf_counter()
    for one in data:
        work(one)
    return (time.perf_counter() - began) * len(files(folder)) / len(data)


def reencode(folder: Path) -> float:
    from shards.image import Processing, process

    processing = Processing(SHORT_SIDE, "jpeg", QUALITY)
    return each(folder, lambda data: process(data, processing))


def pillow(folder: Path) -> float:
    from PIL import Image

    def work(data: bytes) -> bytes:
        picture = Image.open(BytesIO(data)).convert("RGB")
        scale, out = SHORT_SIDE / min(picture.size), BytesIO()
        size = round(picture.width * scale), round(picture.height * scale)
        picture.resize(size, Image.Resampling.BOX).save(out, "JPEG", quality=QUALITY)
        return out.getvalue()

    return each(folder, work)


def bare(folder: Path) -> float:
    import cv2
    import simplejpeg

    def work(data: bytes) -> bytes:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
        scaled = cv2.resize(pixels, (341, 256), interpolation=cv2.INTER_AREA)
        return simplejpeg.encode_jpeg(scaled, QUALITY, "RGB", "420")

    return each(folder, work)


def img2dataset(folder: Path) -> float:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # which it would look for in the network
    import cv2
    from img2dataset.resizer import Resizer

    cv2.setNumThreads(1)
    resizer = Resizer(SHORT_SIDE, "keep_ratio", True, encode_quality=QUALITY)
    return each(folder, lambda data: resizer(BytesIO(data)))


def build(folder: Path, workers: int) -> float:
    import ray

    from shards import build, datasets
    from shards.image import Processing
    from shards.recipe import Recipe
    from shards.sources import Origin
    from shards.storage import Folder

    settings = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False, runtime_env=settings)
    source = datasets.find("folder")

    def make(name: str, pictures: Path, short_side: int) -> float:
        recipe = Recipe(name, "all", samples_per_shard=100, processing=Processing(short_side))
        began = time.perf_counter()
        build.build(recipe, lambda: source.pictures("all", Origin(str(pictures))), Folder(str(folder / name)))
        return took(began, folder / name)

    make("warm", folder / "pictures", SHORT_SIDE)  # workers start, import and fill their caches
    return make("built", folder / "pictures", SHORT_SIDE)


CONTESTANTS: dict[str, Callable[[Path], float]] = {
    "repack": repack,
    "shardwriter": shardwriter,
    "shardwriter, digest": lambda folder: shardwriter(folder, digest=True),
    "mdswriter": mdswriter,
    "tar": tar,
    "floor": floor,
    "reencode": reencode,
    "pillow": pillow,
    "bare": bare,
    "img2dataset": img2dataset,
    "one worker": lambda folder: build(folder, 1),
    "two workers": lambda folder: build(folder, 2),
}
FOREIGN = {"mdswriter", "img2dataset"}
RATIOS = {
    "repack_over_shardwriter": ("repack", "shardwriter"),
    "repack_over_shardwriter_and_digest": ("repack", "shardwriter, digest"),
    "repack_over_mdswriter": ("repack", "mdswriter"),
    "repack_over_tar": ("repack", "tar"),
    "repack_over_floor": ("repack", "floor"),
    "reencode_over_pillow": ("reencode", "pillow"),
    "reencode_over_bare": ("reencode", "bare"),
    "reencode_over_img2dataset": ("reencode", "img2dataset"),
    "two_over_one": ("two workers", "one worker"),
}

if __name__ == "__main__":
    main()
