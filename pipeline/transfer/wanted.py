"""What a sweep is to find out: which trials there are, and by which of them the others are decided.

All of it is a function of what is wanted and of the results there are.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Literal

import numpy as np

from pipeline.models.weights.exported import Exported
from pipeline.objectives.fewshot import leave_self_out
from pipeline.transfer.finetune import Start, Trial, check
from pipeline.transfer.protocols import Protocol, Recipe
from pipeline.transfer.results import Result
from pipeline.transfer.tasks import DEV, TEST, Split, Task, roots
from shards.manifest import ShardSet

_EVER = json.loads(json.dumps(asdict(Recipe())))


@dataclass(frozen=True)
class Wanted:
    """What a sweep is to find out of one checkpoint."""

    tasks: tuple[Task, ...]
    data: Mapping[str, tuple[tuple[str, str], ...]]
    """By task, name and root digest of its shard sets."""
    recipes: Mapping[str, Recipe]
    """By task."""
    rates: Mapping[str, tuple[float, ...]]
    """By task, the learning rates to choose from; nothing is done to choose from one."""
    starts: tuple[Start, ...]
    protocol: str
    """Name and version."""
    seeds: tuple[int, ...]
    pretrained: str
    architecture: str
    chosen_by: Literal["task", "others"] = "task"

    def __post_init__(self) -> None:
        for task in self.tasks:
            refuse_leak(task, self.data[task.name])
        if self.chosen_by == "others" and len(self.tasks) < 2:
            names = " and ".join(task.name for task in self.tasks)
            raise ValueError(f"{self.protocol} chooses by all other tasks, and there is {names} alone: name two")

    @property
    def count(self) -> int:
        """How many trials that is."""
        return sum(self.count_of(task) for task in self.tasks)

    def count_of(self, task: Task) -> int:
        """How many of them are of this task."""
        return len(self.starts) * (len(self._tried(task)) + len(self.seeds))

    @cached_property
    def choosing(self) -> dict[tuple[str, Start], dict[str, Trial]]:
        """By task and start, the trials that a rate is chosen by, by name."""
        return {
            (task.name, start): _named(self._trial(task, start, DEV, rate, self.seeds[0]) for rate in rates)
            for task in self.tasks
            for start in self.starts
            for rates in [self._tried(task)]
        }

    def chosen(self, tasks: Sequence[Task], start: Start, done: Mapping[str, Result]) -> dict[str, float]:
        """The learning rates to test with, by task, of those for which it can be told.

        ValueError where what it would be chosen by is not what it should be.
        """
        alone = {task.name: self.rates[task.name][0] for task in tasks if len(self.rates[task.name]) == 1}
        known = {
            task.name: trials
            for task in (self.tasks if self.chosen_by == "others" else tasks)
            if (trials := self.choosing[task.name, start]) and trials.keys() <= done.keys()
        }
        if self.chosen_by == "task":
            return alone | {name: best_rate(trials, done) for name, trials in known.items()}
        if len(known) < len(self.tasks):
            return alone
        return alone | best_of_others(known, done)

    def testing(self, task: Task, start: Start, rate: float) -> dict[str, Trial]:
        """By name, the trials that are judged on the test pictures."""
        return _named(self._trial(task, start, TEST, rate, seed) for seed in self.seeds)

    def trials(self, done: Mapping[str, Result]) -> dict[str, Trial]:
        """All trials that can be told so far, by name: to choose a rate, and where it is chosen, to test with it."""
        found: dict[str, Trial] = {}
        for start in self.starts:
            rates = self.chosen(self.tasks, start, done)
            for task in self.tasks:
                found |= self.choosing[task.name, start]
                if task.name in rates:
                    found |= self.testing(task, start, rates[task.name])
        return found

    def missing(self, done: Mapping[str, Result]) -> list[Trial]:
        """Those of them that have no result; none where all that is wanted is there."""
        return [trial for name, trial in self.trials(done).items() if name not in done]

    def _tried(self, task: Task) -> tuple[float, ...]:
        rates = self.rates[task.name]
        return rates if len(rates) > 1 else ()

    def _trial(self, task: Task, start: Start, split: Split, rate: float, seed: int) -> Trial:
        model = self.pretrained if start == "pretrained" else self.architecture
        data, recipe = self.data[task.name], self.recipes[task.name]
        return Trial(task, data, split, start, model, self.protocol, recipe, rate, seed)


def _named(trials: Iterable[Trial]) -> dict[str, Trial]:
    return {trial.name: trial for trial in trials}


def best_rate(choosing: Mapping[str, Trial], done: Mapping[str, Result]) -> float:
    """The rate with the best accuracy on the pictures to choose by, the smaller of equals.

    ValueError where a result is of other pictures: nothing is ever chosen by the test.
    """
    refuse_foreign(choosing, done)
    by_rate: dict[float, list[float]] = defaultdict(list)
    for name, trial in choosing.items():
        by_rate[trial.rate].append(done[name]["accuracy"])
    return min(by_rate, key=lambda rate: (-fmean(by_rate[rate]), rate))


def best_of_others(choosing: Mapping[str, Mapping[str, Trial]], done: Mapping[str, Result]) -> dict[str, float]:
    """By task, the rate that ranks best on the pictures to choose by of all other tasks."""
    for trials in choosing.values():
        refuse_foreign(trials, done)
    ordered = {
        task: sorted((trial.rate, done[name]["accuracy"]) for name, trial in trials.items())
        for task, trials in choosing.items()
    }
    best = leave_self_out({task: [accuracy for _, accuracy in found] for task, found in ordered.items()})
    return {task: ordered[task][which][0] for task, which in best.items()}


def refuse_foreign(choosing: Mapping[str, Trial], done: Mapping[str, Result]) -> None:
    """Raise ValueError unless each result is that of its trial, and none is of the pictures to test on."""
    for name, trial in choosing.items():
        said = done[name]["trial"]
        if trial.split != DEV or said["split"] != DEV:
            raise ValueError(f"a learning rate is chosen on {DEV} alone, and {trial.describe()} has seen the test")
        # A field that recipes have got since is as it ever was.
        if {**said, "recipe": {**_EVER, **said["recipe"]}} != json.loads(json.dumps(asdict(trial))):
            raise ValueError(f"results/{name}.json is not of {trial.describe()}: remove it, and it is done again")


def refuse_leak(task: Task, data: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError where pictures of a task to learn from, to choose by and to test on are the same.

    Those of a set are told apart by its root digest, whatever it is called.
    """
    root = dict(data)
    roles = {"to learn from": task.learning, "to choose by": task.choosing, "to test on": task.testing}
    parts = [(role, part, root[task.where(part)]) for role, found in roles.items() for part in found]
    for number, (role, part, digest) in enumerate(parts):
        for other_role, other, other_digest in parts[:number]:
            if digest == other_digest and part.first < other.last and other.first < part.last:
                both = f"{task.where(other)} {other_role} and {task.where(part)} {role}"
                raise ValueError(f"task {task.name}: {both} are the same pictures")


