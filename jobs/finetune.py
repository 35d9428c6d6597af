"""Fine-tune a pretrained model to many tasks; what has a result already is not done again.

    python jobs/finetune.py --checkpoint RUN --tasks vtab,cifar,imagenet --protocol vit --data SETS --to FOLDER
    python jobs/finetune.py report FOLDER

RUN is the folder of a run that has finished, of one of its milestones (RUN/milestones/step-...), or of an export. For
each task a learning rate is chosen on pictures that are kept apart for that, then the model is trained on all but the
test pictures and tested once, with each of several seeds. `report` shows what has come of it beside what the papers
say. Runs on the Ray cluster it is submitted to, or starts a Ray on this machine.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from pipeline.cli import counts, parse, run

if TYPE_CHECKING:
    from pipeline.track.log import Trials
    from pipeline.transfer.results import Results
    from pipeline.transfer.sweep import Large, State, Wanted


@dataclass(frozen=True)
class Arguments:
    """What to fine-tune, to what, and how."""

    checkpoint: str
    """Folder of a finished run, of a milestone of a run, or of an export."""
    data: str
    """Folder that holds the tasks' shard sets, as DATA/SET/SPLIT."""
    to: str
    """Folder for the results."""
    tasks: str = "demo"
    """Tasks, or groups of them such as vtab, cifar or all, with commas between them."""
    protocol: str = "demo"
    """How it is done: vit, vit-vtab, bit-hyperrule, linear, fewshot and others."""
    rates: tuple[float, ...] = ()
    """Learning rates to choose from; the protocol's if none are given."""
    seeds: int = 3
    """How often each task is tested, each time by another fine-tuning."""
    scratch: bool = False
    """Also train the same model from scratch, to compare."""
    cpus_each: float = 1.0
    """CPUs of a trial."""
    gpus_each: float = 0.0
    """GPUs of a trial; several trials share one with less than 1."""
    at_once: int = 0
    """Trials at once, or runs of --asha; 0 for as many as there is room for. More makes a cluster grow that can."""
    processes: str = "1"
    """Processes of a task that is a run of its own, such as imagenet; or the fewest and the most of them, as in 2:8."""
    asha: bool = False
    """Train the learning rates of such a task to the end only while they do well on the pictures to choose by."""
    retries: int = 2
    """How often a trial that failed is tried again."""
    claim_seconds: float = 30.0
    """For how long a trial is left alone that another sweep had in hand when it was killed, beside 30 s for clocks."""
    wait_for_resources: float = 0.0
    """Seconds that a cluster which grows on demand is given to show what it can have."""
    spare: bool = False
    """Use what nobody else does, and give it up while another job waits for it."""
    tracking_uri: str = ""
    """Where MLflow is; the environment's MLFLOW_TRACKING_URI if empty, else a file in ~/.local/share/vitscale."""


def main(argv: list[str]) -> None:
    """Check what can be checked, then do what is missing; or show what has come of it."""
    if argv[:1] == ["report"]:
        from pipeline.insight.transfer import report_main

        report_main(argv[1:])
        return
    arguments = parse(Arguments, argv)
    counts(arguments.processes)
    _refuse_nonsense(arguments)
    from pipeline.track.log import Trials
    from pipeline.track.runs import check, tracking_uri
    from pipeline.transfer import protocols, sweep, tasks
    from pipeline.transfer.features import started
    from pipeline.transfer.wanted import wanted_of
    from shards.storage import Folder

    source = started(arguments.checkpoint)
    chosen, protocol = tasks.named(arguments.tasks), protocols.named(arguments.protocol)
    data, folder = Folder(arguments.data).absolute, Folder(Folder(arguments.to).absolute)
    sets = {task: tasks.find(data, task) for task in chosen}
    for odd in (odd for task, of_task in sets.items() for odd in tasks.check(task, of_task)):
        print(f"fine-tuning: {odd}", flush=True)
    wanted = wanted_of(
        protocol,
        sets,
        source,
        starts=("pretrained", "scratch") if arguments.scratch else ("pretrained",),
        rates=arguments.rates,
        seeds=arguments.seeds,
    )
    folder.check_writable()
    uri = tracking_uri(arguments.tracking_uri or None)
    check(uri)
    told_of = source.about.get("metrics", {})
    run = source.folder.absolute.partition("/milestones/")[0].removesuffix("/export")
    about = {"checkpoint.folder": source.folder.absolute, "checkpoint.steps": told_of.get("steps", "")}
    spent = {name: told_of[name] for name in ("exaflops",) if name in told_of}
    told = Logged(Trials(uri, source.digest, run), about, spent)
    results = sweep.Results(folder)
    results.describe(source)
    try:
        parts, errors = _all(arguments, wanted, source.folder.absolute, data, results, uri, told)
    finally:
        left = told.close()
    known = results.load()
    done, total = sum(len(part.trials(known).keys() & known.keys()) for part in parts), sum(p.count for p in parts)
    print(f"fine-tuning: {done} of {total} trials have results; {folder.absolute}/results")
    if left:
        raise RuntimeError(f"MLflow at {uri} has not taken {left} results: start again when it is back; none is lost")
    if errors:
        raise RuntimeError(f"{len(errors)} trials failed: " + "; ".join(errors.values()))


