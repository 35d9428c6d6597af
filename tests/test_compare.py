"""The comparison of runs: a real MLflow in, a real page in a real browser out."""

import csv
import math
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.insight import page, words
from pipeline.insight.report import compare
from pipeline.insight.scaling import POINTS, front, law, missing
from pipeline.track.runs import Point, Run, check, read, tracking_uri
from tests.browser import drawn
from tests.gang import run_job

ROOT = Path(__file__).resolve().parents[1]

# --- what stands in MLflow ------------------------------------------------------------------------------------------

PRETRAINED = {
    "small": {"parameters": 200_000, "batch": 64, "curve": [(10, 2e-6, 0.60), (20, 4e-6, 0.75)]},
    "large": {"parameters": 800_000, "batch": 128, "curve": [(10, 1e-5, 0.70), (20, 2e-5, 0.80), (30, 3e-5, 0.87)]},
    "wasteful": {"parameters": 900_000, "batch": 128, "curve": [(10, 3e-5, 0.70), (20, 6e-5, 0.81)]},
}
TESTED = {
    ("digits", "pretrained"): (0.95, 0.96, 0.97),
    ("digits", "scratch"): (0.90, 0.91, 0.89),
    ("offset", "pretrained"): (0.60, 0.62, 0.61),
    ("offset", "scratch"): (0.61, 0.63, 0.62),
}


