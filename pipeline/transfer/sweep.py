"""Many fine-tunings: a reconciler that lists what is wanted, lists what exists, and runs what is missing.

It has no state of its own. A result is created once, exclusively, under its trial's name; so a sweep that was killed
repeats nothing that has a result, two sweeps at once do not disturb each other, and a rate that is added re-uses all
the rest.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from pipeline.models.weights.exported import Exported
from pipeline.transfer.finetune import Trial, perform
from pipeline.transfer.protocols import Protocol
from pipeline.transfer.tasks import CHOOSE, TEST, Task
from shards.storage import Folder

Result = dict[str, Any]
Start = Literal["pretrained", "scratch"]
CRASHES = 3  # of a worker, for which Ray itself starts the trial again


@dataclass(frozen=True)
class Wanted:
    """What a sweep is to find out of one checkpoint."""

    tasks: tuple[Task, ...]
    data: Mapping[str, tuple[tuple[str, str], ...]]
    """By task, the root digests of its shard sets."""
    starts: tuple[Start, ...]
    protocol: Protocol
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    pretrained: str
    architecture: str

    @property
    def count(self) -> int:
        """How many trials that is."""
        return len(self.tasks) * len(self.starts) * (len(self.rates) + len(self.seeds))

    def trials(self, done: Mapping[str, Result]) -> list[Trial]:
        """All trials that can be told so far: to choose a rate, and where it is chosen, to test with it."""
        found: list[Trial] = []
        for task in self.tasks:
            for start in self.starts:
                choosing = [self._trial(task, start, CHOOSE, rate, self.seeds[0]) for rate in self.rates]
                found += choosing
                if all(trial.name in done for trial in choosing):
                    rate = best_rate(choosing, done)
                    found += [self._trial(task, start, TEST, rate, seed) for seed in self.seeds]
        return found

    def _trial(self, task: Task, start: Start, split: Literal["val200", "test"], rate: float, seed: int) -> Trial:
        model = self.pretrained if start == "pretrained" else self.architecture
        return Trial(task, self.data[task.name], split, start, model, self.protocol, rate, seed)


def best_rate(choosing: Sequence[Trial], done: Mapping[str, Result]) -> float:
    """The rate with the best accuracy on the pictures to choose by, the smaller of equals.

    ValueError where a result is of other pictures: nothing is ever chosen by the test.
    """
    if any(trial.split != CHOOSE for trial in choosing):
        raise ValueError(f"a learning rate is chosen on {CHOOSE} alone")
    by_rate: dict[float, list[float]] = {}
    for trial in choosing:
        by_rate.setdefault(trial.rate, []).append(done[trial.name]["accuracy"])
    return min(by_rate, key=lambda rate: (-fmean(by_rate[rate]), rate))


@dataclass
class Results:
    """The results in a folder, one file a trial."""

    folder: Folder
    known: dict[str, Result] = field(default_factory=dict)

    def load(self) -> dict[str, Result]:
        """All there are."""
        results = self.folder / "results"
        for file in results.sizes():
            if file.endswith(".json") and (name := file.removesuffix(".json")) not in self.known:
                self.known[name] = json.loads(results.read(file))
        return self.known

    def store(self, name: str, result: Result) -> Result:
        """Keep a result unless the trial has one; returns the one that counts."""
        data = json.dumps(result, indent=1).encode()
        if self.folder.create(f"results/{name}.json", data):
            return result
        return json.loads(self.folder.read(f"results/{name}.json"))


@dataclass(frozen=True)
class Resources:
    """What one trial takes of the cluster."""

    cpus: float
    gpus: float


def sweep(
    wanted: Wanted,
    source: Exported,
    data: str,
    folder: Folder,
    *,
    resources: Resources,
    retries: int,
    progress: Callable[[int, int, int], None],
    finished: Callable[[str, Result], None],
) -> dict[str, str]:
    """Run what is missing, on Ray; returns trials that failed more than `retries` times, with what went wrong.

    `progress` is told of done, running and failed trials; `finished` of every result, those that were there too.
    """
    results = Results(folder)
    told: set[str] = set()
    running: dict[Any, Trial] = {}
    failures: dict[str, int] = {}
    errors: dict[str, str] = {}
    remote: Any = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=CRASHES)(_perform)
    while True:
        done = results.load()
        trials = wanted.trials(done)
        for name in (t.name for t in trials if t.name in done and t.name not in told):
            told.add(name)
            finished(name, done[name])
        under_way = {trial.name for trial in running.values()}
        for trial in trials:
            if trial.name not in done and trial.name not in under_way and trial.name not in errors:
                running[remote.remote(trial, source.folder.absolute, data, folder.absolute)] = trial
        progress(len(told), len(running), len(errors))
        if not running:
            return errors
        ready, _ = ray.wait(list(running), num_returns=1, timeout=5.0)
        for reference in ready:
            trial = running.pop(reference)
            try:
                results.known[trial.name] = ray.get(reference)
            except RayError as error:
                failures[trial.name] = failures.get(trial.name, 0) + 1
                if failures[trial.name] > retries:
                    lines = str(error).strip().splitlines()
                    errors[trial.name] = f"{trial.describe()}: {lines[-1] if lines else type(error).__name__}"


def _perform(trial: Trial, source: str, data: str, folder: str) -> Result:
    """What Ray runs: the trial, and its result stored."""
    results = Results(Folder(folder))
    name = trial.name
    if results.folder.exists(f"results/{name}.json"):
        return json.loads(results.folder.read(f"results/{name}.json"))
    return results.store(name, perform(trial, source, data))


def params(result: Result) -> dict[str, Any]:
    """What MLflow is told of a trial."""
    trial = result["trial"]
    return {
        "task": trial["task"]["name"],
        "split": trial["split"],
        "start": trial["start"],
        "lr": trial["rate"],
        "seed": trial["seed"],
        "protocol": f"{trial['protocol']['name']}-{trial['protocol']['version']}",
        "checkpoint": trial["model"],
        **{f"data.{split}": root for split, root in trial["data"]},
        **{f"protocol.{name}": value for name, value in trial["protocol"].items() if name != "rates"},
    }
