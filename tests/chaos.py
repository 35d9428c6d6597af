"""Builds a shard set on a Ray of several nodes while tasks and nodes are killed.

`python -m tests.chaos FOLDER KILLS SEED`: builds go on, one after the other, until so many have been killed, one in
six of them nodes. Last line: JSON with what was killed and the digests of what each build made; the first build is
left in peace.
"""

import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import ray
from ray import cloudpickle

from shards.build import build
from shards.image import encode
from shards.recipe import Recipe
from shards.sources import Picture, listing
from shards.storage import Folder
from tests.family import family, kill
from tests.nodes import Nodes, serving, start_ray

NODES, PICTURES, EACH = 2, 240, 10


@dataclass(frozen=True)
class Slow:
    """Pictures that take a while, so that there is time to kill who packs them."""

    numbers: tuple[int, ...]
    classes = ()

    @property
    def table(self) -> pa.Table:
        count = len(self.numbers)
        keys, labels = [f"p{number:04}" for number in self.numbers], [[number % 3] for number in self.numbers]
        return listing(keys, [0] * count, list(self.numbers), [-1] * count, labels)

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, numbers: np.ndarray) -> "Slow":
        return replace(self, numbers=tuple(self.numbers[int(number)] for number in numbers))

    def __iter__(self) -> Iterator[Picture]:
        for number in self.numbers:
            time.sleep(0.02)
            pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
            yield Picture(f"p{number:04}", encode(pixels), (number % 3,))


def make(target: Path) -> str:
    """A digest over all that a build leaves."""
    recipe = Recipe("chaos", "all", classes=("a", "b", "c"), samples_per_shard=EACH)
    build(recipe, lambda: Slow(tuple(range(PICTURES))), Folder(str(target)))
    found = sha256()
    for path in sorted(target.rglob("*")):
        found.update(f"{path.relative_to(target)} {path.is_file() and sha256(path.read_bytes()).hexdigest()}".encode())
    return found.hexdigest()


def strike(what: str, cluster: Nodes, nodes: list, chance: random.Random) -> bool:
    """Kill a whole node, or a process of Ray that runs a task now; whether there was anything to kill."""
    if what == "node":
        node = nodes.pop(chance.randrange(len(nodes)))
        cluster.remove_node(node, allow_graceful=False)
        nodes.append(cluster.add_node(num_cpus=2))
        return True
    packing = family(name="ray::_guarded")
    return bool(packing and kill([chance.choice(packing)]))


def main() -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with serving():
        besiege(Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3])))


def besiege(folder: Path, kills: int, chance: random.Random) -> None:
    """Build the set until `kills` nodes and tasks have been killed; print which, and a digest of each set."""
    cluster = start_ray()
    nodes = [cluster.add_node(num_cpus=2) for _ in range(NODES)]
    root = str(Path(__file__).resolve().parents[1])
    ray.init(cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    made, killed = [make(folder / "quiet")], []
    wanted = chance.sample(["node"] * (kills // 6) + ["task"] * (kills - kills // 6), kills)
    while wanted:
        builder = Thread(target=lambda: made.append(make(folder / f"build-{len(made)}")))
        builder.start()
        while builder.is_alive():  # nodes can be removed from the main thread only
            time.sleep(chance.uniform(0.05, 0.4))
            if wanted and builder.is_alive() and strike(wanted[-1], cluster, nodes, chance):
                killed.append(wanted.pop())
        builder.join()
    print(json.dumps({"killed": killed, "made": made}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