class Writer:
    """Writes runs as the pipeline does."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        self.experiment = self.client.create_experiment("vitscale")

    def run(
        self, name: str, tags: dict[str, str], params: dict[str, Any], points: dict[str, list[tuple[int, float]]]
    ) -> str:
        from mlflow.entities import Metric, Param

        run = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now + step, step) for key, values in points.items() for step, value in values]
        self.client.log_batch(run, metrics=metrics, params=[Param(key, str(value)) for key, value in params.items()])
        self.client.set_terminated(run)
        return run

    def pretraining(self, name: str, parameters: int, batch: int, curve: list[tuple[int, float, float]]) -> str:
        points = {
            "loss": [(step, 1 / step) for step, _, _ in curve],
            "pictures_per_second": [(step, 100.0 * batch) for step, _, _ in curve],
            "exaflops": [(step, compute) for step, compute, _ in curve],
            "val_accuracy": [(step, accuracy) for step, _, accuracy in curve],
        }
        tags = {"vitscale.kind": "pretrain", "vitscale.run": name, "data_root": "abc"}
        return self.run(name, tags, {"batch": batch, "parameters": parameters, "model.width": 64}, points)

    def trial(self, parent: str, task: str, start: str, split: str, lr: float, seed: int, accuracy: float) -> str:
        name = f"{task}-{start}-{split}-{lr}-{seed}"
        tags = {"vitscale.kind": "trial", "vitscale.trial": name, "mlflow.parentRunId": parent}
        params = {
            "task": task,
            "split": split,
            "lr": lr,
            "seed": seed,
            "start": start,
            "protocol": "v1",
            "checkpoint": "c0ffee",
        }
        return self.run(name, tags, params, {"accuracy": [(0, accuracy)], "count": [(0, 100)]})


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    writer = Writer(uri)
    ids = {name: writer.pretraining(name, **what) for name, what in PRETRAINED.items()}
    for (task, start), accuracies in TESTED.items():
        for lr, chosen in ((0.001, 0.5), (0.01, 0.6)):
            writer.trial(ids["large"], task, start, "val200", lr, 0, chosen)
        for seed, accuracy in enumerate(accuracies):
            writer.trial(ids["large"], task, start, "test", 0.01, seed, accuracy)
    # What was tested before a better learning rate had been tried stays there, and does not count.
    writer.trial(ids["large"], "digits", "pretrained", "test", 0.001, 0, 0.11)
    return uri


@pytest.fixture(scope="module")
def runs(uri: str) -> list[Run]:
    return read(uri)


@pytest.fixture(scope="module")
def written(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("report")
    env = {"PATH": "/usr/bin:/bin", "COLUMNS": "160", "HOME": str(folder)}
    said = run_job("compare.py", "--to", folder, "--tracking-uri", uri, env=env)
    assert said.returncode == 0, said.stderr
    yield folder, said.stdout


# --- the front and the law ------------------------------------------------------------------------------------------

points = st.lists(
    st.tuples(st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 7.0]) | st.floats(1e-6, 1e6), st.floats(0, 1)), max_size=30
)


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] >= b[1]


@pytest.mark.timeout(60)
@given(points)
def test_a_point_is_on_the_front_exactly_if_no_other_beats_it(points: list[tuple[float, float]]) -> None:
    kept = set(front([c for c, _ in points], [a for _, a in points]))
    for i, point in enumerate(points):
        assert (i in kept) == (not any(beats(other, point) for other in points))


@pytest.mark.timeout(60)
@given(points)
def test_every_point_has_one_on_the_front_that_is_as_good(points: list[tuple[float, float]]) -> None:
    kept = [points[i] for i in front([c for c, _ in points], [a for _, a in points])]
    assert all(any(other == point or beats(other, point) for other in kept) for point in points)
    assert kept == sorted(kept)


@pytest.mark.timeout(120)
@settings(max_examples=5, deadline=None)
@given(st.floats(0.02, 0.2), st.floats(0.05, 0.3), st.floats(0.2, 0.6), st.floats(-6, 3))
def test_whatever_the_law_it_is_found_again_in_its_own_points(
    floor: float, scale: float, power: float, unit: float
) -> None:
    compute = np.geomspace(1e-2, 1e2, 8)
    found = law(list(compute * 10**unit), list(1 - (floor + scale * compute**-power)))
    assert found.floor == pytest.approx(floor, rel=1e-2, abs=1e-4)
    assert found.power == pytest.approx(power, rel=1e-2)
    assert found.error(10**unit) == pytest.approx(floor + scale, rel=1e-3)


@pytest.mark.timeout(60)
def test_every_interval_of_the_law_holds_its_number_and_the_same_points_give_the_same_law() -> None:
    compute = np.geomspace(1e-3, 10, 10)
    noise = np.exp(np.random.default_rng(3).normal(0, 0.02, 10))
    accuracy = list(1 - (0.08 + 0.1 * compute**-0.3) * noise)
    found = law(list(compute), accuracy)
    assert found.power_between[0] < 0.3 < found.power_between[1]
    assert found.floor_between[0] < found.floor < found.floor_between[1]
    assert found == law(list(compute), accuracy)


@pytest.mark.timeout(60)
@given(st.integers(0, POINTS + 2))
def test_whatever_is_missing_to_a_law_is_said_as_a_number(count: int) -> None:
    compute, accuracy = [10.0**-i for i in range(count)] * 2, [0.9 - 0.1 * i for i in range(count)] * 2
    assert missing(compute, accuracy) == max(0, POINTS - count)
    if count < POINTS:
        with pytest.raises(ValueError, match=f"{POINTS - count} are missing"):
            law(compute, accuracy)


# --- from MLflow to the report --------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_every_run_comes_back_as_it_was_written(runs: list[Run]) -> None:
    by_name = {run.name: run for run in runs}
    assert len(runs) == len(PRETRAINED) + 4 * (2 + 3) + 1
    for name, what in PRETRAINED.items():
        run = by_name[name]
        assert [(p.step, p.value) for p in run.metrics["val_accuracy"]] == [(s, a) for s, _, a in what["curve"]]
        assert run.params["parameters"] == str(what["parameters"]) and run.status == "FINISHED"
    trial = by_name["digits-scratch-test-0.01-1"]
    assert trial.metrics["accuracy"][-1].value == 0.91 and trial.tags["mlflow.parentRunId"] == by_name["large"].id


@pytest.mark.timeout(120)
def test_every_run_comes_once_whatever_the_size_of_a_page(
    uri: str, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.track.runs._PAGE", 4)
    assert {run.id for run in read(uri)} == {run.id for run in runs}


@pytest.mark.timeout(120)
def test_no_point_of_the_front_is_beaten_by_any_run(runs: list[Run]) -> None:
    report = compare(runs)
    every = [(p.exaflops, p.accuracy) for run in report.runs for p in run.curve]
    assert report.front
    for point in report.front:
        assert not any(beats(other, (point.exaflops, point.accuracy)) for other in every)
    assert {run.name: bool(run.end and run.end.on_front) for run in report.runs} == {
        "small": True,
        "large": True,
        "wasteful": False,
    }


@pytest.mark.timeout(120)
def test_every_number_of_the_table_stands_in_mlflow(runs: list[Run]) -> None:
    rows = {row[0]: row for row in words.run_rows(compare(runs))}
    for name, what in PRETRAINED.items():
        steps, compute, accuracy = what["curve"][-1]
        seen = steps * what["batch"]
        assert rows[name][1:5] == (
            words.counted(what["parameters"]),
            words.counted(seen),
            words.significant(compute),
            words.percent(accuracy),
        )
        assert rows[name][6] == words.significant(100.0 * what["batch"])
        assert rows[name][7] == words.ABSENT, "no MFU was logged, so none is shown"


@pytest.mark.timeout(120)
def test_every_margin_is_that_of_the_learning_rate_chosen_without_the_test_set(runs: list[Run]) -> None:
    for transfer in compare(runs).transfers:
        pretrained, scratch = TESTED[transfer.task, "pretrained"], TESTED[transfer.task, "scratch"]
        assert transfer.pretrained and transfer.scratch and transfer.source == "large"
        assert transfer.pretrained.accuracies == pretrained and transfer.pretrained.rates == ("0.01",)
        assert transfer.pretrained.deviation == pytest.approx(stdev(pretrained))
        assert transfer.margin == pytest.approx(fmean(pretrained) - fmean(scratch))
        assert transfer.error == pytest.approx(math.sqrt((stdev(pretrained) ** 2 + stdev(scratch) ** 2) / 3))


@pytest.mark.timeout(120)
def test_wherever_pretraining_is_not_ahead_the_report_says_so(runs: list[Run]) -> None:
    report = compare(runs)
    assert {t.task: t.verdict for t in report.transfers} == {"digits": "ahead", "offset": "no clear difference"}
    assert [sentence.split(",")[0] for sentence in words.doubts(report)] == ["offset"]


def tried(
    parent: str, start: str, accuracy: float, seed: int, model: str = "arch", lr: str = "0.1", split: str = "test"
) -> Run:
    params = {"task": "digits", "split": split, "lr": lr, "seed": str(seed), "start": start, "checkpoint": model}
    tags = {"vitscale.kind": "trial", "vitscale.trial": f"{start}{model}{seed}{lr}{split}"}
    if parent:
        tags["mlflow.parentRunId"] = parent
    return Run(f"{parent}{start}{seed}", "t", "FINISHED", params, tags, {"accuracy": (Point(0, accuracy, 1),)})


@pytest.mark.timeout(60)
def test_every_pretraining_run_is_held_against_scratch_though_two_share_the_same_trials() -> None:
    parents = [made("a", [(1e-3, 0.5)]), made("b", [(1e-2, 0.6)])]
    trials = [tried(p.id, "scratch", 0.5 + seed / 100, seed) for p in parents for seed in range(3)]
    trials += [tried(p.id, "pretrained", 0.8 + seed / 100, seed, p.id) for p in parents for seed in range(3)]
    report = compare([*parents, *trials])
    assert [(t.source, t.verdict) for t in report.transfers] == [("a", "ahead"), ("b", "ahead")]


@pytest.mark.timeout(60)
def test_what_scratch_is_of_unknown_architecture_is_not_compared() -> None:
    trials = [
        tried("", "pretrained", 0.8, 0, "weights"),
        tried("", "scratch", 0.5, 0, "one"),
        tried("", "scratch", 0.6, 0, "two"),
    ]
    assert [t.verdict for t in compare(trials).transfers] == ["not compared"]


@pytest.mark.timeout(60)
def test_of_equally_good_rates_the_smaller_counts_as_in_the_sweep() -> None:
    trials = [tried("", "pretrained", 0.7, 0, "w", lr, "val200") for lr in ("0.03", "0.1")]
    trials += [tried("", "pretrained", accuracy, 0, "w", lr) for lr, accuracy in (("0.03", 0.6), ("0.1", 0.9))]
    (transfer,) = compare(trials).transfers
    assert transfer.pretrained and transfer.pretrained.accuracies == (0.6,)


def made(name: str, curve: list[tuple[float, float]], status: str = "FINISHED") -> Run:
    steps = range(10, 10 * len(curve) + 10, 10)
    metrics = {
        "exaflops": tuple(Point(s, c, s) for s, (c, _) in zip(steps, curve, strict=True)),
        "val_accuracy": tuple(Point(s, a, s) for s, (_, a) in zip(steps, curve, strict=True)),
    }
    return Run(name * 8, name, status, {"batch": "8"}, {"vitscale.kind": "pretrain"}, metrics)


@pytest.mark.timeout(60)
def test_a_law_counts_every_finished_end_on_the_front_and_nothing_else() -> None:
    ends = [(10.0**-i, 0.95 - 0.05 * i) for i in range(5)]
    runs = [made(f"run{i}", [(c / 10, a - 0.3), (c, a)]) for i, (c, a) in enumerate(ends)]
    fitted = compare(runs).law
    assert fitted and fitted.points == 5
    unfinished = [*runs[:4], made("run4", [ends[4]], "RUNNING")]
    assert compare(unfinished).law is None and compare(unfinished).missing == 1


@pytest.mark.timeout(60)
def test_a_single_run_is_shown_and_said_to_be_too_few() -> None:
    report = compare([made("only", [(1e-3, 0.5)])])
    assert len(words.run_rows(report)) == 1
    assert "at least two" in words.findings(report)[0]


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_command_prints_what_it_writes_and_where(written: tuple[Path, str]) -> None:
    folder, said = written
    assert said.rstrip().endswith(f"report: {folder}/report.html")
    assert "87.0 %" in said and "no clear difference" in said
    assert {file.name for file in folder.iterdir() if file.name.startswith("report.")} == {
        "report.html",
        "report.csv",
        "report.svg",
        "report.png",
    }
    rows = list(csv.DictReader((folder / "report.csv").open()))
    logged = {(name, str(step), str(a)) for name, what in PRETRAINED.items() for step, _, a in what["curve"]}
    assert {(row["run"], row["step"], row["val_accuracy"]) for row in rows} == logged


class Elements(HTMLParser):
    """Names, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]


