"""Nothing that is logged is lost and nothing stands there twice: a real MLflow server, killed and started again."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipeline.track import log
from pipeline.track.log import Log, Trials, begin, end
from pipeline.track.metrics import mfu, peak_flops
from pipeline.track.runs import check, read
from tests.server import Server

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("mlflow"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def run(server: Server, request: pytest.FixtureRequest) -> str:
    """A run of this test's own."""
    name = request.node.name
    return begin(server.uri, name, {"vitscale.folder": f"/runs/{name}"}, {"lr": 0.1}, same="vitscale.folder")


def steps(server: Server, run: str, metric: str = "loss") -> list[tuple[int, float]]:
    held = MlflowClient(server.uri).get_metric_history(run, metric)
    return sorted((metric.step, metric.value) for metric in held)


def arrived(server: Server, run: str, count: int) -> None:
    """Wait until the run holds so many steps."""
    limit = time.monotonic() + 30
    while len(steps(server, run)) < count:
        assert time.monotonic() < limit
        time.sleep(0.05)


def loss(step: int, start: int = 0) -> dict[str, float]:
    """What a start of a run measures at a step; another start measures another number."""
    return {"loss": 1 / step + start, "lr": 0.1 * step}


@pytest.mark.slow
def test_a_run_that_goes_back_logs_each_step_once_whatever_it_measures_the_second_time(
    server: Server, run: str
) -> None:
    ours = Log(server.uri, run, [])
    for step in (1, 2, 3, 2, 3, 4):
        ours.add(step, loss(step, start=step))
    ours.add(4, {"val_loss": 1.0})
    assert ours.close(30) == []
    assert steps(server, run) == [(step, loss(step, start=step)["loss"]) for step in range(1, 5)]
    assert steps(server, run, "val_loss") == [(4, 1.0)]


def test_the_time_of_what_is_logged_never_falls_whatever_the_clock_does(
    server: Server, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Log(server.uri, run, [], tags={"vitscale.changes": "some"}, not_before=5000)
    for step, now in enumerate((1.0, 7.0, 3.0, 8.0), start=1):
        monkeypatch.setattr(log.time, "time", lambda now=now: now)
        ours.add(step, {"loss": 0.0})
    monkeypatch.undo()
    assert ours.close(30) == [] and ours.latest == 8000
    held = MlflowClient(server.uri).get_metric_history(run, "loss")
    assert sorted((each.step, each.timestamp) for each in held) == [(1, 5000), (2, 7000), (3, 7000), (4, 8000)]
    assert MlflowClient(server.uri).get_run(run).data.tags["vitscale.changes"] == "some"


@pytest.mark.slow
def test_nothing_is_lost_and_no_step_is_there_twice_whatever_becomes_of_the_server(
    server: Server, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PAUSE_SECONDS", 0.1)
    ours = Log(server.uri, run, [])
    for step in range(1, 11):
        ours.add(step, loss(step))
    arrived(server, run, 5)
    server.kill()
    for step in range(11, 21):
        ours.add(step, loss(step))
    with pytest.raises(ValueError, match=f"no MLflow server at {server.uri} .*MLFLOW_TRACKING_URI"):
        check(server.uri)
    left = ours.unsent()
    assert [record["step"] for record in left][-10:] == list(range(11, 21))
    server.start()
    ours.add(21, loss(21))
    assert ours.close(60) == []
    expected = [(step, 1 / step) for step in range(1, 22)]
    assert steps(server, run) == expected

    # A process that died before it heard that all was sent sends it again from its checkpoint.
    assert Log(server.uri, run, left).close(60) == []
    assert steps(server, run) == expected


def test_what_is_left_at_the_close_is_sent_by_the_next_start(
    server: Server, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PAUSE_SECONDS", 0.1)
    away = Server(tmp_path).uri  # never started
    first = Log(away, run, [])
    for step in (1, 2, 3):
        first.add(step, loss(step))
    left = first.close(0.5)
    assert [(record["step"], record["values"]) for record in left] == [(step, loss(step)) for step in (1, 2, 3)]
    assert Log(server.uri, run, left).close(30) == []
    assert steps(server, run) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]


def test_every_step_after_a_checkpoint_is_left_to_the_next_start(server: Server, run: str, tmp_path: Path) -> None:
    first = Log(Server(tmp_path).uri, run, [])
    for step in (1, 2, 3):
        first.add(step, loss(step))
    again = Log(server.uri, run, first.unsent(up_to=2))
    for step in (3, 4):
        again.add(step, loss(step, start=1))
    assert again.close(30) == []
    assert steps(server, run) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3 + 1), (4, 1 / 4 + 1)]


def test_every_step_is_there_once_as_if_the_run_had_never_started_again(server: Server, run: str) -> None:
    first = Log(server.uri, run, [])
    for step in range(1, 9):
        first.add(step, loss(step))
    assert first.close(30) == []
    again = Log(server.uri, run, [])
    for step in range(5, 13):
        again.add(step, loss(step, start=1))
    again.add(12, {"val_accuracy": 0.5})
    assert again.close(30) == []
    assert steps(server, run) == [(step, 1 / step) for step in range(1, 9)] + [
        (step, 1 / step + 1) for step in range(9, 13)
    ]
    assert steps(server, run, "val_accuracy") == [(12, 0.5)]


