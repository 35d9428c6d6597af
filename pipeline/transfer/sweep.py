"""Many fine-tunings: a reconciler that lists what is wanted, lists what exists, and does what is missing.

It has no state of its own. A result is created once, exclusively, under its trial's name; so a sweep that was killed
repeats nothing that has a result, and a rate or a task that is added re-uses all the rest. What a sweep has in hand it
claims by a lease, so that of two sweeps at once one does a trial and the other waits for its result; the claims of a
sweep that was killed end by themselves.
"""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

from pipeline.transfer import lease
from pipeline.transfer.finetune import Start, Trial, kind_of, perform, together
from pipeline.transfer.results import Result, Results
from pipeline.transfer.spare import Watch
from pipeline.transfer.wanted import Wanted
from pipeline.transfer.workers import Group, Outcome, Perform, Place, Pool, Queue, Resources
from shards.cluster import RETRIES
from shards.storage import Folder

CLAIM_SECONDS = 30.0
"""For which a trial in hand is claimed, time and again."""
LOOK_SECONDS = 2.0
"""From one look for what others have in hand to the next."""


@dataclass(frozen=True)
class State:
    """How far a sweep is; trials."""

    total: int
    done: int
    running: int
    failed: int
    waiting: int
    """Claimed by another sweep."""
    left: float
    """Seconds to the end, if the rest takes as long as what has been done; infinite while nothing has."""
    paused: bool = False
    """Whether nothing is done since somebody else needs the cluster."""


class Large(Protocol):
    """Does a trial that is a run of its own, on many processes."""

    def __call__(self, trial: Trial, source: str, data: str, folder: Folder) -> Result: ...


def no_large(trial: Trial, source: str, data: str, folder: Folder) -> Result:
    """Where none is wanted."""
    raise ValueError(f"task {trial.task.name} is a run of its own: start it with jobs/finetune.py")


@dataclass(frozen=True)
class Told:
    """Whom a sweep tells of what."""

    progress: Callable[[State], None] = lambda state: None
    finished: Callable[[str, Result], None] = lambda name, result: None
    """Each result once, those that were there too."""
    failed: Callable[[str], None] = lambda line: None
    """Each trial that is given up, and why."""


def sweep(
    wanted: Wanted,
    source: str,
    data: str,
    results: Results,
    *,
    resources: Resources,
    retries: int,
    told: Told,
    most: int | None = None,
    claim_seconds: float = CLAIM_SECONDS,
    skew: float = lease.SKEW,
    spare: Watch | None = None,
    work: Perform = perform,
    large: Large = no_large,
) -> dict[str, str]:
    """Do what is missing; returns the trials that failed more than `retries` times, with what went wrong.

    On Ray, by `most` actors, or as many as there is room for if that is None; with `spare` by no more than nobody else
    has a use for: while it says so all are ended, and what they have in hand is put off. Tasks that are runs of their
    own come last, one by one.
    """
    claims = Claims(results.place / "claims", claim_seconds, skew)
    pool = Pool(Place(source, data, results.place.absolute), resources, work, most, spare)
    try:
        return _Sweep(wanted, results, claims, pool, retries, told, spare or (lambda: False)).run(
            lambda trial: large(trial, source, data, results.place)
        )
    finally:
        pool.close()
        claims.close()


class Claims:
    """What this sweep has in hand, by leases, which a thread renews."""

    def __init__(self, folder: Folder, seconds: float, skew: float) -> None:
        self._folder, self._seconds, self._skew = folder, seconds, skew
        self._held: dict[str, lease.Lease] = {}
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="claims")
        self._thread.start()

    def take(self, name: str) -> bool:
        """Whether the trial is this sweep's to do, now or already."""
        with self._lock:
            held = self._held.get(name)
        if held and held.held:
            return True
        taken = lease.take(self._folder, name, self._seconds, skew=self._skew)
        if taken:
            with self._lock:
                self._held[name] = taken
        return taken is not None

    def done(self, name: str) -> None:
        """The trial has its result: nobody asks any more whose it is."""
        with self._lock:
            self._held.pop(name, None)

    def release(self, name: str) -> None:
        """Let others do the trial."""
        with self._lock:
            held = self._held.pop(name, None)
            if held:
                held.release()

    def close(self) -> None:
        """Release all."""
        self._end.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)

    def _renew(self) -> None:
        while not self._end.wait(self._seconds / 3):
            for name in list(self._held):
                with self._lock:  # what is being released is not renewed any more
                    if name in self._held:
                        with suppress(OSError):  # perhaps the store is back before the lease ends
                            self._held[name].renew()