@pytest.mark.timeout(120)
def test_nothing_of_the_page_comes_from_a_network(written: tuple[Path, str]) -> None:
    text = (written[0] / "report.html").read_text()
    found = Elements(text)
    assert not found.names & {"script", "link", "iframe", "object", "embed", "img", "image", "use"}
    assert not [a for a in found.attributes if a[1].split(":")[-1] in ("src", "href", "srcset", "data")]
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|https?://", text)


@pytest.mark.timeout(120)
def test_every_chart_has_words_for_those_who_do_not_see_it(written: tuple[Path, str]) -> None:
    found = Elements((written[0] / "report.html").read_text())
    charts = [value for tag, name, value in found.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(charts) == 4 and all(len(label) > 20 for label in charts)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_draws_the_page_within_any_width(written: tuple[Path, str], tmp_path: Path, width: int) -> None:
    wide, high = drawn((written[0] / "report.html").read_bytes(), tmp_path, width)
    assert wide <= width, "the page is wider than its window"
    assert high > 1000


# --- doors that are shut --------------------------------------------------------------------------------------------


def compare_command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run_job("compare.py", *arguments, env={"PATH": "/usr/bin:/bin", **env})


@pytest.mark.timeout(120)
def test_help_needs_nothing_but_the_command() -> None:
    said = compare_command("--help")
    assert said.returncode == 0 and "--tracking-uri" in said.stdout


@pytest.mark.timeout(120)
def test_without_any_run_one_line_says_so(tmp_path: Path, uri: str) -> None:
    for arguments in ((), ("--tracking-uri", uri, "--experiment", "another")):
        said = compare_command("--to", str(tmp_path), *arguments, HOME=str(tmp_path))
        assert said.returncode == 2
        assert re.fullmatch(r"error: no pretraining run in experiment .*\n", said.stderr), said.stderr


@pytest.mark.timeout(30)
def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        place = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"no MLflow server at {place} .*MLFLOW_TRACKING_URI"):
            check(place)


@pytest.mark.timeout(30)  # MLflow itself would go on for minutes
def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ValueError, match="no MLflow server at"):
        check(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.timeout(60)
def test_every_uri_that_mlflow_would_misread_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for wrong in ("mlruns", "file:///mlruns", f"sqlite:///{tmp_path}/file/mlflow.db"):
        with pytest.raises(ValueError):
            check(wrong)


@pytest.mark.timeout(60)
def test_where_mlflow_is_comes_from_the_first_who_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    ours = tmp_path / ".local" / "share" / "vitscale"
    assert tracking_uri(None) == f"sqlite:///{ours}/mlflow.db" and ours.is_dir()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI to a server"):
        tracking_uri(None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://team:5000")
    assert tracking_uri(None) == "http://team:5000"
    assert tracking_uri("sqlite:////mine.db") == "sqlite:////mine.db"


@pytest.mark.timeout(60)
def test_no_password_of_a_uri_reaches_the_page() -> None:
    assert page.without_password("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
