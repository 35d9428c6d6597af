"""What planning a large corpus takes: seconds and memory, and how they grow.

    python benchmarks/plan.py [--quick]

Simulates the listing of ImageNet-21k's size (14 million pictures in 21,841 class tars, sorted by class), checks and
plans it as a build does, and writes the plan. Each size runs in a process of its own. Last line: JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 21_841


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="a tenth of the pictures")
    arguments.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.count:
        print(json.dumps(plan(given.count)))
        return
    counts = [350_000, 700_000, 1_400_000] if given.quick else [3_500_000, 7_000_000, 14_000_000]
    found = {count: measured(count) for count in counts}
    for count, (seconds, gigabytes) in found.items():
        print(f"{count:>12,} pictures{seconds:>8.1f} s{gigabytes:>8.2f} GB", flush=True)
    (least, (few, small)), (most, (many, large)) = min(found.items()), max(found.items())
    slopes = {
        "us_a_picture": 1e6 * (many - few) / (most - least),
        "bytes_a_picture": 1e9 * (large - small) / (most - least),
    }
    said = {"pictures": most, "seconds": many, "gigabytes": large, **slopes}
    print(json.dumps({name: round(value, 2) for name, value in said.items()}))


def measured(count: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--count", str(count)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    seconds, gigabytes = json.loads(done.stdout)
    return seconds, gigabytes


def plan(count: int) -> tuple[float, float]:
    """Seconds from the listing to the plan on disk, and the most memory that was used, the listing included."""
    import numpy as np
    import pyarrow as pa

    from shards import planned
    from shards.recipe import Recipe
    from shards.sources import LISTING, Ranges

    file = (np.arange(count) * CLASSES // count).astype(np.int32)
    step = 1 << 20
    keys = [
        pa.array([f"n{one:08}_{number}" for number, one in enumerate(file[start : start + step].tolist(), start)])
        for start in range(0, count, step)
    ]
    labels = pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32), pa.array(file))
    columns = [pa.concat_arrays(keys), file, np.arange(count) * 90_000, np.full(count, 88_888), labels]
    table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=LISTING)
    del keys, labels, columns, file
    files = pa.array([f"n{number:08}.tar" for number in range(CLASSES)])
    source, recipe = Ranges("/pictures", files, table), Recipe("simulated", "train")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:
        facts = planned.checked(source, tuple(map(str, range(CLASSES))), recipe.name)
        planned.write(source, facts, recipe.plan(count), Path(folder) / "plan.parquet")
        planned.Planned(Path(folder) / "plan.parquet").shard(0, None)
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
