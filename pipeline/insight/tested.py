"""From the results of a sweep to lines of a table: what each model reached on each task by each protocol.

Results stand in one line where the same weights were fine-tuned by one protocol. Of several learning rates that were
tested, the one counts that was best on the pictures to choose by; the test set chooses nothing.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from pipeline.insight.published import GROUPS, VTAB, Number

Result = Mapping[str, Any]
"""Of a trial, as JSON has it: all that decided it, and what came of it."""


@dataclass(frozen=True)
class Known:
    """What is told of a model beside its results."""

    name: str
    architecture: str = ""
    """Its digest."""
    exaflops: float | None = None
    """What its pretraining has cost."""


@dataclass(frozen=True)
class Tested:
    """The test of one task: by one learning rate, one result for each seed, in their order."""

    task: Mapping[str, Any]
    rate: float
    results: tuple[Result, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the results."""
        return tuple(result["trial"]["seed"] for result in self.results)

    def accuracies(self, also: str = "") -> tuple[float, ...]:
        """Share of pictures named rightly, for each seed; of one of the further test sets, if it is named.

        Empty where a result has no such test set.
        """
        found = tuple(of_set(result, also) for result in self.results)
        return tuple(one["accuracy"] for one in found if one) if all(found) else ()

    def where(self, also: str = "") -> list[tuple[str, int, int]]:
        """The test sets, as data set and split, and the hundredths of each that are its test."""
        if also:
            return [(name, 0, 100) for key, name in self.task["also"] if key == also]
        return [
            (split if "/" in split else f"{self.task['dataset']}/{split}", part["first"], part["last"])
            for part in self.task["testing"]
            for split in [part["split"]]
        ]


@dataclass(frozen=True)
class Ours:
    """All tests of the same weights by the same protocol."""

    model: str
    """Digest of the weights; of the architecture where it started from scratch."""
    name: str
    start: str
    protocol: str
    setting: int
    """From 0: where one task was done with several recipes or sets of pictures, they stand in lines of their own."""
    tests: Mapping[str, Tested]
    """By task."""
    undecided: tuple[str, ...] = ()
    """Tasks of which several learning rates were tested, and nothing says which of them counts."""
    known: Known | None = None
    """Where something is told of the model that it was pretrained as."""

    @property
    def label(self) -> str:
        """What the line is called."""
        again = f", setting {self.setting + 1}" if self.setting else ""
        return f"{self.name}, {self.protocol}{again}"

    @cached_property
    def values(self) -> dict[str, Number]:
        """In %, by column: tasks, further test sets, and the means of VTAB-1k that are complete."""
        found = {name: number(test.accuracies()) for name, test in self.tests.items()}
        for test in self.tests.values():
            for also, _ in test.task["also"]:
                if accuracies := test.accuracies(also):
                    found[also] = number(accuracies)
        for name, tasks in {"vtab": VTAB, **GROUPS}.items():
            if all(task in self.tests for task in tasks):
                found[name] = self._mean(tasks)
        return found

    def _mean(self, tasks: Sequence[str]) -> Number:
        """Over the tasks; its deviation is that of the mean over the seeds which all of them have."""
        tests = [self.tests[task] for task in tasks]
        shared = sorted(set.intersection(*(set(test.seeds) for test in tests)))
        of_seed = [fmean(test.accuracies()[test.seeds.index(seed)] for test in tests) for seed in shared]
        mean = fmean(fmean(test.accuracies()) for test in tests)
        return replace(number(of_seed or [mean]), mean=100 * mean)