def _all(
    arguments: Arguments, wanted: "Wanted", source: str, data: str, results: "Results", uri: str, told: "Logged"
) -> tuple[list["Wanted"], dict[str, str]]:
    """Do what is missing; what was wanted, in parts, and what failed.

    With --asha the rate of a run of its own is searched when all small tasks are done; one that is found is tested.
    """
    runs = [choice for choice, trials in wanted.choosing.items() if {t.kind for t in trials.values()} == {"run"}]
    if not (arguments.asha and runs):
        return [wanted], _reconcile(arguments, wanted, source, data, results, uri, told)
    names = {name for name, _ in runs}
    parts = [replace(wanted, tasks=tuple(task for task in wanted.tasks if task.name not in names))]
    errors = _reconcile(arguments, parts[0], source, data, results, uri, told)
    for task, start in ((task, start) for task in wanted.tasks for start in wanted.starts if task.name in names):
        part = replace(wanted, tasks=(task,), starts=(start,))
        parts.append(part)
        try:
            rate = _searched(arguments, part, source, data, results, uri, told)
        except Exception as error:  # whatever it is, the other tasks go on
            errors[f"{task.name} {start}"] = " ".join(str(error).split()) or type(error).__name__
            print(f"fine-tuning: failed: {errors[f'{task.name} {start}']}", flush=True)
            continue
        parts[-1] = replace(part, rates={task.name: (rate,)})
        errors |= _reconcile(arguments, parts[-1], source, data, results, uri, told)
    return parts, errors


def _searched(
    arguments: Arguments, wanted: "Wanted", source: str, data: str, results: "Results", uri: str, told: "Logged"
) -> float:
    """The learning rate of the one task."""
    from pipeline.search import Search, search
    from shards.cluster import connect

    connect()
    ((_, trials),) = wanted.choosing.items()
    cpus, processes = max(1, int(arguments.cpus_each)), counts(arguments.processes)
    return search(
        Search(trials, source, data, results.place, processes, cpus, uri),
        results,
        at_once=arguments.at_once,
        retries=arguments.retries,
        claim_seconds=arguments.claim_seconds,
        finished=told.add,
    )


def _refuse_nonsense(arguments: Arguments) -> None:
    if arguments.seeds < 1:
        raise ValueError(f"seeds is {arguments.seeds}; at least 1 is needed")
    if arguments.cpus_each <= 0 or arguments.gpus_each < 0:
        raise ValueError("a trial needs more than 0 CPUs, and 0 GPUs or more")
    if arguments.gpus_each > 1:
        raise ValueError(f"a trial uses one GPU at most, not {arguments.gpus_each:g}; --processes is for larger tasks")
    if bad := [rate for rate in arguments.rates if not 0 < rate < math.inf]:
        raise ValueError(f"{bad[0]:g} is no learning rate")


