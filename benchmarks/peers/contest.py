"""What every contestant is: something that reads all pictures of a set once a turn; and how its time is taken."""

import os
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

WORKERS, BATCH = 2, 64
TARS, FILES = "tars", "files"
"""Where a set's folder has what more than one contestant reads."""
WRITE = "write"
"""The part in which a contestant writes the pictures in its own form."""
PASSES, RAW_BATCH = 20, 256
"""Passes over the set in one turn, where one takes hardly any time; and how many pictures are asked for at a time."""

Turn = Callable[[int], int]
"""Reads a set once, in an order that depends on the number of the turn, and returns how many pictures came."""


class Task(NamedTuple):
    """Which part of the benchmark, from which folder (or URL), with room for what is kept meanwhile."""

    part: str
    pictures: Path
    url: str
    aside: Path


class Spent(NamedTuple):
    """What a turn took, of the clock and of the processors."""

    wall: float
    cpu: float
    pictures: int


def timed(turn: Turn, number: int) -> Spent:
    """Take a turn's time: the CPU time is this process's and that of all its children, living or not."""
    cpu, wall = processors(), time.perf_counter()
    pictures = turn(number)
    return Spent(time.perf_counter() - wall, processors() - cpu, pictures)


def processors() -> float:
    """CPU seconds of this process and all that descend from it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    living = [child.cpu_times() for child in psutil.Process(os.getpid()).children(recursive=True)]
    return sum(one.ru_utime + one.ru_stime for one in used) + sum(sum(child[:4]) for child in living)


def samples(batches: Iterable[Any]) -> int:
    """Pictures in all batches, whose first entry is a tensor of them."""
    return sum(len(batch[0]) for batch in batches)


def loader(dataset: Any, **more: Any) -> Any:
    """A DataLoader with two workers that live as long as it does."""
    from torch.utils.data import DataLoader

    return DataLoader(dataset, num_workers=WORKERS, persistent_workers=True, **more)
