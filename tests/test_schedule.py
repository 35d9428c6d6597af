"""What a schedule does follows from what is there: when, of which milestones, and by one scheduler of several."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from jobs import schedule as job
from pipeline.config import Vit
from pipeline.models.weights.exported import ABOUT, WEIGHTS
from pipeline.train.run import build, export
from pipeline.transfer import lease as leases
from pipeline.transfer.results import Result, Results
from pipeline.transfer.schedule import Book, Cron, Milestone, Runs, turns
from shards.storage import Folder
from tests import tiny
from tests.gang import JobProcess, run_job

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(300)

BEGIN = datetime(2026, 11, 21, 17, 30, tzinfo=UTC)  # a Saturday


# --- when -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "times"),
    [
        ("0 3 * * *", ["2026-11-22 03:00", "2026-11-23 03:00"]),
        ("30 17 * * *", ["2026-11-22 17:30", "2026-11-23 17:30"]),
        ("*/20 * * * *", ["2026-11-21 17:40", "2026-11-21 18:00"]),
        ("0 0 * * 0", ["2026-11-22 00:00", "2026-11-29 00:00"]),
        ("0 0 * * 7", ["2026-11-22 00:00", "2026-11-29 00:00"]),
        ("0 0 * * sun", ["2026-11-22 00:00", "2026-11-29 00:00"]),
        ("0 0 * * 1-5", ["2026-11-23 00:00", "2026-11-24 00:00"]),
        ("0 0 * * 5-7/2", ["2026-11-22 00:00", "2026-11-27 00:00"]),
        ("0 0 * * fri-mon", ["2026-11-22 00:00", "2026-11-23 00:00", "2026-11-27 00:00"]),
        ("0 0 * * */3", ["2026-11-22 00:00", "2026-11-25 00:00", "2026-11-28 00:00"]),
        ("0 0 25 * 1", ["2026-11-23 00:00", "2026-11-25 00:00", "2026-11-30 00:00"]),
        ("0 0 1 jan *", ["2027-01-01 00:00"]),
        ("0 0 29 2 *", ["2028-02-29 00:00", "2032-02-29 00:00"]),
    ],
)
def test_every_expression_means_what_cron_means_by_it(expression: str, times: list[str]) -> None:
    cron, moment = Cron(expression), BEGIN
    for expected in times:
        moment = cron.after(moment)
        assert f"{moment:%Y-%m-%d %H:%M %Z}" == f"{expected} UTC"


@pytest.mark.parametrize("expression", ["0 0 31 2 *", "0 0 30 2 *", "0 0 31 4,6,9,11 *"])
def test_every_expression_that_never_comes_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="never comes"):
        Cron(expression)


@pytest.mark.parametrize(
    "expression",
    ["", "daily", "* * * *", "* * * * * *", "60 * * * *", "* * * * 8", "* * * * 1/0", "* * * * 1-x", "a b c d e"],
)
def test_every_expression_that_is_none_is_refused_with_how_one_looks(expression: str) -> None:
    with pytest.raises(
        ValueError, match=r"is wrong \(.*five fields: minute hour day month weekday, as in '0 3 \* \* \*'"
    ):
        Cron(expression)


def test_no_time_comes_twice_or_never_where_clocks_are_set() -> None:
    berlin = Cron("30 2 * * *", "Europe/Berlin")
    for month, day in ((3, 27), (10, 23)):
        moment, found = datetime(2026, month, day, tzinfo=ZoneInfo("Europe/Berlin")), []
        for _ in range(6):
            later = berlin.after(moment)
            assert later > moment
            found.append(moment := later)
        assert timedelta(days=4) < found[-1] - found[0] <= timedelta(days=5, hours=1)
    with pytest.raises(ValueError, match="no time zone 'Mars'; it is called as in UTC or Europe/Berlin"):
        Cron("0 3 * * *", "Mars")


class Time:
    """A clock that goes on when somebody waits, or is busy."""

    def __init__(self, hours: float) -> None:
        self.now, self.end = BEGIN, BEGIN + timedelta(hours=hours)

    def __call__(self) -> datetime:
        return self.now

    def wait(self, seconds: float) -> bool:
        assert seconds > 0
        self.now += timedelta(seconds=seconds)
        return self.now >= self.end


def test_every_time_of_the_expression_has_its_turn_and_new_milestones_are_looked_for_between() -> None:
    clock = Time(hours=48)
    when = [(everything, clock.now) for everything in turns(Cron("0 3 * * *"), 60.0, clock, clock.wait)]
    assert [f"{now:%d %H:%M}" for everything, now in when if everything] == ["22 03:00", "23 03:00"]
    looks = [now for everything, now in when if not everything]
    assert looks[0] == BEGIN
    assert {later - now for now, later in pairwise(looks)} == {timedelta(minutes=1)}


def test_without_looks_for_milestones_only_the_times_of_the_expression_count() -> None:
    clock = Time(hours=48)
    assert list(turns(Cron("0 3 * * *"), None, clock, clock.wait)) == [True, True]


def test_times_that_pass_while_somebody_is_busy_count_once() -> None:
    clock, when = Time(hours=6), []
    for _ in turns(Cron("0 * * * *"), None, clock, clock.wait):
        when.append(f"{clock.now:%H:%M}")
        clock.now += timedelta(hours=2, minutes=30)
    assert when == ["18:00", "21:00"]


def test_a_clock_that_is_set_is_noticed_within_a_minute() -> None:
    clock = Time(hours=400)
    turn = turns(Cron("0 3 1 12 *"), None, clock, lambda seconds: clock.wait(min(seconds, 61.0)) or set_on())

    def set_on() -> bool:
        clock.now = max(clock.now, datetime(2026, 12, 1, 2, 59, 30, tzinfo=UTC))
        return False

    assert next(turn) and f"{clock.now:%d %H:%M}" == "01 03:00"


def test_with_nothing_to_wait_for_there_is_one_turn_for_everything() -> None:
    def never(seconds: float) -> bool:
        raise AssertionError

    assert list(turns(None, None, lambda: BEGIN, never)) == [True]


# --- of which milestones --------------------------------------------------------------------------------------------


def commit(runs: Path, name: str, steps: int, digest: str = "") -> None:
    """A milestone, as a run leaves it, without its weights."""
    model = Vit(width=16, depth=1, heads=2, hidden=32, patch=4, image_size=12)
    about = {"architecture": "vit", "model": asdict(model), "classes": 3, "metrics": {"steps": steps}}
    (runs / name).mkdir(parents=True, exist_ok=True)
    (runs / name / ABOUT).write_text(json.dumps(about | {"digest": digest or f"{name} {steps}"}))


class Asked:
    """What is wanted of a milestone: two trials, by name."""

    def __init__(self, milestone: Milestone) -> None:
        self.names = [f"{milestone.digest.replace('/', '-')}-{number}" for number in range(2)]

    def missing(self, done: Mapping[str, Result]) -> list[str]:
        return [name for name in self.names if name not in done]


def book_of(
    runs: Path, results: Path, said: list[str] | None = None, asked: Callable[[Milestone], Any] = Asked
) -> Book:
    say = [].append if said is None else said.append
    return Book(Runs(Folder(str(runs)), say), Results(Folder(str(results))), asked, say)


def finish(milestone: Milestone, results: Path, count: int = 2) -> None:
    for name in Asked(milestone).names[:count]:
        Results(Folder(str(results))).store(name, {})


def names(milestones: list[Milestone]) -> list[str]:
    return [milestone.name for milestone in milestones]


def test_every_committed_milestone_is_found_the_newest_first_and_no_other(tmp_path: Path) -> None:
    said: list[str] = []
    runs = Runs(Folder(str(tmp_path / "runs")), said.append)
    assert runs.milestones() == []
    commit(tmp_path / "runs", "a/milestones/step-00000100", 100)
    commit(tmp_path / "runs", "b/milestones/step-00000300", 300)
    (tmp_path / "runs" / "b" / "milestones" / "step-00000400").mkdir()
    (tmp_path / "runs" / "b" / "milestones" / "step-00000400" / WEIGHTS).touch()
    (tmp_path / "runs" / "c" / "checkpoints" / "step-00000400").mkdir(parents=True)
    assert names(runs.milestones()) == ["b/milestones/step-00000300", "a/milestones/step-00000100"]
    commit(tmp_path / "runs", "b/milestones/step-00000400", 400)
    commit(tmp_path / "runs", "a/milestones/step-00000200", 200, "last")
    commit(tmp_path / "runs", "a/export", 200, "last")
    assert names(runs.milestones()) == [
        *("b/milestones/step-00000400", "b/milestones/step-00000300"),
        *("a/export", "a/milestones/step-00000100"),
    ]
    assert not said


def test_a_milestone_is_read_once_and_of_a_run_that_has_ended_nothing_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(tmp_path, "a/milestones/step-00000100", 100)
    commit(tmp_path, "a/export", 200)
    commit(tmp_path, "b/milestones/step-00000100", 100)
    runs = Runs(Folder(str(tmp_path)), print)
    runs.milestones()
    asked: list[str] = []
    for name in ("read", "folders"):
        method = getattr(Folder, name)
        monkeypatch.setattr(Folder, name, lambda self, *rest, m=method: asked.append(self.absolute) or m(self, *rest))
    runs.milestones()
    assert asked == [str(tmp_path), f"{tmp_path}/b/milestones"]


def test_what_is_no_model_is_told_of_once_and_keeps_nothing_else_from_being_found(tmp_path: Path) -> None:
    said: list[str] = []
    commit(tmp_path, "a/milestones/step-00000100", 100)
    for number, text in enumerate(
        ["{", "{}", "[]", '{"architecture": "new", "model": {}, "digest": "d", "metrics": {}}']
    ):
        commit(tmp_path, f"b{number}/milestones/step-00000100", 100)
        (tmp_path / f"b{number}/milestones/step-00000100" / ABOUT).write_text(text)
    runs = Runs(Folder(str(tmp_path)), said.append)
    for _ in range(2):
        assert names(runs.milestones()) == ["a/milestones/step-00000100"]
    assert len(said) == 4 and all("describes no model" in line for line in said)


def test_no_milestone_is_due_that_has_all_results_whoever_asks(tmp_path: Path) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    for steps in (100, 200, 300):
        commit(runs, f"a/milestones/step-{steps:08}", steps)
    book = book_of(runs, results)
    newest, middle, oldest = book.due(False)
    finish(newest, results)
    finish(middle, results, count=1)
    for asked in (book, book_of(runs, results)):
        for everything in (False, True):
            assert asked.due(everything) == [middle, oldest]
    finish(middle, results)
    finish(oldest, results)
    assert book.due(False) == book.due(True) == book_of(runs, results).due(False) == []


def test_a_result_that_is_taken_away_is_missing_to_whoever_starts_after_that(tmp_path: Path) -> None:
    commit(tmp_path / "runs", "a/milestones/step-00000100", 100)
    book = book_of(tmp_path / "runs", tmp_path / "results")
    (milestone,) = book.due(False)
    finish(milestone, tmp_path / "results")
    assert book.due(False) == []
    for path in (tmp_path / "results" / "results").iterdir():
        path.unlink()
    assert book_of(tmp_path / "runs", tmp_path / "results").due(False) == [milestone]


def test_what_failed_is_left_alone_until_everything_is_looked_at_or_something_is_new(tmp_path: Path) -> None:
    said: list[str] = []
    runs, results = tmp_path / "runs", tmp_path / "results"
    commit(runs, "a/milestones/step-00000100", 100)
    book = book_of(runs, results, said)
    (first,) = book.due(False)
    book.give_up(first, "it has failed")
    assert book.due(False) == [] and said == ["a/milestones/step-00000100: it has failed"]
    assert book.due(True) == [first]
    book.give_up(first, "it has failed")
    commit(runs, "a/milestones/step-00000200", 200)
    second, again = book.due(False)
    assert (second.steps, again) == (200, first)


def test_a_model_that_cannot_do_the_tasks_is_named_and_keeps_no_other_from_them(tmp_path: Path) -> None:
    def asked(milestone: Milestone) -> Asked:
        if milestone.steps == 200:
            raise ValueError("384 pixels do not divide into patches of 14")
        return Asked(milestone)

    said: list[str] = []
    for steps in (100, 200):
        commit(tmp_path / "runs", f"a/milestones/step-{steps:08}", steps)
    book = book_of(tmp_path / "runs", tmp_path / "results", said, asked)
    for _ in range(3):
        assert [one.steps for one in book.due(False)] == [100]
    assert said == ["a/milestones/step-00000200: 384 pixels do not divide into patches of 14"]


# --- by one scheduler of several ------------------------------------------------------------------------------------

# In the place of jobs/finetune.py: says that it has begun, waits while it is told to, and leaves two results.
SWEEP = """
import os, signal, sys, time, uuid
from pathlib import Path
place, names = Path(sys.argv[1]), sys.argv[2:]
began = place / "began" / f"{names[0]} {os.getpid()}"
began.parent.mkdir(parents=True, exist_ok=True)
began.touch()
try:
    while (place / "hold").exists():
        time.sleep(0.02)
