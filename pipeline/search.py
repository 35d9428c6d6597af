"""The learning rate of a task that is a run of its own, by asynchronous successive halving (ASHA).

Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning: all rates are trained for a part of the steps,
only the best third of them goes on to three times as many, and so on. Ray Tune decides who goes on. What it decides on
lies in the trials' runs, so that whatever is killed is not trained again; and what is trained is the run of the whole
trial, so that a rate which gets to the end has the very result it would have without all this.

A rate that was stopped has no result. `chosen/NAME.json` says which were, and how good they were by then; the rate is
always the best of the whole results of the others.
"""

import json
import os
import pickletools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as Tried
from ray.tune.schedulers import ASHAScheduler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import large
from pipeline.launch import has_gpus, storage_of, this_node
from pipeline.transfer.finetune import Trial
from pipeline.transfer.lease import SKEW
from pipeline.transfer.results import Result, Results
from pipeline.transfer.sweep import CLAIM_SECONDS, LOOK_SECONDS, Claims
from pipeline.transfer.wanted import best_rate
from shards.storage import Folder

REDUCTION = 3
"""Of so many rates one goes on, to so many times the steps."""
HALVINGS = 2
CHOSEN, TUNE = "chosen", "tune"

# What Ray Tune goes on from; the last name in order counts.
_STATE, _TUNER = "experiment_state-*.json", "tuner.pkl"
_PICKLED = (_TUNER, "search_gen_state-*.json", "basic-variant-state-*.json", "callback-states-*.pkl")

HEAD = "node:__internal_head__"
"""A resource of which Ray gives 1 to the node that outlives all others, where trials do nothing but wait for runs."""
WAITING, TURNS = 0.001, 0.9
"""Of it, for a trial, and for all runs that are at work."""

# A signal ends whoever searches, as it does without Tune; what it would print and log is said elsewhere.
QUIET = {"TUNE_DISABLE_SIGINT_HANDLER": "1", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}


@dataclass(frozen=True)
class Search:
    """What a rate is searched among, and with what."""

    trials: Mapping[str, Trial]
    """By name: those of one task and start, on the pictures to choose by, each with its rate."""
    source: str
    data: str
    folder: Folder
    """Of the sweep."""
    processes: Sequence[int]
    cpus_each: int = 1
    uri: str = ""

    @property
    def name(self) -> str:
        """The digest of all that decides who is trained how far."""
        return sha256(json.dumps([sorted(self.trials), REDUCTION, HALVINGS]).encode()).hexdigest()[:24]

    @property
    def title(self) -> str:
        """The task, in a few words."""
        first = next(iter(self.trials.values()))
        return f"{first.task.name} {first.start} {first.protocol}"


def rungs(steps: int) -> tuple[int, ...]:
    """After how many of so many steps rates are compared, before the end."""
    first = steps // REDUCTION**HALVINGS + 1
    return tuple(rung for k in range(HALVINGS) if (rung := first * REDUCTION**k) < steps)


def search(
    wanted: Search,
    results: Results,
    *,
    at_once: int = 0,
    retries: int = 2,
    claim_seconds: float = CLAIM_SECONDS,
    skew: float = SKEW,
    finished: Callable[[str, Result], None] = lambda name, result: None,
) -> float:
    """The best of the rates on the pictures to choose by, as far as they were trained; nothing is searched twice.

    At most `at_once` runs are at work at a time; 0 for as many as the cluster has room for, and at least one. A rate
    that fails more than `retries` times fails the search: RuntimeError, and the next one goes on from there. `finished`
    is told each whole result. ValueError where the trials are judged on something else, or do not fit.
    """
    for trial in wanted.trials.values():
        large.planned(trial, wanted.source, wanted.data, cpus_each=wanted.cpus_each, precision="fp32")
    record = f"{wanted.name}.json"
    claims = Claims(wanted.folder / "claims", claim_seconds, skew)
    try:
        while not (there := (wanted.folder / CHOSEN).exists(record)) and not _claimed(claims, wanted):
            time.sleep(LOOK_SECONDS)
        if not there and not (wanted.folder / CHOSEN).exists(record):  # since the last look
            if wanted.trials.keys() - results.load().keys():
                _run(wanted, at_once or room(wanted.processes, wanted.cpus_each), retries)
                results.load()
            (wanted.folder / CHOSEN).create(record, json.dumps(_choice(wanted, results), indent=1).encode())
            (wanted.folder / TUNE).remove(wanted.name)  # nothing goes on from there any more
    finally:
        claims.close()
    known = results.load()
    choice = json.loads((wanted.folder / CHOSEN).read(record))
    rate = settled(choice, wanted.trials, known)
    _say(f"{wanted.title}: lr {rate:g} of {len(wanted.trials)}; {(wanted.folder / CHOSEN).absolute}/{record}")
    for name in choice["whole"]:
        finished(name, known[name])
    return rate


