"""The order of samples: how well a window shuffles, and what a step of a huge corpus costs.

    python benchmarks/order.py [--quick]

`spread_W`: how far two neighbours of a shard come to lie apart in an epoch, with windows of W pictures, as a share of
what a full permutation of the corpus would give (the mean over all neighbours; 1 is as good as a full permutation).
`same_step_W`: how often both of them are in one step, times as often as in a full permutation.

`step_ms` and `gigabytes`: the pictures of a step of 4,096 in a corpus of 10⁹ pictures in 10⁵ shards, anywhere, and
the most memory that the process has used; `resume_ms` is the first step of a process in the middle of epoch 3 of
14 million pictures. Last line: JSON.
"""

import argparse
import json
import resource
import statistics
import time

import numpy as np
from numpy.typing import NDArray

from pipeline.data.plan import Order, part_of_step

LANES, BATCH = 64, 1024
COUNTS = (5000,) * 200


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="fewer steps")
    quick = arguments.parse_args().quick
    found: dict[str, float] = {}
    began = time.perf_counter()
    part_of_step(Order((10_000,) * 1_400, 256, 16_384, 0), 3 * 3418 + 1709, 4096, 0, 4096)
    found["resume_ms"] = 1000 * (time.perf_counter() - began)
    found["step_ms"] = huge(20 if quick else 200)
    found["gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    for window in (1, 256, 1024, 4096, 16_384):
        spread, together = quality(Order(COUNTS, LANES, window, 0))
        print(f"window {window:>6,}: spread {spread:.3f}, in one step {together:,.2f} times as often", flush=True)
        found |= {f"spread_{window}": spread, f"same_step_{window}": together}
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


def huge(steps: int) -> float:
    """Milliseconds for a step, the median over steps anywhere in ten epochs, in an order that has been used before."""
    order = Order((10_000,) * 100_000, 256, 16_384, 0)
    chance = np.random.default_rng(0)
    times = []
    for step in chance.integers(0, 10 * order.samples // 4096, steps).tolist():
        began = time.perf_counter()
        part_of_step(order, step, 4096, 0, 4096)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def quality(order: Order) -> tuple[float, float]:
    """Spread, and how often neighbours share a step, both against a full permutation."""
    step = steps_of(order)
    apart = np.abs(np.diff(step.astype(np.int64), axis=1))
    count = step.max() + 1
    # Of a permutation cut into `count` equal steps: the mean distance of two draws, and the chance that they are one.
    return float(apart.mean() / ((count * count - 1) / (3 * count))), float((apart == 0).mean() * count)


def steps_of(order: Order) -> NDArray[np.int32]:
    """(shards, pictures of a shard): the step of the first epoch in which each picture is."""
    found = np.zeros((len(order.counts), order.counts[0]), np.int32)
    for step in range(-(-order.samples // BATCH)):
        picks = part_of_step(order, step, BATCH, 0, BATCH)
        here = picks.epoch == 0
        found[picks.shard[here], picks.place[here]] = step
    return found


if __name__ == "__main__":
    main()