def lines(results: Mapping[str, Result], models: Mapping[str, Known] | None = None) -> list[Ours]:
    """A line for each model and protocol, pretrained ones first; `models` tells of them, by digest."""
    found: dict[tuple[str, str, str], dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(results):
        trial = results[name]["trial"]
        found[trial["start"], trial["model"], trial["protocol"]][trial["task"]["name"]].append(results[name])
    made: list[Ours] = []
    for (start, model, protocol), tasks in found.items():
        settings = {task: _settings(of) for task, of in tasks.items()}
        for setting in range(max(map(len, settings.values()))):
            tests, undecided = _tests({task: of[setting] for task, of in settings.items() if setting < len(of)})
            if tests or undecided:
                about = (models or {}).get(model)
                name, known = _name(start, model, about), None if start == "scratch" else about
                made.append(Ours(model, name, start, protocol, setting, tests, undecided, known))
    return sorted(made, key=lambda ours: (ours.start == "scratch", _counted(ours.label)))


def _settings(results: Sequence[Result]) -> list[list[Result]]:
    """Those of the same recipe and pictures together. What an older recipe does not say yet decides nothing."""
    recipes = [result["trial"]["recipe"] for result in results]
    said = sorted(set.intersection(*map(set, recipes)))
    found: dict[str, list[Result]] = defaultdict(list)
    for result, recipe in zip(results, recipes, strict=True):
        found[json.dumps([[recipe[name] for name in said], result["trial"]["data"]])].append(result)
    return [found[setting] for setting in sorted(found)]


def _name(start: str, model: str, about: Known | None) -> str:
    called = about.name if about else model[:8]
    return f"from scratch ({called})" if start == "scratch" else called


def _counted(text: str) -> list[tuple[int, str]]:
    """To sort by: numbers in a name count as numbers."""
    return [(int(piece), "") if piece.isdigit() else (0, piece) for piece in re.split(r"(\d+)", text)]


def _tests(tasks: Mapping[str, Sequence[Result]]) -> tuple[dict[str, Tested], tuple[str, ...]]:
    """What counts of each task's results, and the tasks of which several rates were tested and none was chosen.

    When rates are added to a sweep the choice may change; what was tested before stays, and does not count.
    """
    dev: dict[str, dict[float, list[float]]] = {task: defaultdict(list) for task in tasks}
    tests: dict[str, dict[float, dict[int, Result]]] = {task: defaultdict(dict) for task in tasks}
    for task, result in ((task, result) for task, results in tasks.items() for result in results):
        trial = result["trial"]
        if trial["split"] == "test":
            tests[task][trial["rate"]][trial["seed"]] = result
        else:
            dev[task][trial["rate"]].append(result["accuracy"])
    means = {task: {rate: fmean(found) for rate, found in sorted(of.items())} for task, of in dev.items()}
    by_others = any(result["trial"]["recipe"]["method"] == "fewshot" for of in tasks.values() for result in of)
    best = _best_by_others(means) if by_others else {}
    found: dict[str, Tested] = {}
    for task, of in tests.items():
        rate = best[task] if best.get(task) in of else _best(means[task], of)
        if rate is not None:
            results = tuple(of[rate][seed] for seed in sorted(of[rate]))
            found[task] = Tested(results[0]["trial"]["task"], rate, results)
    return found, tuple(sorted(task for task, of in tests.items() if of and task not in found))


def _best(dev: Mapping[float, float], tested: Collection[float]) -> float | None:
    """Of the tested rates the best on the pictures to choose by, the smaller of equals; None where that is not told."""
    if len(tested) < 2:
        return next(iter(tested), None)
    return min((rate for rate in tested if rate in dev), key=lambda rate: (-dev[rate], rate), default=None)


def _best_by_others(dev: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """By task, the penalty that ranks best in all others; empty where they have not tried the same ones."""
    tried = {task: of for task, of in dev.items() if len(of) > 1}
    if len(tried) < 2 or len({tuple(of) for of in tried.values()}) > 1:
        return {}
    from pipeline.objectives.fewshot import leave_self_out  # with torch, which nothing else here needs

    best = leave_self_out({task: list(of.values()) for task, of in tried.items()})
    return {task: list(tried[task])[which] for task, which in best.items()}


def of_set(result: Result, also: str) -> Result | None:
    """What was found on the task's own test set, or on a further one; None where that was not there."""
    return result["also"].get(also) if also else result


def number(accuracies: Sequence[float]) -> Number:
    """Mean and sample standard deviation, in %, of shares."""
    deviation = 100 * stdev(accuracies) if len(accuracies) > 1 else None
    return Number(100 * fmean(accuracies), deviation)