def settled(choice: Mapping[str, Any], trials: Mapping[str, Trial], done: Mapping[str, Result]) -> float:
    """The best rate of those that were not stopped, by their whole results.

    ValueError where the choice is one among others, a result is missing, or is not of the pictures to choose by.
    """
    if {*choice["whole"], *choice["stopped"]} != trials.keys() or not choice["whole"]:
        raise ValueError(f"{CHOSEN}/{choice['name']}.json is a choice among other rates: remove it")
    for name in choice["whole"]:
        if name not in done:
            raise ValueError(f"results/{name}.json is gone: remove {CHOSEN}/{choice['name']}.json, to choose again")
    return best_rate({name: trials[name] for name in choice["whole"]}, done)


def room(processes: Sequence[int], cpus_each: int) -> int:
    """How many runs of the most processes the whole cluster has room for, at least 1."""
    there, most = ray.cluster_resources(), max(processes)
    by_cpu = there.get("CPU", 0.0) // (most * cpus_each)
    return max(1, int(min(by_cpu, there["GPU"] // most) if has_gpus() else by_cpu))


class Rungs(ASHAScheduler):
    """Ray's ASHA, which is asked again when a trial is about to go on, and which knows what it knew after a restart.

    Ray's decides once, as a trial reports: the first of a rung goes on whatever comes of the others. Here, as in the
    paper (algorithm 2), a trial goes on if it is among the best by the time when there is room for it: at each of its
    rungs, since after a restart it may have gone ahead. It is stopped for another only if that is not, so one is left.
    """

    def __init__(self, steps: int) -> None:
        first = [*rungs(steps), steps][0]
        super().__init__("steps", "accuracy", "max", max_t=steps, grace_period=first, reduction_factor=REDUCTION)
        self._gone: set[str] = set()

    def on_trial_add(self, tune_controller: Any, trial: Tried) -> None:
        """Ray keeps what the trials have reported, and not what became of it here."""
        super().on_trial_add(tune_controller, trial)
        for steps, accuracy in (trial.last_result or {}).get("rungs", ()):
            self._trial_info[trial.trial_id].on_result(trial, steps, accuracy)
        if trial.status == Tried.TERMINATED and trial.last_result.get("steps", 0) < self._max_t:
            self._gone.add(trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Tried, result: dict[str, Any]) -> str:
        """Whether it goes on."""
        action = super().on_trial_result(tune_controller, trial, result)
        if result["steps"] >= self._max_t:
            return action
        bracket = self._trial_info[trial.trial_id]
        reached = [recorded for _, recorded in bracket._rungs if trial.trial_id in recorded]
        if not any(self._beaten(trial.trial_id, recorded, bracket.cutoff(recorded)) for recorded in reached):
            return self.CONTINUE
        self._gone.add(trial.trial_id)
        return self.STOP

    def _beaten(self, name: str, recorded: Mapping[str, float], cutoff: Any) -> bool:
        better = {other for other, accuracy in recorded.items() if accuracy > recorded[name]}
        return recorded[name] < cutoff and bool(better - self._gone)


def _claimed(claims: Claims, wanted: Search) -> bool:
    """Whether all of the trials are this sweep's to do; in one order, so that no two wait for each other."""
    return all(claims.take(name) for name in sorted(wanted.trials))


def _run(wanted: Search, most: int, retries: int) -> None:
    """Train all rates as far as they are worth it; RuntimeError where one of them fails."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    place = (wanted.folder / TUNE).absolute
    storage, own = storage_of(place), Folder(place) / wanted.name
    climb = tune.with_resources(_climber(wanted, most), tune.PlacementGroupFactory([{HEAD: WAITING}]))
    if restorable(own):
        path = f"{storage['storage_path']}/{wanted.name}"
        files = storage.get("storage_filesystem")
        tuner = tune.Tuner.restore(path, climb, resume_errored=True, storage_filesystem=files)
    else:
        steps = {trial.recipe.steps for trial in wanted.trials.values()}
        tuner = tune.Tuner(
            climb,
            param_space={"trial": tune.grid_search(list(wanted.trials))},
            tune_config=tune.TuneConfig(scheduler=Rungs(max(steps))),
            run_config=tune.RunConfig(
                name=wanted.name,
                **storage,
                failure_config=tune.FailureConfig(max_failures=retries),
                callbacks=[Lines({name: trial.describe() for name, trial in wanted.trials.items()})],
                verbose=0,
            ),
        )
    _say(f"{wanted.title}: searches among {len(wanted.trials)} learning rates, {most} at a time; {own.absolute}")
    if errors := tuner.fit().errors:
        said = (str(error).strip().splitlines()[-1].strip() for error in errors)
        raise RuntimeError(f"{wanted.title}: no learning rate was chosen: " + "; ".join(dict.fromkeys(said)))


def restorable(own: Folder) -> bool:
    """Whether Ray Tune has left enough to go on from: a search that was killed may have left half a file."""
    files = sorted(own.sizes())
    newest = {kind: name for kind in (_STATE, *_PICKLED) for name in files if fnmatch(name, kind)}
    if not {_STATE, _TUNER} <= newest.keys():
        return False
    with suppress(ValueError):
        for kind in newest.keys() - {_STATE}:
            deque(pickletools.genops(own.read(newest[kind])), maxlen=0)  # to its end, without making what it holds
        return bool(json.loads(own.read(newest[_STATE])))
    return False


def _climber(wanted: Search, most: int) -> Callable[[dict[str, Any]], None]:
    """What a trial of Ray Tune does, in a process of its own: train a rate from rung to rung."""

    def climb(config: dict[str, Any]) -> None:
        trial, folder, report = wanted.trials[config["trial"]], wanted.folder, _Report()
        how: dict[str, Any] = {"processes": wanted.processes, "cpus_each": wanted.cpus_each, "uri": wanted.uri}
        results = Results(folder)
        for steps in rungs(trial.recipe.steps):
            if (accuracy := large.judged_early(trial, folder).get(steps)) is None:
                if results.find(trial.name):
                    continue
                with _turn(most):
                    report.again()
                    accuracy = large.judge_early(trial, wanted.source, wanted.data, folder, steps, **how)
            report(steps, accuracy)
        if not results.find(trial.name):
            with _turn(most):
                report.again()
                results.store(trial.name, large.perform(trial, wanted.source, wanted.data, folder, **how))
        report(trial.recipe.steps, results.known[trial.name]["accuracy"])

    return climb


class _Report:
    """Tells Ray Tune how good a rate is; where it is not good enough, the trial ends in the call."""

    def __init__(self) -> None:
        self._rungs: list[tuple[int, float]] = []

    def __call__(self, steps: int, accuracy: float) -> None:
        self._rungs.append((steps, accuracy))
        self.again()

    def again(self) -> None:
        """What was told last, since others may have told theirs in the meantime."""
        if self._rungs:
            steps, accuracy = self._rungs[-1]
            tune.report({"steps": steps, "accuracy": accuracy, "rungs": self._rungs})


class Lines(tune.Callback):
    """Says how good the rates are so far."""

    def __init__(self, titles: Mapping[str, str]) -> None:
        self._titles, self._said = titles, set[tuple[str, int]]()

    def on_trial_result(
        self, iteration: int, trials: list[Tried], trial: Tried, result: dict[str, Any], **info: Any
    ) -> None:
        """Say so once."""
        name, steps = trial.config["trial"], result["steps"]
        if (name, steps) not in self._said:
            self._said.add((name, steps))
            _say(f"{self._titles[name]}: {100 * result['accuracy']:.2f} % after {steps:,} steps")


def _say(line: str) -> None:
    print(line, flush=True)


class _Turn:
    """Holds a part of a resource as long as the process that has made it lives."""

    def taken(self) -> None:
        """Answers when it does."""


@contextmanager
def _turn(most: int) -> Iterator[None]:
    """At most so many trials at a time, of all searches of the cluster; those who came first go first."""
    here: Any = NodeAffinitySchedulingStrategy(this_node(), soft=False)
    turn: Any = ray.remote(num_cpus=0, resources={HEAD: TURNS / most}, scheduling_strategy=here)(_Turn).remote()
    ray.get(turn.taken.remote())
    try:
        yield
    finally:
        ray.kill(turn)


def _choice(wanted: Search, results: Results) -> dict[str, Any]:
    """Who was stopped, and how good all were by then."""
    early = {name: large.judged_early(trial, wanted.folder) for name, trial in wanted.trials.items()}
    whole = [name for name in wanted.trials if name in results.known]
    choice = {
        "name": wanted.name,
        "of": wanted.title,
        "reduction": REDUCTION,
        "rates": {name: trial.rate for name, trial in wanted.trials.items()},
        "rungs": {name: {str(steps): accuracy for steps, accuracy in found.items()} for name, found in early.items()},
        "whole": whole,
        "stopped": [name for name in wanted.trials if name not in results.known],
    }
    return {**choice, "rate": settled(choice, wanted.trials, results.known)}
