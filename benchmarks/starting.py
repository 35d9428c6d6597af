"""How long a run takes to its first step, and after SIGKILL of one of its processes to the next, with where it goes.

    python benchmarks/starting.py [--quick]

`python jobs/pretrain.py` on a Ray of its own on this machine, two processes, a tiny model, a checkpoint at each step.
Everything is seen from outside: the processes that come and go, and the checkpoints. Seconds, medians over the rounds:

    to the first step   ours (checks, MLflow) · Ray (until its node is up) · Train (until the processes of the run are
                        there) · work (their imports, the engine, the first step and its checkpoint)
    after SIGKILL       noticed (until the processes of the old start are gone) · Train (until those of the new one
                        are there) · work

`bare` is what of it no launcher can spare: the imports of a process of the run, alone. `cpu_first` and `cpu_next` are
the seconds that processors worked for all of its processes together, which say more where the machine has other work.
--quick takes fewer rounds. Last line: all as JSON.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from peers.contest import report

from pipeline.train.checkpoint import complete
from shards.storage import Folder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LIMIT = 300.0
TINY = {
    "classes": 3, "model.width": 16, "model.depth": 2, "model.heads": 2, "model.hidden": 32, "model.patch": 4,
    "model.image-size": 12, "data.lanes": 8, "batch": 16, "duration": 10**6, "save-every": 1, "processes": 2,
}  # fmt: skip
IMPORTS = "import pipeline.launch, pipeline.train.run; from pipeline.train.engine import library; import torch; "
IMPORTS += "library(torch.device('cpu'))"


class Clock:
    """Seconds from one thing that is waited for to the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def until(self, there: Callable[[], bool]) -> float:
        """Wait until it is so; how long that was."""
        limit = time.monotonic() + LIMIT
        while not there():
            if time.monotonic() > limit:
                raise TimeoutError(f"not there after {LIMIT:g} s")
            time.sleep(0.01)
        before, self._last = self._last, time.perf_counter()
        return self._last - before


def named(driver: psutil.Process, name: str) -> set[psutil.Process]:
    """Descendants of the driver whose command line has the name."""
    found = set()
    for process in driver.children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.add(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def worked(driver: psutil.Process) -> dict[psutil.Process, float]:
    """Seconds that processors have worked for the driver and for each of its descendants that live."""
    found = {}
    for process in [driver, *driver.children(recursive=True)]:
        try:
            found[process] = sum(process.cpu_times()[:2])
        except psutil.Error:  # it has just ended
            continue
    return found


def round_of(folder: Path) -> dict[str, float]:
    """One run, from its start to the step after one of its processes was killed."""
    words = {**TINY, "data.shards": folder / "set", "to": folder / "runs", "run": "run"}
    command = [sys.executable, str(ROOT / "jobs/pretrain.py"), "demo", *(f"--{k}={v}" for k, v in words.items())]
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    run, clock, found = Folder(str(folder / "runs/run")), Clock(), dict[str, float]()
    with open(os.devnull, "w") as nowhere:
        driver = psutil.Popen(command, env={**kept, "HOME": str(folder)}, stdout=nowhere, stderr=nowhere)

    def newest() -> int:
        return [0, *complete(run)][-1]

    try:
        found["first_ours"] = clock.until(lambda: bool(named(driver, "raylet/raylet")))
        found["first_ray"] = clock.until(lambda: bool(named(driver, "TrainController")))
        found["first_train"] = clock.until(lambda: len(named(driver, "RayTrainWorker")) == 2)
        found["first_work"] = clock.until(lambda: newest() > 0)
        found["cpu_first"] = sum(worked(driver).values())
        old = named(driver, "RayTrainWorker")
        clock, already = Clock(), worked(driver)
        old.copy().pop().kill()
        found["next_noticed"] = clock.until(lambda: not any(process.is_running() for process in old))
        before = newest()
        found["next_train"] = clock.until(lambda: len(named(driver, "RayTrainWorker") - old) == 2)
        found["next_work"] = clock.until(lambda: newest() > before)
        found["cpu_next"] = sum(seconds - already.get(one, 0.0) for one, seconds in worked(driver).items())
    finally:
        for process in [*driver.children(recursive=True), driver]:
            process.kill()
        driver.wait()
    return found


def bare() -> float:
    """Seconds in which a process imports all that one of a run does."""
    clock = Clock()
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, check=True, capture_output=True)
    return clock.until(lambda: True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    rounds = 2 if parser.parse_args().quick else 5
    from tests import tiny

    measured: list[dict[str, float]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="vitscale-", ignore_cleanup_errors=True) as place:
            tiny.shard_set(Path(place) / "set")
            measured.append({**round_of(Path(place)), "bare": bare()})
    told = {name: round(statistics.median(each[name] for each in measured), 2) for name in measured[0]}
    for kind in ("first", "next"):
        told[kind] = round(sum(value for name, value in told.items() if name.startswith(f"{kind}_")), 2)
        parts = ", ".join(
            f"{name.partition('_')[2]} {v:.1f}" for name, v in told.items() if name.startswith(f"{kind}_")
        )
        name = "to the first step" if kind == "first" else "after SIGKILL"
        print(f"{name}: {told[kind]:.1f} s: {parts}; processors {told[f'cpu_{kind}']:.1f} s")
    over = {name: [one[name] for one in measured] for name in ("cpu_first", "cpu_next", "bare")}
    for kind in ("first", "next"):
        over[kind] = [sum(value for name, value in one.items() if name.startswith(f"{kind}_")) for one in measured]
    report(over, {"benchmark": "starting", "rounds": rounds, **told})


if __name__ == "__main__":
    main()
