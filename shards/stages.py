"""Stages of a chain on a terminal: each with a bar, a rate and the time left, read from the lines that jobs print."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shards.progress import duration, number, read

BAR = (7, 24)
"""Characters of a bar, at least and at most."""
COLUMNS = (0, 0, 20, 9, 13)
"""Characters of each column at least, so that none moves when another grows."""
WORDS = 73
"""Characters that a row takes beside its bar."""
_MADE = re.compile(r"(\S+): ([\d,]+) pictures in ")


@dataclass(eq=False)
class StageProgress:
    """How far a stage is, as its lines say."""

    title: str
    total: int = 0
    """0 where only the lines say it."""
    result: str = ""
    """Pattern of what its last lines say came of it."""
    lines: list[str] = field(default_factory=list)
    _done: dict[str, int] = field(default_factory=dict)
    """By what is being done: a stage may do one thing after the other."""
    _began: float = 0.0
    _ended: float = 0.0
    _first: tuple[float, int] | None = None
    _last: tuple[float, int] | None = None

    def begin(self, now: float) -> None:
        """Start the clock."""
        self._began = now

    def hear(self, line: str, now: float) -> None:
        """Take in a line of the job."""
        self.lines.append(line)
        if reading := read(line):
            self._done[reading.what] = reading.done
            self.total = max(self.total, reading.total)
        elif made := _MADE.match(line):
            self._done[made[1]] = number(made[2])
        else:
            return
        self._last = now, sum(self._done.values())
        self._first = self._first or self._last

    def end(self, now: float) -> None:
        """Stop the clock: all is done."""
        self._ended = now

    def rate(self) -> float:
        """What is done in a second, since the first line; 0 where that is not known yet."""
        if not self._first or not self._last or self._last[0] <= self._first[0]:
            return 0.0
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])

    def left(self, now: float) -> float | None:
        """Seconds; None where that is not known yet."""
        if not (rate := self.rate()) or not self._last:
            return None
        return max(0.0, (self.total - self._last[1]) / rate - (now - self._last[0]))

    def row(self, now: float) -> tuple[float | None, str, str, str]:
        """Share that is done (None where that is not known), then in words: how much, how fast, how long."""
        if not self._began:
            return 0.0, "", "", ""
        if self._ended:
            found = [said[0] for line in self.lines if self.result and (said := re.search(self.result, line))]
            came = found[-1] if found else f"{self.total:,}" if self.total else ""
            return 1.0, came, "", f"took {duration(self._ended - self._began)}"
        if not self._last or not self.total:
            return None, "", "", f"{duration(now - self._began)} so far"
        rate, left = self.rate(), self.left(now)
        long = f"{duration(now - self._began)} so far" if left is None else f"{duration(left)} left"
        fast = f"{rate:,.{0 if rate >= 100 else 1 if rate >= 1 else 2}f}/s" if rate else ""
        return self._last[1] / self.total, f"{self._last[1]:,} of {self.total:,}", fast, long


class PrintedStages:
    """Print the lines of the stages as they come, where nobody watches a terminal."""

    def __init__(self, stages: Sequence[StageProgress]) -> None:
        self._stages = stages

    def __enter__(self) -> "PrintedStages":
        return self

    def __exit__(self, *error: Any) -> None: ...

    def begin(self, stage: StageProgress) -> None:
        """Say that a stage begins."""
        place = f"[{self._stages.index(stage) + 1}/{len(self._stages)}]"
        print(f"\n{place} {stage.title}", flush=True)

    def hear(self, stage: StageProgress, line: str) -> None:
        """Print a line of its job."""
        print(f"  {line}", flush=True)

    def end(self, stage: StageProgress, failed: bool = False) -> None:
        """Take note that it has ended."""


class LiveStages:
    """Show the stages on a terminal, always in the same rows, with the newest line below them."""

    def __init__(self, stages: Sequence[StageProgress], console: Console | None = None) -> None:
        self._stages, self._console, self._line = stages, console or Console(), ""
        self._live = Live(console=self._console, get_renderable=self._picture, refresh_per_second=4)

    def __enter__(self) -> "LiveStages":
        self._live.start(refresh=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self._line = ""
        self._live.stop()

    def begin(self, stage: StageProgress) -> None:
        """Start a stage."""
        stage.begin(time.monotonic())
        self._line = ""

    def hear(self, stage: StageProgress, line: str) -> None:
        """Take in a line of its job."""
        stage.hear(line, time.monotonic())
        self._line = line

    def end(self, stage: StageProgress, failed: bool = False) -> None:
        """End a stage; all lines of one that has failed are printed."""
        if not failed:
            stage.end(time.monotonic())
            return
        self.__exit__()
        for line in stage.lines:
            self._console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)

    def _picture(self) -> Group:
        now, width = time.monotonic(), max(BAR[0], min(BAR[1], self._console.width - WORDS))
        table = Table.grid(padding=(0, 1))
        for place, stage in enumerate(self._stages, 1):
            share, *words = stage.row(now)
            bar = ProgressBar(None if share is None else 1.0, share or 0.0, width, pulse=share is None)
            table.add_row(f"[{place}/{len(self._stages)}] {stage.title}", bar, *words)
        for column, least in zip(table.columns, COLUMNS, strict=True):
            column.no_wrap, column.min_width = True, least
        return Group(table, Text(self._line, style="dim", no_wrap=True, overflow="ellipsis"))
