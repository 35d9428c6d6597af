"""When the standard tasks are due, and of which milestones; without Ray, a clock or a process.

The runs' own folders say which milestones there are, the results which of their trials are missing. So a schedule has
nothing to remember: whoever is started, wherever and whenever, finds the same to do.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.combining import OrTrigger
from apscheduler.triggers.cron import CronTrigger

from pipeline.models.weights.exported import ABOUT, Exported
from pipeline.transfer.results import Results
from pipeline.transfer.wanted import Wanted
from shards.storage import Folder

MILESTONES, EXPORT = "milestones", "export"

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_LONGEST_WAIT = 60.0
_MOMENT = timedelta(microseconds=1)


# --- when -----------------------------------------------------------------------------------------------------------


class Cron:
    """The times of a cron expression in a time zone.

    As in crontab(5): minute, hour, day of the month, month, day of the week, where 0 and 7 are Sunday; where both days
    are restricted, either will do. ValueError where it is none, or never comes.
    """

    def __init__(self, expression: str, zone: str = "UTC") -> None:
        try:
            where = ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"there is no time zone {zone!r}; it is called as in UTC or Europe/Berlin") from error
        try:
            self._trigger = _trigger(expression, where)
        except ValueError as error:
            fields = "minute hour day month weekday, as in '0 3 * * *'"
            raise ValueError(
                f"cron expression {expression!r} is wrong ({error}); it has five fields: {fields}"
            ) from error
        self.expression, self.zone = expression, where
        # Every day of every month has been within eight years, as 1900 and 2100 have no 29th of February.
        if self._next(datetime(2000, 1, 1, tzinfo=where)) is None:
            raise ValueError(f"cron expression {expression!r} never comes: no month of it has that day")

    def after(self, moment: datetime) -> datetime:
        """The first time after this one."""
        start = moment.astimezone(self.zone)
        while (found := self._next(start := start + _MOMENT)) and found <= moment:
            start += timedelta(minutes=1)  # where clocks are set back, the trigger may give an hour twice
        assert found
        return found

    def _next(self, start: datetime) -> datetime | None:
        return self._trigger.get_next_fire_time(None, start)


def _trigger(expression: str, zone: tzinfo) -> BaseTrigger:
    minute, hour, day, month, weekday = _five(expression)
    weekdays = _weekdays(weekday)

    def trigger(day: str, weekdays: str) -> CronTrigger:
        return CronTrigger(minute=minute, hour=hour, day=day, month=month, day_of_week=weekdays, timezone=zone)

    if day.startswith("*") or weekday.startswith("*"):
        return trigger(day, weekdays)
    return OrTrigger([trigger(day, "*"), trigger("*", weekdays)])


def _five(expression: str) -> list[str]:
    fields = expression.split()
    if len(fields) != 5:
        raise ValueError(f"it has {len(fields)} fields")
    return fields


def _weekdays(field: str) -> str:
    """A field with days of the week as names: for the trigger, whose weeks begin on Monday, numbers mean others."""
    days: set[int] = set()
    for part in field.lower().split(","):
        span, _, step = part.partition("/")
        first, _, last = ("0", "", "6") if span == "*" else span.partition("-")
        begin = _weekday(first)
        end = _weekday(last) if last else 6 if step else begin
        end += 7 if end < begin else 0
        if not (step or "1").isdecimal() or int(step or 1) < 1:
            raise ValueError(f"{step!r} is no number of days")
        days |= {day % 7 for day in range(begin, end + 1, int(step or 1))}
    return ",".join(_DAYS[day] for day in sorted(days))


def _weekday(word: str) -> int:
    if word in _DAYS:
        return _DAYS.index(word)
    if word.isdecimal() and int(word) <= 7:
        return int(word)
    raise ValueError(f"{word!r} is no day of the week")


def turns(
    cron: Cron | None, every: float | None, now: Callable[[], datetime], wait: Callable[[float], bool]
) -> Iterator[bool]:
    """When to look for what is missing: True for a look at everything, False for one at what is new.

    At everything now if there is neither a cron expression nor `every`, and that is all; else at its times, where those
    that pass while somebody is busy count once, and at what is new now and `every` seconds. `wait` waits for so many
    seconds, and says whether to stop.
    """
    if cron is None and every is None:
        yield True
        return
    due = cron.after(now()) if cron else None
    fresh = now() if every is not None else None
    while True:
        if due and cron and now() >= due:
            yield True
            due = cron.after(now())
        elif fresh and every is not None and now() >= fresh:
            yield False
            fresh = now() + timedelta(seconds=every)
        # Not longer, since a clock may be set and a machine be suspended.
        left = min((moment - now()).total_seconds() for moment in (due, fresh) if moment)
        if left > 0 and wait(min(left, _LONGEST_WAIT)):
            return


# --- of which milestones --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Milestone:
    """Weights that a run has left to fine-tune from: on its way, or at its end."""

    name: str
    """Of its folder, within the folder of the runs."""
    model: Exported
    digest: str
    """Of its weights."""
    steps: int
    """Of the run, done by then."""


class Runs:
    """The milestones of the runs in a folder; each is read once."""

    def __init__(self, folder: Folder, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self._known: dict[str, Milestone | None] = {}

    def milestones(self) -> list[Milestone]:
        """Those that are committed, the newest first; of several with the same weights one.

        What is no model is told of once and left out.
        """
        for run in self.folder.folders():
            # It comes last: there is nothing new in a run that has ended.
            if f"{run}/{EXPORT}" not in self._known:
                on_the_way = (self.folder / run / MILESTONES).folders()
                for name in [*(f"{run}/{MILESTONES}/{one}" for one in on_the_way), f"{run}/{EXPORT}"]:
                    self._find(name)
        newest: dict[str, Milestone] = {}
        for one in sorted(filter(None, self._known.values()), key=lambda one: (-one.steps, one.name)):
            newest.setdefault(one.digest, one)
        return list(newest.values())

    def _find(self, name: str) -> None:
        # Its description is written last: without one, the milestone is not there yet.
        if name in self._known or not self.folder.exists(f"{name}/{ABOUT}"):
            return
        self._known[name] = None
        try:
            self._known[name] = _milestone(name, self.folder / name)
        except (ValueError, KeyError, TypeError) as error:
            self._say(f"{(self.folder / name).absolute}/{ABOUT} describes no model: {error!r}")


def _milestone(name: str, folder: Folder) -> Milestone:
    model = Exported(folder, json.loads(folder.read(ABOUT)))
    _ = model.config  # ValueError for one that this version does not know
    return Milestone(name, model, model.digest, int(model.about["metrics"].get("steps", 0)))


@dataclass
class Book:
    """Which milestones lack results of the standard tasks, and which have failed."""

    runs: Runs
    results: Results
    wanted: Callable[[Milestone], Wanted]
    """All that is to be found out of a milestone; ValueError where its model cannot do that."""
    say: Callable[[str], None]
    complete: set[str] = field(default_factory=set)
    """By name, as those below."""
    given_up: set[str] = field(default_factory=set)
    """Left alone until everything is looked at, or there is a new milestone."""
    failed: set[str] = field(default_factory=set)
    """To be done again then, though perhaps no result is missing: it may not have been logged."""
    seen: set[str] = field(default_factory=set)

    def due(self, everything: bool) -> list[Milestone]:
        """Milestones that lack results, the newest first."""
        milestones = self.runs.milestones()
        names = {milestone.name for milestone in milestones}
        if everything:
            self.complete.clear()
        if everything or not names <= self.seen:
            self.given_up.clear()
        self.seen |= names
        return [one for one in milestones if one.name not in self.complete | self.given_up and self.is_due(one)]

    def is_due(self, milestone: Milestone) -> bool:
        """Whether there is something to do of the milestone, by the results there are now."""
        missing = self.missing(milestone)
        if not missing and milestone.name not in self.failed | self.given_up:
            self.complete.add(milestone.name)
        return missing > 0 or milestone.name in self.failed

    def missing(self, milestone: Milestone) -> int:
        """How many trials of the milestone, of those that can be told, have no result now.

        None of a milestone whose model cannot do the tasks, which is given up.
        """
        try:
            wanted = self.wanted(milestone)
        except ValueError as error:
            self.given_up.add(milestone.name)
            self.say(f"{milestone.name}: {error}")
            return 0
        return len(wanted.missing(self.results.load()))

    def give_up(self, milestone: Milestone, why: str) -> None:
        """Leave a milestone whose sweep has failed alone for a while, and say why."""
        self.given_up.add(milestone.name)
        self.failed.add(milestone.name)
        self.say(f"{milestone.name}: {why}")

    def done(self, milestone: Milestone) -> None:
        """The milestone's sweep has ended well."""
        self.complete.add(milestone.name)
        self.failed.discard(milestone.name)


def words(milestones: Sequence[Milestone]) -> str:
    """Milestones in words, the first few by name."""
    first = ", ".join(one.name for one in milestones[:3])
    return first if len(milestones) <= 3 else f"{first} and {len(milestones) - 3} more"
