"""What a run has cost, and what of that was worth it: arithmetic over a clock that is handed in.

Time is counted once for each process, and each stretch of it under one kind, so the kinds add up to the whole. What a
start did after its last checkpoint has to be done again when it dies: all of it is counted as replayed.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shards.storage import Folder

PRODUCTIVE, WAITING, CHECKPOINTING = "productive", "waiting", "checkpointing"
RESTARTING, REPLAYED = "restarting", "replayed"
KINDS = (PRODUCTIVE, WAITING, CHECKPOINTING, RESTARTING, REPLAYED)
NOTE_SECONDS = 60.0

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Account:
    """What has been spent: seconds of each process by kind, and steps, those that were made again each time."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    steps: int = 0

    @property
    def total(self) -> float:
        """Seconds of all kinds."""
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        """The same in hours."""
        return self.total / 3600

    def share(self, kind: str) -> float:
        """The share of a kind in the total."""
        return self.seconds[kind] / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As it is kept."""
        return {"seconds": self.seconds, "steps": self.steps}

    @staticmethod
    def from_dict(kept: dict[str, Any]) -> "Account":
        """As `to_dict` gave it."""
        return Account(dict(kept["seconds"]), kept["steps"])


def resumed(kept: Account, last: Account) -> Account:
    """The account of a start that goes on from where `kept` was written, after one that had come to `last`.

    All between the two is replayed, but for the time in which nothing was done that could be lost. A `last` from before
    `kept` says nothing.
    """
    last = max(kept, last, key=lambda account: (account.total, account.steps))
    spent = {kind: last.seconds[kind] - kept.seconds[kind] for kind in KINDS}
    seconds = {**kept.seconds, RESTARTING: kept.seconds[RESTARTING] + spent.pop(RESTARTING)}
    seconds[REPLAYED] += sum(spent.values())
    return Account(seconds, last.steps)


class Ledger:
    """Counts for `processes` processes, by a clock in seconds.

    A start counts as restarting until it has done its first step, in which models are compiled and caches filled.
    """

    def __init__(self, processes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.processes, self._clock = processes, clock
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._steps = 0
        self._kind, self._since = RESTARTING, clock()

    def account(self) -> Account:
        """What has been spent by now."""
        self._turn(self._kind)
        return Account(dict(self._seconds), self._steps)

    def stepped(self) -> None:
        """A step is done."""
        self._turn(PRODUCTIVE)
        self._steps += 1

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """What is done inside counts as `kind`; while the run is restarting, all is restarting."""
        within = self._kind
        self._turn(kind if within == PRODUCTIVE else within)
        try:
            yield
        finally:
            self._turn(within)

    def waiting(self, things: Iterator[Thing]) -> Iterator[Thing]:
        """The things, as they come; the time until each is there counts as waiting for data."""
        while True:
            with self.during(WAITING):
                try:
                    thing = next(things)
                except StopIteration:
                    return
            yield thing

    def go_back(self, kept: Account) -> None:
        """The run goes on from where `kept` was written: what it has done since is replayed."""
        account = resumed(kept, self.account())
        self._seconds, self._steps, self._kind = dict(account.seconds), account.steps, RESTARTING

    def add(self, before: Account) -> None:
        """Add what earlier starts have spent."""
        for kind in KINDS:
            self._seconds[kind] += before.seconds[kind]
        self._steps += before.steps

    def _turn(self, kind: str) -> None:
        now = self._clock()
        self._seconds[self._kind] += (now - self._since) * self.processes
        self._kind, self._since = kind, now


def metrics(account: Account, exaflops: float) -> dict[str, float]:
    """As MLflow has it; `exaflops` are those of all steps of the account."""
    shares = {f"ledger_{kind}": account.share(kind) for kind in KINDS[1:]}
    goodput = {"ledger_goodput": account.share(PRODUCTIVE), "ledger_gpu_hours": account.hours}
    return {**goodput, **shares, "ledger_exaflops": exaflops}


def line(account: Account, exaflops: float, unit: str = "GPU-hours") -> str:
    """As a person reads it at the end of a run."""
    share = {kind: f"{100 * account.share(kind):.1f} %" for kind in KINDS}
    return (
        f"goodput {share[PRODUCTIVE]} of {account.hours:,.3g} {unit}: {share[WAITING]} waiting for data, "
        f"{share[CHECKPOINTING]} checkpointing, {share[RESTARTING]} restarting, {share[REPLAYED]} replayed; "
        f"{exaflops:,.3g} exaFLOPs"
    )


class Notes:
    """What a start has spent, written down now and then in its own file, so that it is known when it dies."""

    def __init__(self, folder: Folder, attempt: str, every: float = NOTE_SECONDS) -> None:
        self.folder, self.name, self.every = folder, f"{attempt}.json", every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._writing: Future[None] | None = None
        self._written = time.monotonic()

    def keep(self, account: Callable[[], Account]) -> None:
        """Write the account down if that is due, beside the training; a note that cannot be written is left out."""
        now = time.monotonic()
        if now - self._written >= self.every and (self._writing is None or self._writing.done()):
            self._written = now
            self._writing = self._thread.submit(self._write, account())

    def close(self, account: Account) -> None:
        """Write the last one, and end."""
        self._thread.submit(self._write, account)
        self._thread.shutdown()

    def _write(self, account: Account) -> None:
        self.folder.write(self.name, json.dumps(account.to_dict()).encode())


def noted(folder: Folder) -> Account | None:
    """What the last start has noted, which began with all that was spent before it; None where nothing is."""
    notes = (Account.from_dict(json.loads(folder.read(name))) for name in folder.sizes() if name.endswith(".json"))
    return max(notes, key=lambda account: account.total, default=None)