except KeyboardInterrupt:
    (place / "interrupted").touch()
    raise
if (place / "fail").exists():
    sys.exit(2)
(place / "results").mkdir(exist_ok=True)
for name in names:
    (place / "results" / f"{name}.json").write_text("{}")
"""


class Fake(job.Scheduler):
    """A scheduler that runs `SWEEP`."""

    def command(self, milestone: Milestone) -> list[str]:
        return ["-c", SWEEP, self.folder.absolute, *Asked(milestone).names]


def arguments(place: Path, **changes: Any) -> job.Arguments:
    to = str(place / "results")
    given = job.Arguments(data=str(place / "sets"), to=to, tasks="digits", runs=str(place / "runs"), every=0.05)
    return replace(given, **{"on_milestone": True, **changes})


class Running:
    """A scheduler in a thread, until it is told to stop."""

    def __init__(self, place: Path, **changes: Any) -> None:
        self.told, self.said = threading.Event(), list[str]()
        given = arguments(place, **changes)
        self.book = book_of(place / "runs", place / "results", self.said)
        self.scheduler = Fake(given, Folder(given.to), self.book, self.told.wait)
        cron = Cron(given.cron) if given.cron else None
        self.thread = threading.Thread(target=self.scheduler.go, args=(cron,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.told.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


def began(place: Path) -> Counter[str]:
    return Counter(path.name.rpartition(" ")[0] for path in (place / "results" / "began").glob("*"))


def wait_for(true: Callable[[], object]) -> None:
    limit = time.monotonic() + 120
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_every_milestone_is_swept_once_by_schedulers_at_once(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "hold").touch()
    commit(tmp_path / "runs", "a/milestones/step-00000100", 100)
    schedulers = [Running(tmp_path) for _ in range(3)]
    try:
        wait_for(lambda: began(tmp_path))
        wait_for(lambda: sum(bool(one.scheduler.left_to) for one in schedulers) == 2)
        commit(tmp_path / "runs", "a/milestones/step-00000200", 200)
        (tmp_path / "results" / "hold").unlink()
        wait_for(lambda: all(len(one.book.complete) == 2 for one in schedulers))
    finally:
        for one in schedulers:
            one.stop()
    assert set(began(tmp_path).values()) == {1} and len(began(tmp_path)) == 2
    assert len(Results(Folder(str(tmp_path / "results"))).load()) == 4


def test_a_scheduler_that_is_told_to_stop_ends_its_sweep_and_leaves_the_rest_to_others(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "hold").touch()
    commit(tmp_path / "runs", "a/milestones/step-00000100", 100)
    first = Running(tmp_path)
    wait_for(lambda: began(tmp_path))
    first.stop()
    wait_for((tmp_path / "results" / "interrupted").exists)
    (tmp_path / "results" / "hold").unlink()
    second = Running(tmp_path)  # at once: the lease was given back
    wait_for(lambda: second.book.complete)
    second.stop()
    assert list(began(tmp_path).values()) == [2] and not first.book.given_up


def test_a_scheduler_that_loses_its_lease_ends_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases.Lease, "renew", lambda self: False)  # as if the store were away
    monkeypatch.setattr(job, "LEASE_SECONDS", 1.0)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "hold").touch()
    commit(tmp_path / "runs", "a/milestones/step-00000100", 100)
    one = Running(tmp_path)
    wait_for((tmp_path / "results" / "interrupted").exists)
    assert not one.book.given_up and not one.book.complete
    one.stop()


def test_a_sweep_that_fails_is_told_of_and_not_started_again_at_every_look(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "fail").touch()
    commit(tmp_path / "runs", "a/milestones/step-00000100", 100)
    one = Running(tmp_path)
    wait_for(lambda: one.said)
    assert one.said == ["a/milestones/step-00000100: jobs/finetune.py has failed (exit code 2)"]
    (tmp_path / "results" / "fail").unlink()
    commit(tmp_path / "runs", "a/milestones/step-00000200", 200)
    wait_for(lambda: len(one.book.complete) == 2)
    one.stop()
    assert sorted(began(tmp_path).values()) == [1, 2]


def test_a_sweep_that_fails_with_all_results_is_started_again_since_something_else_went_wrong(tmp_path: Path) -> None:
    commit(tmp_path / "runs", "a/milestones/step-00000100", 100)
    book = book_of(tmp_path / "runs", tmp_path / "results")
    (milestone,) = book.due(False)
    finish(milestone, tmp_path / "results")
    book.give_up(milestone, "MLflow is away")
    assert book.due(False) == [] and book.due(True) == [milestone]
    book.done(milestone)
    assert book.due(False) == book.due(True) == []


def test_without_cron_or_milestones_what_is_missing_is_done_once(tmp_path: Path) -> None:
    for steps in (100, 200):
        commit(tmp_path / "runs", f"a/milestones/step-{steps:08}", steps)
    one = Running(tmp_path, on_milestone=False)
    one.thread.join(120)
    assert not one.thread.is_alive() and len(one.book.complete) == 2
    again = Running(tmp_path, on_milestone=False)
    again.thread.join(60)
    assert set(began(tmp_path).values()) == {1}


def test_a_store_that_is_away_ends_no_scheduler_that_goes_on_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, asked = [True], [0]
    folders = Folder.folders

    def failing(self: Folder) -> list[str]:
        asked[0] += 1
        if away[0]:
            raise OSError("nobody answers")
        return folders(self)

    monkeypatch.setattr(Folder, "folders", failing)
    commit(tmp_path / "runs", "a/milestones/step-00000100", 100)
    one = Running(tmp_path)
    wait_for(lambda: asked[0] >= 3)
    away[0] = False
    wait_for(lambda: one.book.complete)
    one.stop()
    away[0] = True
    once = job.Scheduler(arguments(tmp_path, on_milestone=False), Folder(str(tmp_path)), one.book, one.told.wait)
    with pytest.raises(OSError, match="nobody answers"):
        once.reconcile(True)


def test_schedules_are_the_same_whenever_they_find_out_the_same(tmp_path: Path) -> None:
    def name(**changes: Any) -> str:
        return Fake(arguments(tmp_path, **changes), Folder(str(tmp_path)), Any, time.sleep)._name  # type: ignore[arg-type]

    assert name() == name(cron="0 3 * * *", on_milestone=False, every=5.0, gpus_each=0.5, retries=0)
    others = [
        {"tasks": "mnist"},
        {"protocol": "fewshot"},
        {"seeds": 2},
        {"rates": (0.1,)},
        {"runs": "other"},
        {"data": "x"},
    ]
    assert len({name(**other) for other in others} | {name()}) == len(others) + 1


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, and a run with one milestone and more of them kept aside: `runs/a`, `sets/digits`, `aside`."""
    folder = tmp_path_factory.mktemp("schedule")
    sets = {
        split: tiny.shard_set(folder / "sets" / "digits" / split, sizes=sizes, side=side)
        for side, (split, sizes) in enumerate({"train800": (40, 24), "val200": (21,), "test": (30,)}.items(), 12)
    }
    config = tiny.config(sets["test"])
    for number, where in ((1, "runs/a/milestones"), (2, "aside"), (3, "aside")):
        weights = {k: v.detach() + 0.01 * number for k, v in build(config).named_parameters()}
        export(Folder(str(folder)), config, weights, {"steps": 100 * number}, f"{where}/step-{100 * number:08}")
    return folder