class _Sweep:
    """What is wanted, against what is done, in hand, waiting and given up."""

    def __init__(
        self,
        wanted: Wanted,
        results: Results,
        claims: Claims,
        pool: Pool,
        retries: int,
        told: Told,
        needed_elsewhere: Callable[[], bool],
    ) -> None:
        self.wanted, self.results, self.claims, self.pool = wanted, results, claims, pool
        self.retries, self.told, self.needed_elsewhere = retries, told, needed_elsewhere
        self.queue, self.large = Queue(), Queue()
        self.elsewhere: dict[str, Trial] = {}
        """In the hands of another sweep."""
        self.asked: dict[str, Trial] = {}
        """All that were ever missing or found."""
        self.open = {choice: set(trials) for choice, trials in wanted.choosing.items()}
        """By task and start, the trials to choose a rate by that have no result."""
        self.settled: set[tuple[str, Start]] = set()
        """Of which the rate is known."""
        self.done: set[str] = set()
        self.failures: dict[str, int] = defaultdict(int)
        self.deaths: dict[str, int] = defaultdict(int)
        self.stillborn = 0
        self.errors: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.looked = 0.0

    def run(self, large: Callable[[Trial], Result]) -> dict[str, str]:
        """To the end of what can be done."""
        self.results.load()
        for trials in self.wanted.choosing.values():
            self._ask(trials)
        self._settle(list(self.open))
        while self.queue or self.large or self.elsewhere or self.pool.at_work:
            if self.queue or self.pool.at_work:
                self._step()
            elif self.large:
                self.pool.close()  # a run of its own takes the whole cluster
                self._step_large(large)
            else:
                time.sleep(LOOK_SECONDS)
            self._look()
        self._tell()
        return self.errors

    def _step(self) -> None:
        if self.needed_elsewhere():
            for group in self.pool.close():
                self._put_off(group)
            self._tell(paused=True)
            time.sleep(LOOK_SECONDS)
            return
        self.pool.grow(len(self.queue))
        self.pool.hand_out(self._next)
        self._tell()
        if self.queue or self.pool.at_work:
            for outcome in self.pool.wait(LOOK_SECONDS):
                self._ended(outcome)

    def _step_large(self, large: Callable[[Trial], Result]) -> None:
        group = self.large.take("", set())
        if not group or not (claimed := self._claimed(group)):
            return
        ((name, trial),) = claimed.items()
        self._tell(running=1)
        try:
            self._ended(Outcome(group, {name: self.results.store(name, large(trial))}))
        except Exception as error:  # whatever it is, the other trials go on
            self._ended(Outcome(group, {}, " ".join(str(error).split()) or type(error).__name__))

    def _next(self, task: str, taken: set[str]) -> Group | None:
        """A group for an actor, all of which is claimed."""
        while group := self.queue.take(task, taken):
            if claimed := self._claimed(group):
                return claimed
        return None

    def _claimed(self, group: Group) -> Group:
        """Those of the group that are this sweep's to do."""
        claimed = {}
        for name, trial in group.items():
            if not self.claims.take(name):
                self.elsewhere[name] = trial
            elif result := self.results.find(name):  # since the last look
                self._arrived(name, result)
            else:
                claimed[name] = trial
        return claimed

    def _put_off(self, group: Group) -> None:
        for name in group:
            self.claims.release(name)
        self.queue.add([group])

    def _look(self) -> None:
        """See what others have done; what they have in hand is asked for again."""
        if not self.elsewhere or time.monotonic() - self.looked < LOOK_SECONDS:
            return
        waiting, self.elsewhere = self.elsewhere, {}
        known = self.results.load()
        self.looked = time.monotonic()
        for name in waiting.keys() & known.keys():
            self._arrived(name, known[name])
        self._enqueue({name: trial for name, trial in waiting.items() if name not in known})

    def _ask(self, trials: Mapping[str, Trial]) -> None:
        """Have these done, unless they are."""
        self.asked |= trials
        for name in trials.keys() & self.results.known.keys():
            self._arrived(name, self.results.known[name])
        self._enqueue({name: trial for name, trial in trials.items() if name not in self.done})

    def _enqueue(self, trials: Mapping[str, Trial]) -> None:
        groups: dict[str, dict[str, Trial]] = defaultdict(dict)
        for name, trial in trials.items():
            if trial.kind == "run":
                self.large.add([{name: trial}])
            else:
                groups[together(trial)][name] = trial
        self.queue.add(groups.values())

    def _arrived(self, name: str, result: Result) -> None:
        """A result is there: told once; perhaps it settles a rate, and so brings the trials that test it."""
        if name in self.done:
            return
        self.done.add(name)
        self.claims.done(name)
        self.results.known[name] = result
        self.told.finished(name, result)
        trial = self.asked[name]
        self.seconds[trial.task.name].append(float(result["seconds"]))
        choice = (trial.task.name, trial.start)
        if name in self.open[choice]:
            self.open[choice].remove(name)
            if not self.open[choice]:
                self._settle([choice] if self.wanted.chosen_by == "task" else list(self.open))

    def _settle(self, choices: Sequence[tuple[str, Start]]) -> None:
        """Have the tests done of those whose rate is known by now."""
        for start in self.wanted.starts:
            asked = {task for task, of_start in choices if of_start == start and (task, start) not in self.settled}
            tasks = [task for task in self.wanted.tasks if task.name in asked]
            rates = self.wanted.chosen(tasks, start, self.results.known) if tasks else {}
            for task in tasks:
                if task.name in rates:
                    self.settled.add((task.name, start))
                    self._ask(self.wanted.testing(task, start, rates[task.name]))

    def _ended(self, outcome: Outcome) -> None:
        for name, result in outcome.results.items():
            self._arrived(name, result)
        if not outcome.group:
            self._unborn(outcome)
        # One by one from now on: what one of them spoils is not the others' fault.
        self._enqueue_each({name: trial for name, trial in outcome.group.items() if name not in self.done}, outcome)

    def _enqueue_each(self, trials: Group, outcome: Outcome) -> None:
        for name, trial in trials.items():
            counted, limit = (self.deaths, RETRIES) if outcome.died else (self.failures, self.retries)
            counted[name] += 1
            if counted[name] > limit or outcome.hopeless:
                self.errors[name] = f"{trial.describe()}: {outcome.error}"
                self.claims.release(name)
                self.told.failed(self.errors[name])
            else:
                (self.large if trial.kind == "run" else self.queue).add([{name: trial}])

    def _unborn(self, outcome: Outcome) -> None:
        self.stillborn += 1
        if self.stillborn > RETRIES:
            raise RuntimeError(f"no process that does trials can be started: {outcome.error}")

    def _tell(self, *, running: int = 0, paused: bool = False) -> None:
        running += sum(len(group) for group in self.pool.at_work)
        total, done, failed = self.wanted.count, len(self.done), len(self.errors)
        self.told.progress(
            State(total, done, running, failed, len(self.elsewhere), self._left(), paused),
        )

    def _left(self) -> float:
        """Seconds: what is missing of each task, as long as its trials took so far, or as all did."""
        of_all = [seconds for found in self.seconds.values() for seconds in found]
        if not of_all:
            return math.inf
        mean, left = fmean(of_all), {"memory": 0.0, "run": 0.0}
        for task in self.wanted.tasks:
            found = self.seconds[task.name]
            missing = max(0, self.wanted.count_of(task) - len(found))
            left[kind_of(task, self.wanted.recipes[task.name])] += missing * (fmean(found) if found else mean)
        return left["memory"] / max(1, self.pool.size) + left["run"]


def params(result: Result) -> dict[str, Any]:
    """What MLflow is told of a trial: all that decides it."""
    trial = result["trial"]
    return {
        "task": trial["task"]["name"],
        "group": trial["task"]["group"],
        "split": trial["split"],
        "start": trial["start"],
        "lr": trial["rate"],
        "seed": trial["seed"],
        "protocol": trial["protocol"],
        "checkpoint": trial["model"],
        **{f"data.{name}": root for name, root in trial["data"]},
        **{f"recipe.{name}": value for name, value in trial["recipe"].items()},
        **{
            f"task.{name}": trial["task"][name]
            for name in ("dataset", "learning", "choosing", "testing", "flip", "crop")
        },
    }


def metrics(result: Result) -> dict[str, float]:
    """What MLflow is told of its result."""
    also = {f"accuracy_{name}": float(judged["accuracy"]) for name, judged in result.get("also", {}).items()}
    return {**{name: float(result[name]) for name in ("accuracy", "count", "seconds")}, **also}