def _reconcile(
    arguments: Arguments, wanted: "Wanted", source: str, data: str, results: "Results", uri: str, told: "Logged"
) -> dict[str, str]:
    from pipeline.transfer import sweep
    from pipeline.transfer.spare import Watch
    from pipeline.transfer.workers import Resources
    from shards.cluster import connect, require

    resources = Resources(arguments.cpus_each, arguments.gpus_each)
    known = results.load()
    if missing := wanted.missing(known):
        connect()
        if any(trial.kind == "memory" for trial in missing):
            require(resources.needed, "a trial", wait_s=arguments.wait_for_resources)
    return sweep.sweep(
        wanted,
        source,
        data,
        results,
        resources=resources,
        retries=arguments.retries,
        most=arguments.at_once or None,
        told=sweep.Told(Lines(), told.add, lambda line: print(f"fine-tuning: failed: {line}", flush=True)),
        claim_seconds=arguments.claim_seconds,
        spare=Watch(resources.needed) if arguments.spare else None,
        large=_large(counts(arguments.processes), arguments.cpus_each, uri),
    )


def _large(processes: Sequence[int], cpus_each: float, uri: str) -> "Large":
    """Trials that are runs of their own, on so many processes, with their curves in MLflow."""

    def perform(trial: Any, source: str, data: str, folder: Any) -> dict[str, Any]:
        from pipeline import large

        return large.perform(
            trial, source, data, folder, processes=processes, cpus_each=max(1, int(cpus_each)), uri=uri
        )

    return perform


class Lines:
    """How far the sweep is, as a line now and then, and none while nothing changes."""

    def __init__(
        self, say: Callable[[str], None] = lambda line: print(line, flush=True), *, every: float | None = None
    ) -> None:
        from shards.progress import pace

        self._say, self._every, self._said = say, pace() if every is None else every, time.monotonic()
        self._last: State | None = None

    def __call__(self, state: "State") -> None:
        """Print how far the sweep is, unless a line has just been printed or nothing has changed since.

        An expected end that moves is no change: it does so at every look.
        """
        seen = replace(state, left=0.0)
        if time.monotonic() - self._said >= self._every and seen != self._last:
            self._said, self._last = time.monotonic(), seen
            self._say(line(state, time.time()))


def line(state: "State", now: float) -> str:
    """A sweep in a line, with its expected end after `now`, in seconds since 1970."""
    from shards.progress import duration

    share = 100 * state.done // max(state.total, 1)
    parts = [f"fine-tuning: {state.done:,} of {state.total:,} trials ({share} %)", f"{state.running} running"]
    parts += [f"{state.failed} failed"] if state.failed else []
    parts += [f"{state.waiting} in another sweep's hands"] if state.waiting else []
    if state.paused:
        return ", ".join([*parts, "nothing runs while others need the cluster"])
    if math.isfinite(state.left):
        end = time.strftime("%a %H:%M", time.localtime(now + state.left))
        parts.append(f"{duration(state.left)} left, to {end}")
    return ", ".join(parts)


class Logged:
    """Results on their way to MLflow, for which the sweep does not wait."""

    def __init__(self, trials: "Trials", checkpoint: dict[str, Any], spent: dict[str, float]) -> None:
        self._trials, self._checkpoint, self._spent = trials, checkpoint, spent
        self._coming: SimpleQueue[tuple[str, dict[str, Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._log, daemon=True, name="mlflow")
        self._thread.start()

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Log a trial's result, soon."""
        self._coming.put((name, result))

    def close(self) -> int:
        """Log what waits; how many results MLflow does not take now."""
        self._coming.put(None)
        self._thread.join()
        if not self._coming.empty():  # the thread has failed: of what, this says
            self._log()
        return self._trials.flush()

    def _log(self) -> None:
        from pipeline.transfer.sweep import metrics, params

        while coming := self._coming.get():
            name, result = coming
            said, measured = params(result), metrics(result)
            if said["start"] == "pretrained":
                said |= self._checkpoint  # which decides nothing, but is what people ask for
                measured |= self._spent  # by the pretraining, to draw accuracy against
            title = " ".join(str(said[key]) for key in ("task", "start", "split", "lr", "seed"))
            self._trials.add(name, title, said, measured)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