def test_every_mistake_is_told_before_a_machine_is_asked_for(place: Path, tmp_path: Path) -> None:
    given = {"runs": f"{place}/runs", "data": f"{place}/sets", "to": f"{tmp_path}/to", "tasks": "digits"}
    mistakes: list[tuple[dict[str, str], str]] = [
        ({"cron": "0 0 31 2 *"}, "never comes"),
        ({"cron": "daily"}, "five fields"),
        ({"cron": "0 3 * * *", "timezone": "Mars"}, "no time zone 'Mars'"),
        ({"timezone": "Europe/Berlin"}, "says nothing without --cron"),
        ({"tasks": "digits,cats"}, "no task 'cats'; there are: digits"),
        (
            {"tasks": "digits,imagenet"},
            "imagenet does not give way to training while it runs: leave it out, or --no-spare",
        ),
        ({"protocol": "vtab"}, "no protocol 'vtab'; there are: demo"),
        ({"tasks": "digits,mnist"}, "task mnist is not prepared .*make it with: python jobs/prepare.py mnist"),
        ({"seeds": "0"}, "seeds is 0; at least 1 is needed"),
        ({"every": "0"}, "--every is 0"),
        ({"rates": "-1"}, "-1 is no learning rate"),
        ({"gpus_each": "2"}, "no more than one GPU"),
        ({"cpus_each": "0"}, "more than 0 CPUs"),
        ({"tracking_uri": "http://127.0.0.1:9"}, "no MLflow server at http://127.0.0.1:9"),
    ]
    for changes, said in mistakes:
        words = [f"--{name.replace('_', '-')}={value}" for name, value in {**given, **changes}.items()]
        with pytest.raises(ValueError, match=said):
            job.main(words)
    with pytest.raises(ValueError, match="tasks"):
        job.main([f"--{name}={value}" for name, value in given.items() if name != "tasks"])
    assert not (tmp_path / "to").exists() or not list((tmp_path / "to").iterdir())