def wanted_of(
    protocol: Protocol,
    tasks: Mapping[Task, Mapping[str, ShardSet]],
    source: Exported,
    *,
    starts: tuple[Start, ...] = ("pretrained",),
    rates: tuple[float, ...] = (),
    seeds: int = 3,
) -> Wanted:
    """What a protocol makes of these tasks and their shard sets (as `tasks.find` gives them).

    `rates` are chosen from instead of the protocol's, where there are any. ValueError where the model cannot be
    trained by the protocol.
    """
    return Wanted(
        tasks=tuple(tasks),
        data={task.name: roots(sets) for task, sets in tasks.items()},
        recipes={task.name: _recipe(protocol, task, sets, source) for task, sets in tasks.items()},
        rates={task.name: rates or protocol.rates(task) for task in tasks},
        starts=starts,
        protocol=protocol.title,
        seeds=tuple(range(seeds)),
        pretrained=source.digest,
        architecture=source.architecture,
        chosen_by=protocol.chosen_by,
    )


def _recipe(protocol: Protocol, task: Task, sets: Mapping[str, ShardSet], source: Exported) -> Recipe:
    parts = [(part, sets[task.where(part)]) for part in task.training(TEST)]
    samples = sum(len(part.numbers(one.manifest.samples)) for part, one in parts)
    rows = parts[0][1].rows(0, ["width", "height"])  # a shard is a random part of its set
    area = float(np.median(rows["width"].to_numpy().astype(np.int64) * rows["height"].to_numpy()))
    recipe = protocol.recipe(task, samples, source.config, area)
    check(recipe, source.config)
    return recipe
