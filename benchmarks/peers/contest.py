"""Contests: rounds in which contestants take turns, ratios over the rounds and their spread.

A ratio is taken within a round, its figure is the median over the rounds, and its spread the smallest and the largest
of them. Where these are more than 15 % of the median apart the ratio is called noisy: the machine had other work, or
the rounds are too short. The second half is what the contestants of `feed.py` have in common.
"""

import json
import os
import random
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import psutil

NOISY = 0.15
"""Spread of a ratio, as a share of its median, above which it is noisy."""

Needed = TypeVar("Needed")


def take_turns(
    contestants: Mapping[str, Callable[[int], Needed]], rounds: int, *, warm: int = 1
) -> dict[str, list[Needed]]:
    """Let each contestant take a turn in every round, in an order drawn anew for each; what each turn needed.

    A turn is given its number. The first `warm` rounds are taken, too, but not returned.
    """
    needed: dict[str, list[Needed]] = {name: [] for name in contestants}
    draw = random.Random(0)
    for number in range(warm + rounds):
        for name in draw.sample(sorted(contestants), len(contestants)):
            found = contestants[name](number)
            if number >= warm:
                needed[name].append(found)
    return needed


def divide_rounds(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratio of two contestants in each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


class Spread(NamedTuple):
    """A ratio over its rounds."""

    least: float
    median: float
    most: float
    rounds: int

    @property
    def noisy(self) -> bool:
        """Whether the rounds differ by more than 15 % of the median; of one round nobody knows."""
        return self.rounds < 2 or self.most - self.least > NOISY * abs(self.median)


def measure_spread(values: Sequence[float]) -> Spread:
    return Spread(min(values), median(values), max(values), len(values))


def report(ratios: Mapping[str, Sequence[float]], figures: Mapping[str, Any] | None = None) -> None:
    """Print a line for each ratio, whose values in the rounds are given, and the last line, `summarise` as JSON."""
    for name, values in ratios.items():
        least, middle, most, rounds = spread = measure_spread(values)
        told = f"{name:<40} min {least:.3f}, median {middle:.3f}, max {most:.3f} of {rounds} rounds"
        print(told + (", noisy" if spread.noisy else ""), flush=True)
    print(json.dumps(summarise(ratios, figures or {})), flush=True)


def summarise(ratios: Mapping[str, Sequence[float]], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures, the median of each ratio, `spread` (least and most of each), and `noisy`, the names of those that are.

    Floats are rounded to three digits behind the point.
    """
    spreads = {name: measure_spread(values) for name, values in ratios.items()}
    return {
        **{name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()},
        **{name: round(one.median, 3) for name, one in spreads.items()},
        "spread": {name: [round(one.least, 3), round(one.most, 3)] for name, one in spreads.items()},
        "noisy": [name for name, one in spreads.items() if one.noisy],
    }


# --- the contestants of feed.py -------------------------------------------------------------------------------------

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