def test_every_milestone_that_is_due_is_handed_to_finetune_in_words_that_it_reads(place: Path, tmp_path: Path) -> None:
    from jobs import finetune
    from pipeline.cli import parse
    from pipeline.transfer import protocols, tasks

    given = arguments(place, rates=(0.1, 0.3), seeds=2, gpus_each=0.25, spare=False, tracking_uri="sqlite:///x.db")
    folder = Folder(str(tmp_path))
    book = job._book(given, tasks.named("digits"), protocols.named("linear"), folder)
    (milestone,) = [one for one in book.due(True) if one.steps == 100]
    assert book.missing(milestone) == 2  # the rates to choose from; what is tested follows from them
    script, *words = job.Scheduler(given, folder, book, time.sleep).command(milestone)  # type: ignore[arg-type]
    assert Path(script) == ROOT / "jobs" / "finetune.py"
    said = parse(finetune.Arguments, words)
    assert (said.checkpoint, said.data, said.to) == (milestone.model.folder.absolute, given.data, folder.absolute)
    shared = ("tasks", "protocol", "rates", "seeds", "spare", "cpus_each", "gpus_each", "retries", "tracking_uri")
    assert all(getattr(said, name) == getattr(given, name) for name in shared)


@pytest.mark.slow
def test_a_milestone_that_is_committed_meanwhile_has_its_results_whatever_is_killed(
    place: Path, address: str, tmp_path: Path
) -> None:
    """With jobs/finetune.py itself."""
    words = ["--runs", f"{place}/runs", "--data", f"{place}/sets", "--to", str(tmp_path / "to"), "--tasks", "digits"]
    words += ["--protocol", "fewshot", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", "--every", "0.5"]
    env = {**os.environ, "RAY_ADDRESS": address}

    def commit_one(steps: int) -> None:
        name = f"step-{steps:08}"
        (place / "aside" / name).rename(place / "runs" / "a" / "milestones" / name)

    def models() -> set[str]:
        return {result["trial"]["model"] for result in Results(Folder(str(tmp_path / "to"))).load().values()}

    first = JobProcess("schedule.py", *words, "--on-milestone", env=env)
    try:
        wait_for(lambda: len(models()) == 1 or first.poll() is not None)
        commit_one(200)
        wait_for(lambda: len(models()) == 2 or first.poll() is not None)
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 130, first.said()
    finally:
        first.kill()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "to" / "results").iterdir()}
    commit_one(300)
    once = run_job("schedule.py", *words, env=env, timeout=200)
    assert once.returncode == 0, once.stdout + once.stderr
    assert "results are missing of a/milestones/step-00000300" in once.stdout and len(models()) == 3
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    again = run_job("schedule.py", *words, env=env, timeout=200)
    assert (again.returncode, again.stdout) == (0, "schedule: no results are missing\n")


def test_whoever_is_at_it_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit(tmp_path / "runs", "a/milestones/step-00000100", 100)
    given = arguments(tmp_path)
    one = Fake(given, Folder(given.to), book_of(tmp_path / "runs", tmp_path / "results"), lambda _: False)
    other = leases.take(Folder(given.to) / "schedules", one._name, 60)
    assert other
    for _ in range(3):
        one.reconcile(False)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"schedule: a/milestones/step-00000100 left to {other.holder}, which is at it"]
    assert not began(tmp_path)
