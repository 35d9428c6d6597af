"""Fine-tune what is pretrained, again and again: every milestone of every run, to the same tasks.

    python jobs/schedule.py --runs RUNS --tasks vtab,cifar --data SETS --to RESULTS --on-milestone
    python jobs/schedule.py --runs RUNS --tasks vtab,cifar --data SETS --to RESULTS --cron "0 3 * * *"
    python jobs/schedule.py --runs RUNS --tasks vtab,cifar --data SETS --to RESULTS

RUNS is what was pretraining's --to: the folder of the runs, of which there may be none yet. The first goes on for
ever, and starts when a run has committed a milestone; the second at the times of a cron expression, and both may be
given; the third does what is missing now, and ends. Each trial that has a result in RESULTS is left alone.

It is done by jobs/finetune.py, on what the Ray cluster can spare: while training waits for what a trial uses, nothing
is fine-tuned. Started twice with the same words, the second one leaves the work to the first as long as that one lives.
"""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import parse, run

if TYPE_CHECKING:
    from pipeline.transfer.lease import Lease
    from pipeline.transfer.protocols import Protocol
    from pipeline.transfer.schedule import Book, Cron, Milestone
    from pipeline.transfer.tasks import Task
    from shards.manifest import ShardSet
    from shards.storage import Folder

LEASE_SECONDS = 60.0
POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class Arguments:
    """What is to be found out of each milestone, when, and on what."""

    runs: str
    """Folder of the runs: --to of pretraining."""
    data: str
    """Folder that holds the tasks' shard sets, as DATA/SET/SPLIT."""
    to: str
    """Folder for the results, of all milestones and tasks."""
    tasks: str
    """Tasks, or groups of them such as vtab or cifar, with commas between them."""
    protocol: str = "linear"
    """How it is done: linear, fewshot, vit, vit-vtab and others."""
    rates: tuple[float, ...] = ()
    """Learning rates to choose from; the protocol's if none are given."""
    seeds: int = 1
    """How often each task is tested, each time by another fine-tuning."""
    cron: str = ""
    """When to look at everything, and try again what failed: minute hour day month weekday, as in "0 3 * * *"."""
    timezone: str = "UTC"
    """Time zone of --cron, such as Europe/Berlin."""
    on_milestone: bool = False
    """Start whenever a run has committed a milestone."""
    every: float = 60.0
    """Seconds from one look for new milestones to the next."""
    spare: bool = True
    """Give way to whoever else waits for resources of the cluster."""
    cpus_each: float = 1.0
    """CPUs of a trial."""
    gpus_each: float = 0.0
    """GPUs of a trial; several trials share one with less than 1."""
    retries: int = 2
    """How often a trial that failed is tried again."""
    tracking_uri: str = ""
    """Where MLflow is; the environment's MLFLOW_TRACKING_URI if empty, else a file in ~/.local/share/vitscale."""


def main(argv: list[str]) -> None:
    """Check what can be checked, then go on for ever, or do what is missing."""
    arguments = parse(Arguments, argv)
    _refuse_nonsense(arguments)
    from pipeline.track.runs import check, tracking_uri
    from pipeline.transfer import protocols, schedule, tasks
    from shards.storage import Folder

    cron = schedule.Cron(arguments.cron, arguments.timezone) if arguments.cron else None
    chosen, protocol = tasks.named(arguments.tasks), protocols.named(arguments.protocol)
    if arguments.spare and (runs := [task.name for task in chosen if task.kind == "run"]):
        raise ValueError(f"{', '.join(runs)} does not give way to training while it runs: leave it out, or --no-spare")
    folder = Folder(Folder(arguments.to).absolute)
    for task in chosen:
        for line in tasks.check(task, tasks.find(arguments.data, task)) or ():
            say(line)
    folder.check_writable()
    check(tracking_uri(arguments.tracking_uri or None))
    if not Folder(arguments.runs).folders():
        say(f"{Folder(arguments.runs).absolute} holds no runs yet")
    book = _book(arguments, chosen, protocol, folder)
    signal.signal(signal.SIGTERM, _interrupt)
    Scheduler(arguments, folder, book, _sleep).go(cron)
    if book.given_up:
        raise RuntimeError(f"{len(book.given_up)} milestones failed: {', '.join(sorted(book.given_up))}")


def say(line: str) -> None:
    """Print a line now."""
    print(f"schedule: {line}", flush=True)


def _refuse_nonsense(arguments: Arguments) -> None:
    if arguments.seeds < 1:
        raise ValueError(f"seeds is {arguments.seeds}; at least 1 is needed")
    if arguments.cpus_each <= 0 or not 0 <= arguments.gpus_each <= 1:
        raise ValueError("a trial needs more than 0 CPUs, and no more than one GPU")
    if bad := [rate for rate in arguments.rates if not 0 < rate < math.inf]:
        raise ValueError(f"{bad[0]:g} is no learning rate")
    if not 0 < arguments.every <= 86400:
        raise ValueError(f"--every is {arguments.every:g}: seconds, more than 0 and a day at most, are needed")
    if arguments.timezone != "UTC" and not arguments.cron:
        raise ValueError(f"--timezone {arguments.timezone} says nothing without --cron")


