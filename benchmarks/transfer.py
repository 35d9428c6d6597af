"""What a sweep costs: beside a plain script, for each trial, and for each learning rate on frozen features.

    python benchmarks/transfer.py [--rounds 3] [--quick]

The demo's model (28 pixels) on 19 tasks with the names of VTAB's, 1,000 pictures to learn from and 200 to test on, one
trial each by the demo's protocol. Beside it `peers/sequential.py`, which does the same steps task after task, loads
model and pictures afresh for each and computes with all cores; the sweep has an actor for each core, on a Ray that is
there, and its actors start within the measured time. Rounds alternate; figures are medians of ratios within a round.
--quick takes fewer tasks, with as many steps each; the start of the actors weighs more beside them.

`sweep_over_sequential`: times as fast. `reconciler_ms_per_trial`: 1,000 trials of no work, from the first result to the
last; `again_ms_per_trial`: the same sweep started again, when all results are there. `eight_rates_over_one`: eight
learning rates of a linear head beside one, on a ViT-Ti (patches of 7 pixels), with the pictures in memory and no
features known; CPU seconds of one thread. Last line: all as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers.contest import report  # noqa: E402

from pipeline.architectures.vit import vit_ti16  # noqa: E402
from pipeline.experiments import load  # noqa: E402
from pipeline.models.build import build, initialise  # noqa: E402
from pipeline.models.weights.exported import Exported, find, put  # noqa: E402
from pipeline.transfer import finetune, pictures, protocols, sweep, tasks  # noqa: E402
from pipeline.transfer.features import Shelf  # noqa: E402
from pipeline.transfer.wanted import Wanted, wanted_of  # noqa: E402
from pipeline.transfer.workers import Resources  # noqa: E402
from shards.cluster import connect  # noqa: E402
from shards.storage import Folder  # noqa: E402
from tests import tiny  # noqa: E402

CORES = len(os.sched_getaffinity(0))
SPLITS = {"train800": (400, 400), "val200": (200,), "test": (200,)}
CLASSES = 10
RATES = (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)


def prepared(place: Path, chosen: Sequence[tasks.Task]) -> Exported:
    """The model, and the tasks' shard sets under `sets`."""
    for task in chosen:
        for number, (split, sizes) in enumerate(SPLITS.items()):
            tiny.shard_set(place / "sets" / task.dataset / split, sizes=sizes, side=28 + number, classes=CLASSES)
    tiny_vit = replace(vit_ti16, patch=7, image_size=28)
    for name, config in (("ti", tiny_vit), ("model", load("demo").model)):
        model, half = build(config, CLASSES), [0.5] * 3
        initialise(model, torch.Generator().manual_seed(0))
        put(Folder(str(place / name)), dict(model.state_dict()), config, CLASSES, mean=half, std=half)
    return find(str(place / "model"))


def wanted(place: Path, chosen: Sequence[tasks.Task], source: Exported, steps: int) -> Wanted:
    """One trial a task."""
    sets = {task: tasks.find(str(place / "sets"), task) for task in chosen}
    made = wanted_of(protocols.named("demo"), sets, source, rates=(0.03,), seeds=1)
    return replace(made, recipes={name: replace(recipe, steps=steps) for name, recipe in made.recipes.items()})


def swept(asked: Wanted, place: Path, to: Path, **how: Any) -> list[float]:
    """Seconds, by a clock, at which each result was there; a sweep into an empty folder."""
    ends: list[float] = []
    told = sweep.Told(finished=lambda name, result: ends.append(time.perf_counter()))
    errors = sweep.sweep(
        asked,
        str(place / "model"),
        str(place / "sets"),
        sweep.Results(Folder(str(to))),
        resources=Resources(),
        retries=0,
        most=CORES,
        told=told,
        **how,
    )
    if errors:
        raise RuntimeError("; ".join(errors.values()))
    return ends


