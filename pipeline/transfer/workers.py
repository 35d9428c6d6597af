"""Ray actors that do trials: each keeps the backbone, the pictures and the features it has for the next trial.

An actor that has failed of anything but bad input is replaced, as one that died is, since nobody knows in what state a
failure leaves a GPU.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
import torch
from ray.exceptions import RayActorError, RayError

from pipeline.transfer.finetune import Trial
from pipeline.transfer.results import Result, Results
from pipeline.transfer.spare import MARK, Watch, room
from shards.storage import Folder

ROOM_SECONDS = 2.0
"""From one look at the cluster to the next."""

Group = Mapping[str, Trial]
"""Trials by name that are done in one go."""


class Perform(Protocol):
    """What an actor does with the trials of a group; their results come one by one."""

    def __call__(
        self, trials: Sequence[Trial], source: str, data: str, *, threads: int
    ) -> Iterable[tuple[Trial, Result]]: ...


@dataclass(frozen=True)
class Place:
    """Where trials find the model and the pictures, and leave their results."""

    source: str
    data: str
    folder: str


@dataclass(frozen=True)
class Resources:
    """What one actor takes of the cluster; with less than one GPU each, several share it."""

    cpus: float = 1.0
    gpus: float = 0.0

    @property
    def needed(self) -> dict[str, float]:
        """As Ray names them."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    @property
    def threads(self) -> int:
        """Threads that an actor computes with; the last bits of a result may depend on it."""
        return max(1, int(self.cpus))


@dataclass(frozen=True)
class Outcome:
    """What came of a group: its results, and where some are missing, why."""

    group: Group
    results: Mapping[str, Result]
    error: str = ""
    hopeless: bool = False
    """Whether another try would fail the same way."""
    died: bool = False
    """Whether the actor, or its node, went down."""
    sound: bool = True
    """Whether the actor is fit for another group."""


class Worker:
    """What an actor is: it does a group of trials after the other, and stores each result as soon as it is there."""

    def __init__(self, place: Place, resources: Resources, perform: Perform) -> None:
        self._place, self._resources, self._perform = place, resources, perform
        self._results = Results(Folder(place.folder))
        torch.set_num_threads(resources.threads)
        if 0 < resources.gpus < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(resources.gpus)

    def ready(self) -> None:
        """Returns when the actor has been made."""

    def do(self, trials: Group) -> Outcome:
        """Results of those that went well; where one has not, what was wrong."""
        done: dict[str, Result] = {}
        names = {trial: name for name, trial in trials.items()}
        source, data = self._place.source, self._place.data
        try:
            for trial, result in self._perform(list(names), source, data, threads=self._resources.threads):
                done[names[trial]] = self._results.store(names[trial], result)
        except torch.OutOfMemoryError as error:
            return Outcome({}, done, f"{self._too_small()} ({_line(error)})", hopeless=True, sound=False)
        except Exception as error:  # whatever it is, the other trials go on
            return Outcome({}, done, _line(error), sound=isinstance(error, (ValueError, OSError)))
        return Outcome({}, done)

    def _too_small(self) -> str:
        share = f"{self._resources.gpus:g} of a GPU"
        return f"it does not fit into the memory of {share}: give each trial more with --gpus-each"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@dataclass(eq=False)
class _Hand:
    """An actor as the driver sees it."""

    actor: Any
    waits_for: Any
    """What it will answer: first that it is there, then the outcome of a group; None when it has nothing to do."""
    group: Group = field(default_factory=dict)
    task: str = ""
    """Of which it has the pictures."""
    there: bool = False
    """Whether it has been made."""


