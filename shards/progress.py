"""Lines that say how far something is: what, how much of how much, how fast, how long still."""

import os
import re
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

EVERY = "VITSCALE_PROGRESS_SECONDS"
_LINE = re.compile(r"(?P<what>[^:]+): (?P<done>[\d,]+) of (?P<total>[\d,]+) (?P<unit>\S+) \(\d+ %\)")


def pace() -> float:
    """Read the least number of seconds from one line to the next from the environment; 5 where it has none."""
    return float(os.environ.get(EVERY, "5"))


class Progress:
    """Say how far `what` is, at most one line every `every` seconds, and none while nothing changes.

    Whole lines, since what a job prints is mostly read through `ray job logs`, where nothing can be rewritten.
    """

    def __init__(
        self, what: str, total: int, unit: str, *, every: float | None = None, say: Callable[[str], None] | None = None
    ) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, pace() if every is None else every
        self.say = say or _print
        self._began = self._said = time.monotonic()
        self._start: int | None = None
        self._last: int | None = None

    def update(self, done: int, **more: str) -> None:
        """`done` of the total are done by now; `more` goes to the end of the line as `name value`.

        What was done before the first call does not count for the rate.
        """
        now = time.monotonic()
        if self._start is None:
            self._start, self._began = done, now
        if now - self._said < self.every or done == self._last:
            return
        self._said, self._last = now, done
        rate = (done - self._start) / max(now - self._began, 1e-9)
        left = f"{duration((self.total - done) / rate)} left" if rate > 0 else "waiting"
        share = 100 * done // max(self.total, 1)
        parts = [f"{self.what}: {done:,} of {self.total:,} {self.unit} ({share} %)", f"{rate:,.1f}/s", left]
        self.say(", ".join(parts + [f"{name.replace('_', ' ')} {value}" for name, value in more.items()]))

    def done(self, **more: str) -> None:
        """All of it is done."""
        spent = time.monotonic() - self._began
        parts = [f"{self.what}: {self.total:,} {self.unit} in {duration(spent)}"]
        self.say(", ".join(parts + [f"{name.replace('_', ' ')} {value}" for name, value in more.items()]))


class ProgressReading(NamedTuple):
    """What a line of progress says."""

    what: str
    done: int
    total: int
    unit: str


def read(line: str) -> ProgressReading | None:
    """Read a line of `Progress`, or of a sweep; None for any other line."""
    found = _LINE.match(line)
    return found and ProgressReading(found["what"], number(found["done"]), number(found["total"]), found["unit"])


def number(text: str) -> int:
    """Read a number that has commas in it."""
    return int(text.replace(",", ""))


def _print(line: str) -> None:
    print(line, file=sys.stdout, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them: `42 s`, `3:05 min`, `2:03:04 h`, `5 d 2 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02} h"
    return f"{whole // 86400} d {whole // 3600 % 24} h"