def sequential(asked: Wanted, place: Path) -> float:
    """Seconds of the plain script, its imports among them."""
    trials = asked.trials({}).values()
    told = {
        "model": str(place / "model"),
        "sets": [str(place / "sets" / trial.task.dataset) for trial in trials],
        "trials": [{"rate": trial.rate, "seed": trial.seed, **_settings(trial)} for trial in trials],
    }
    began = time.perf_counter()
    script = Path(__file__).parent / "peers" / "sequential.py"
    environment = {**os.environ, "OMP_NUM_THREADS": str(CORES), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(script)], input=json.dumps(told), text=True, check=True, env=environment)
    return time.perf_counter() - began


def _settings(trial: finetune.Trial) -> dict[str, Any]:
    recipe = trial.recipe
    names = ("steps", "batch", "warmup", "share", "crop", "flip", "clip", "momentum")
    return {name: getattr(recipe, name) for name in names}


def no_work(
    trials: Sequence[finetune.Trial], source: str, data: str, *, threads: int
) -> Iterator[tuple[finetune.Trial, dict[str, Any]]]:
    """What costs nothing."""
    for trial in trials:
        result = {
            "trial": asdict(trial),
            "accuracy": trial.rate,
            "correct": 0,
            "count": 1,
            "classes": 2,
            "seconds": 0.0,
        }
        yield trial, json.loads(json.dumps(result))


def reconciled(asked: Wanted, place: Path, to: Path, count: int) -> dict[str, float]:
    """Milliseconds a trial of no work."""
    rates, seeds = tuple(0.001 * number for number in range(1, 9)), count // len(asked.tasks) - 8
    many = replace(asked, rates={task.name: rates for task in asked.tasks}, seeds=tuple(range(seeds)))
    ends = swept(many, place, to, work=no_work)
    began = time.perf_counter()
    again = swept(many, place, to, work=no_work)
    each = 1000 / len(ends)
    return {
        "reconciler_ms_per_trial": (ends[-1] - ends[0]) * each,
        "again_ms_per_trial": (again[-1] - began) * each,
    }


def of_rates(place: Path, task: tasks.Task, rates: tuple[float, ...]) -> float:
    """CPU seconds of linear heads with these rates, on pictures in memory."""
    source = find(str(place / "ti"))
    sets = {task: tasks.find(str(place / "sets"), task)}
    asked = wanted_of(protocols.named("linear"), sets, source, rates=(*rates, 2.0), seeds=1)
    trials = [trial for trial in asked.choosing[task.name, "pretrained"].values() if trial.rate in rates]
    finetune._shelf = Shelf()
    began = time.process_time()
    done = finetune.perform(trials, source.folder.absolute, str(place / "sets"), threads=1)
    assert len(list(done)) == len(rates)
    return time.process_time() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tasks and trials, two rounds")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    chosen = tasks.named("vtab")[: 4 if given.quick else 19]
    steps, rounds, count = 300, *((2, 200) if given.quick else (given.rounds, 1007))
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)
        print(f"{name}: {value:.2f}", flush=True)

    with tempfile.TemporaryDirectory(prefix="vitscale-", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        source = prepared(place, chosen)
        asked = wanted(place, chosen, source, steps)
        connect()
        for number in range(rounds):
            _round(place, asked, number, count, add)
    ratios = {name: found.pop(name) for name in ("sweep_over_sequential", "eight_rates_over_one")}
    told = {name: round(median(values), 2) for name, values in found.items()}
    report(ratios, {"benchmark": "transfer", "rounds": rounds, "tasks": len(chosen), "steps": steps, **told})


def _round(place: Path, asked: Wanted, number: int, count: int, add: Callable[[str, float], None]) -> None:
    began = time.perf_counter()
    ours = swept(asked, place, place / f"swept {number}")[-1] - began
    plain = sequential(asked, place)
    add("sweep_seconds", ours)
    add("sequential_seconds", plain)
    add("sweep_over_sequential", plain / ours)
    for name, value in reconciled(asked, place, place / f"many {number}", count).items():
        add(name, value)
    pictures._shelf = pictures._Shelf()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    of_rates(place, asked.tasks[0], RATES[:1])  # the pictures are in memory from here on
    one = median(of_rates(place, asked.tasks[0], RATES[3:4]) for _ in range(3))
    eight = median(of_rates(place, asked.tasks[0], RATES) for _ in range(3))
    torch.set_num_threads(threads)
    add("eight_rates_over_one", eight / one)


if __name__ == "__main__":
    main()