class Pool:
    """As many actors as there is work and the cluster has room for, or `most` if that is given.

    With `spare` no more than what nobody else uses has room for.
    """

    def __init__(
        self, place: Place, resources: Resources, perform: Perform, most: int | None, spare: Watch | None
    ) -> None:
        self._resources, self._most, self._spare = resources, most, spare
        options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_restarts": 0}
        if spare:
            options["label_selector"] = MARK
        kind: Any = ray.remote(**options)(Worker)
        self._start: Callable[[], Any] = lambda: kind.remote(place, resources, perform)
        self._hands: list[_Hand] = []
        self._limit, self._looked = 0, -math.inf

    @property
    def at_work(self) -> list[Group]:
        """What is being done."""
        return [hand.group for hand in self._hands if hand.group]

    @property
    def size(self) -> int:
        """How many actors there are, those on their way too."""
        return len(self._hands)

    def grow(self, groups: int) -> None:
        """Have actors for so many groups beside those at work, as far as there is room."""
        if (now := time.monotonic()) - self._looked > ROOM_SECONDS:
            self._looked, self._limit = now, self._room()
        limit = self._limit if self._most is None else min(self._most, self._limit)
        free = sum(not hand.group for hand in self._hands)
        for _ in range(min(groups - free, limit - len(self._hands))):
            actor = self._start()
            self._hands.append(_Hand(actor, actor.ready.remote()))

    def _room(self) -> int:
        """How many actors there may be."""
        if self._spare:
            coming = sum(not hand.there for hand in self._hands)
            return len(self._hands) + max(0, self._spare.room() - coming)
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        # One at least, or as many as were asked for: a cluster may grow when somebody waits.
        return max(1, self._most or 0, room(self._resources.needed, nodes))

    def hand_out(self, choose: Callable[[str, set[str]], Group | None]) -> None:
        """Ask for a group for each actor that has none, given its task and those of all, until there is none."""
        for hand in self._hands:
            if hand.waits_for is None and (group := choose(hand.task, {other.task for other in self._hands})):
                hand.group, hand.task = group, next(iter(group.values())).task.name
                hand.waits_for = hand.actor.do.remote(dict(group))

    def wait(self, seconds: float) -> Iterator[Outcome]:
        """What has ended, after `seconds` at most."""
        waiting = {hand.waits_for: hand for hand in self._hands if hand.waits_for is not None}
        if not waiting:
            time.sleep(seconds)
            return
        if ray.wait(list(waiting), num_returns=1, timeout=seconds)[0]:
            for reference in ray.wait(list(waiting), num_returns=len(waiting), timeout=0)[0]:
                if outcome := self._ended(waiting[reference]):
                    yield outcome

    def _ended(self, hand: _Hand) -> Outcome | None:
        group, hand.group, reference, hand.waits_for = hand.group, {}, hand.waits_for, None
        try:
            found: Any = ray.get(reference)
            hand.there = True
        except RayActorError as error:
            self._hands.remove(hand)
            return Outcome(group, {}, f"the process that did it died: {_line(error)}", died=True)
        except RayError as error:
            self._drop(hand)
            return Outcome(group, {}, _line(error))
        if found and not found.sound:
            self._drop(hand)
        return Outcome(group, found.results, found.error, found.hopeless) if found else None

    def _drop(self, hand: _Hand) -> None:
        ray.kill(hand.actor)
        self._hands.remove(hand)

    def close(self) -> list[Group]:
        """End all actors; returns what they had in hand."""
        left = self.at_work
        for hand in list(self._hands):
            self._drop(hand)
        return left


@dataclass
class Queue:
    """Groups that wait, by task."""

    waiting: dict[str, list[Group]] = field(default_factory=dict)

    def add(self, groups: Iterable[Group]) -> None:
        """Put groups at the end."""
        for group in groups:
            self.waiting.setdefault(next(iter(group.values())).task.name, []).append(group)

    def __len__(self) -> int:
        return sum(len(groups) for groups in self.waiting.values())

    def __iter__(self) -> Iterator[Group]:
        for groups in self.waiting.values():
            yield from groups

    def take(self, task: str, taken: set[str]) -> Group | None:
        """For an actor that has this task's pictures: a group of it, else of a task nobody has, else the longest row.

        None where nothing waits.
        """
        if not self.waiting:
            return None
        free = [name for name in self.waiting if name not in taken]
        name = task if task in self.waiting else max(free or self.waiting, key=lambda name: len(self.waiting[name]))
        groups = self.waiting[name]
        group = groups.pop(0)
        if not groups:
            del self.waiting[name]
        return group