def test_every_record_arrives_however_many_there_are(server: Server, run: str) -> None:
    count = log.MOST_METRICS + 100  # more than one request holds, in records of two
    left = [{"step": step, "timestamp": 1_000 + step, "values": loss(step)} for step in range(1, count + 1)]
    assert Log(server.uri, run, left).close(60) == []
    assert steps(server, run) == sorted((step, 1 / step) for step in range(1, count + 1))


def test_a_run_that_begins_again_is_the_same_run_whatever_else_has_changed(server: Server) -> None:
    tags = {"vitscale.kind": "pretrain", "vitscale.folder": "/runs/begun"}
    first = begin(server.uri, "begun", tags, {"lr": 0.1, "processes": 2}, same="vitscale.folder")
    end(server.uri, first, "FAILED")
    again = begin(server.uri, "other", tags, {"lr": 0.1, "processes": 4, "new": 1}, same="vitscale.folder")
    assert again == first
    held = MlflowClient(server.uri).get_run(first)
    assert held.info.status == "RUNNING" and held.info.run_name == "begun"
    assert held.data.params == {"lr": "0.1", "processes": "2", "new": "1"}
    elsewhere = {**tags, "vitscale.folder": "/runs/elsewhere"}
    assert begin(server.uri, "begun", elsewhere, {}, same="vitscale.folder") != first


def pretrained(server: Server, digest: str) -> str:
    tags = {"vitscale.kind": "pretrain", "vitscale.folder": f"/runs/{digest}"}
    parent = begin(server.uri, digest, tags, {}, same="vitscale.folder")
    end(server.uri, parent, tags={"vitscale.checkpoint": digest})
    return parent


def add(trials: Trials, name: str) -> None:
    trials.add(name, f"digits {name}", {"task": "digits", "lr": 0.1}, {"accuracy": 0.5, "count": 10.0})


def children(server: Server, parent: str) -> list[Any]:
    return [run for run in read(server.uri) if run.tags.get("mlflow.parentRunId") == parent]


def test_every_trial_is_one_child_however_often_and_by_whomever_it_is_added(server: Server) -> None:
    parent = pretrained(server, "a" * 64)
    first, second = Trials(server.uri, "a" * 64), Trials(server.uri, "a" * 64)
    for trials in (first, first, second, Trials(server.uri, "a" * 64)):
        add(trials, "one")
    add(second, "two")
    found = {run.tags["vitscale.trial"]: run for run in children(server, parent)}
    assert sorted(found) == ["one", "two"] and len(children(server, parent)) == 2
    assert found["one"].status == "FINISHED" and found["one"].params == {"task": "digits", "lr": "0.1"}
    assert found["one"].metrics["accuracy"][0].value == 0.5


def test_two_sweeps_that_add_the_same_trials_at_once_leave_each_once(server: Server) -> None:
    parent = pretrained(server, "b" * 64)
    names = [f"trial {number}" for number in range(6)]

    def every(trials: Trials) -> None:
        for name in names:
            add(trials, name)

    with ThreadPoolExecutor(2) as both:
        list(both.map(every, [Trials(server.uri, "b" * 64) for _ in range(2)]))
    assert sorted(run.tags["vitscale.trial"] for run in children(server, parent)) == names


def test_a_trial_whose_driver_died_while_it_was_added_is_completed(server: Server) -> None:
    parent = pretrained(server, "c" * 64)
    client = MlflowClient(server.uri)
    experiment = client.get_run(parent).info.experiment_id
    tags = {"vitscale.kind": "trial", "vitscale.trial": "one", "mlflow.parentRunId": parent}
    half = client.create_run(experiment, tags=tags).info.run_id
    add(Trials(server.uri, "c" * 64), "one")
    (only,) = children(server, parent)
    assert only.id == half and only.status == "FINISHED" and only.metrics["accuracy"][0].value == 0.5


def test_every_trial_of_a_checkpoint_from_elsewhere_is_there_once_without_a_parent(server: Server) -> None:
    for _ in range(2):
        add(Trials(server.uri, "d" * 64), "an orphan")
    assert len([run for run in read(server.uri) if run.tags.get("vitscale.trial") == "an orphan"]) == 1


def test_every_trial_of_a_milestone_is_a_child_of_the_run_that_goes_on(server: Server) -> None:
    tags = {"vitscale.kind": "pretrain", "vitscale.folder": "s3://runs/long"}
    parent = begin(server.uri, "long", tags, {}, same="vitscale.folder")
    add(Trials(server.uri, "f" * 64, "s3://runs/long"), "of a milestone")
    add(Trials(server.uri, "f" * 64, "s3://runs/another"), "of another")
    assert [run.tags["vitscale.trial"] for run in children(server, parent)] == ["of a milestone"]


@pytest.mark.slow
def test_every_trial_that_ends_while_the_server_is_away_is_added_when_it_is_back(server: Server) -> None:
    parent = pretrained(server, "e" * 64)
    trials = Trials(server.uri, "e" * 64)
    add(trials, "before")
    server.kill()
    add(trials, "while away")
    assert trials.flush() == 1
    server.start()
    add(trials, "after")
    assert trials.flush() == 0
    assert sorted(run.tags["vitscale.trial"] for run in children(server, parent)) == ["after", "before", "while away"]


def test_every_known_device_has_its_peak_and_no_other() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA GH200 480GB") == 989e12
    assert peak_flops("A device of tomorrow") is None
    assert mfu(1000.0, 10**9, 6e12 * 2) == pytest.approx(0.5)