def _book(arguments: Arguments, chosen: Sequence["Task"], protocol: "Protocol", folder: "Folder") -> "Book":
    from pipeline.transfer import schedule, tasks
    from pipeline.transfer.results import Results
    from pipeline.transfer.wanted import Wanted, wanted_of
    from shards.storage import Folder

    def wanted(milestone: "Milestone") -> Wanted:
        sets: dict[Task, dict[str, ShardSet]] = {task: tasks.find(arguments.data, task) for task in chosen}
        return wanted_of(protocol, sets, milestone.model, rates=arguments.rates, seeds=arguments.seeds)

    return schedule.Book(schedule.Runs(Folder(arguments.runs), say), Results(folder), wanted, say)


class Scheduler:
    """Does what is missing when it is time to; `wait` waits for so many seconds, and says whether to stop."""

    def __init__(self, arguments: Arguments, folder: "Folder", book: "Book", wait: Callable[[float], bool]) -> None:
        self.arguments, self.folder, self.book, self._wait = arguments, folder, book, wait
        self.stopped = False
        self.left_to = ""

    @property
    def ends(self) -> bool:
        """Whether it does what is missing now, and that is all."""
        return not (self.arguments.cron or self.arguments.on_milestone)

    def go(self, cron: "Cron | None") -> None:
        """Until told to stop, or once if there is nothing to wait for."""
        from pipeline.transfer.schedule import turns

        every = self.arguments.every if self.arguments.on_milestone else None
        if cron:
            say(f"looks at everything next at {cron.after(datetime.now(UTC)):%Y-%m-%d %H:%M %Z}")
        for everything in turns(cron, every, lambda: datetime.now(UTC), self.wait):
            self.reconcile(everything)
            if self.stopped:
                return

    def wait(self, seconds: float) -> bool:
        """Wait; whether to stop."""
        self.stopped = self.stopped or self._wait(seconds)
        return self.stopped

    def reconcile(self, everything: bool) -> None:
        """Do what is missing, of all milestones or of new ones; nothing where another scheduler is at it."""
        from pipeline.transfer.lease import holder, take
        from pipeline.transfer.schedule import words

        try:
            if not (due := self.book.due(everything)):
                if self.ends:
                    say("no results are missing")
                return
            place = self.folder / "schedules"
            if lease := take(place, self._name, LEASE_SECONDS):
                with lease:
                    say(f"results are missing of {words(due)}")
                    self._all(due, lease)
            elif (other := holder(place, self._name)) and other != self.left_to:
                self.left_to = other
                say(f"{words(due)} left to {other}, which is at it")
        except OSError as error:  # of a store that is away for longer than it is waited for
            if self.ends:
                raise
            say(f"looks again later: {error}")

    @property
    def _name(self) -> str:
        """Of the lease: equal words, equal schedules."""
        words = {name: getattr(self.arguments, name) for name in ("tasks", "protocol", "rates", "seeds")}
        places = {name: type(self.folder)(getattr(self.arguments, name)).absolute for name in ("runs", "data")}
        return sha256(json.dumps(words | places, sort_keys=True).encode()).hexdigest()[:12]

    def _all(self, due: Sequence["Milestone"], lease: "Lease") -> None:
        for milestone in due:
            # Another scheduler may have been at it before this one had the lease.
            if not self.book.is_due(milestone):
                continue
            code = self._finetune(milestone, lease)
            if self.stopped:
                return
            if not lease.held:
                say("ends its sweep, as it could not tell others in time that it is at work: looks again later")
                return
            if code:
                self.book.give_up(milestone, f"jobs/finetune.py has failed (exit code {code})")
            elif left := self.book.missing(milestone):
                self.book.give_up(milestone, f"{left} trials have no result")
            else:
                self.book.done(milestone)

    def _finetune(self, milestone: "Milestone", lease: "Lease") -> int:
        """The exit code of the sweep, which is ended when this process is told to stop or has lost the lease."""
        # A driver of its own: what one sweep leaves behind or fails of does not concern the next.
        process = subprocess.Popen([sys.executable, *self.command(milestone)])
        try:
            while process.poll() is None and lease.held and not self.wait(POLL_SECONDS):
                pass
        finally:
            _end(process)
        return process.returncode

    def command(self, milestone: "Milestone") -> list[str]:
        """The words that do it."""
        arguments = self.arguments
        told = {
            "--checkpoint": milestone.model.folder.absolute,
            "--data": arguments.data,
            "--to": self.folder.absolute,
            "--tasks": arguments.tasks,
            "--protocol": arguments.protocol,
            "--seeds": arguments.seeds,
            "--cpus-each": arguments.cpus_each,
            "--gpus-each": arguments.gpus_each,
            "--retries": arguments.retries,
        }
        words = [str(Path(__file__).with_name("finetune.py")), *(str(word) for pair in told.items() for word in pair)]
        words += ["--rates", *map(str, arguments.rates)] if arguments.rates else []
        words += ["--tracking-uri", arguments.tracking_uri] if arguments.tracking_uri else []
        return [*words, "--spare" if arguments.spare else "--no-spare"]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a sweep, if it has not ended: it gives back what it has claimed, unless that takes too long."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
