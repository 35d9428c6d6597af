"""`jobs/drill.py` holds its drills for real, and tells what did not hold from what did."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster
from safetensors.numpy import save

from jobs import drill
from pipeline.cli import run
from pipeline.data.plan import ends_epoch
from pipeline.train.folder import Job
from pipeline.train.objective import Objective
from pipeline.world import World
from shards.storage import Folder
from tests.gang import run_job

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(600)


# --- for real -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_drill_that_a_machine_alone_can_hold_finds_that_a_run_holds_what_is_promised(
    tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    drill.main(["all", "--to", str(tmp_path / "drill")])
    said = capsys.readouterr().out
    assert "NOT HELD" not in said and said.count("  held ") == 4 + 4 + 5, said
    assert said.count("  not tried: it needs ") == 2
    assert "step 22 was left out, and its pictures named: 00" in said


def script(kind: str, to: str, **environment: str) -> str:
    """What `python jobs/drill.py` says, which has to end well."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    ended = run_job("drill.py", kind, "--to", to, env={**kept, **environment}, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "NOT HELD" not in ended.stdout and "not tried" not in ended.stdout
    return ended.stdout


@pytest.mark.slow
def test_a_run_whose_node_is_drained_holds_what_is_promised(tmp_path: Path, cluster: Cluster) -> None:
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    mlflow = f"sqlite:///{tmp_path}/mlflow.db"
    said = script("drain-node", str(tmp_path / "drill"), RAY_ADDRESS=str(cluster.address), MLFLOW_TRACKING_URI=mlflow)
    assert said.count("  held ") == 5


@pytest.mark.slow
def test_a_run_whose_bucket_does_not_answer_holds_what_is_promised(s3: str, address: str, tmp_path: Path) -> None:
    mlflow = f"sqlite:///{tmp_path}/mlflow.db"
    assert script("s3-faults", s3, RAY_ADDRESS=address, MLFLOW_TRACKING_URI=mlflow).count("  held ") == 4


# --- what is found --------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> drill.Place:
    """A place with two runs that have exported the same."""
    made = drill.Place(Folder(str(tmp_path)), drill.small("", ""), "root", "")
    for name in ("quiet", "disturbed"):
        put(made, name, np.array([0.0], np.float32))
    return made


def put(place: drill.Place, name: str, weight: np.ndarray) -> None:
    (place.of(name) / "export").write("model.safetensors", save({"weight": weight}))


@pytest.mark.parametrize(
    ("weight", "held"),
    [
        (np.array([0.0], np.float32), True),
        (np.array([-0.0], np.float32), False),
        (np.array([[0.0]], np.float32), False),
        (np.array([0], np.int32), False),
    ],
)
def test_a_difference_of_one_bit_is_found(
    place: drill.Place, monkeypatch: pytest.MonkeyPatch, weight: np.ndarray, held: bool
) -> None:
    put(place, "disturbed", weight)
    monkeypatch.setattr(place, "losses", lambda name: [(1, "0.5")])
    assert [finding.held for finding in drill.compared(place, "disturbed", "quiet")] == [held, True, True]


def test_every_line_that_is_there_twice_or_not_at_all_is_found(
    place: drill.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [(1, "0.5"), (2, "nan")]
    for logged, held in (
        (wanted, (True, True)),
        ([*wanted, (2, "nan")], (False, False)),
        (wanted[:1], (False, False)),
        ([(1, "0.5"), (2, "0.125")], (True, False)),
    ):
        found = {"quiet": wanted, "disturbed": logged}
        monkeypatch.setattr(place, "losses", found.__getitem__)
        assert tuple(finding.held for finding in drill.compared(place, "disturbed", "quiet"))[1:] == held


@pytest.mark.parametrize(
    ("said", "steps", "held"),
    [
        ("x: goes on after step 1,030 of 1,600", (), True),
        ("x: goes on after step 30 of 160", (30,), True),
        ("x: goes on after step 30 of 160", (20, 30), True),
        ("x: goes on after step 40 of 160", (30,), False),
        ("x: goes on after step 30 of 160\nx: goes on after step 30 of 160", (30,), False),
        ("160 steps", (), False),
    ],
)
def test_a_run_that_began_anew_or_elsewhere_has_not_gone_on(said: str, steps: tuple[int, ...], held: bool) -> None:
    assert drill.went_on(said, "", *steps).held == held


def test_a_drill_whose_run_fails_has_not_held(
    place: drill.Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(place: drill.Place) -> Iterator[drill.Finding]:
        """Never held."""
        yield drill.Finding(True, "it began")
        raise RuntimeError("fails failed: the disk is full")

    monkeypatch.setattr(drill, "KINDS", {"fails": fails})
    monkeypatch.setattr(drill.Place, "open", lambda *_: place)
    with pytest.raises(SystemExit) as ended:
        drill.main(["all"])
    assert ended.value.code == 1
    assert "NOT HELD it came to its end: fails failed: the disk is full" in capsys.readouterr().out


def test_a_drill_that_cannot_be_held_here_is_an_error_only_where_it_is_asked_for(
    place: drill.Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drill.drills(place, ["s3-faults"], by_name=False) == []
    assert "  not tried: it needs --to s3://bucket/prefix\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="s3-faults needs --to s3://bucket/prefix"):
        drill.drills(place, ["s3-faults"], by_name=True)


# --- faults ---------------------------------------------------------------------------------------------------------


class Watch:
    def __init__(self) -> None:
        self.told: list[int] = []

    def step(self, done: int) -> None:
        self.told.append(done)


def test_a_fault_begins_after_its_step_and_goes_on_after_each_further_one() -> None:
    seen: list[int] = []
    watch = Watch()

    def fault() -> Iterator[None]:
        for _ in range(2):
            seen.append(watch.told[-1])
            yield

    told = drill.Told(watch, fault())
    for done in range(1, drill.STEPS + 1):
        told.step(done)
    assert seen == [drill.AT, drill.AT + 1] and watch.told == list(range(1, drill.STEPS + 1))


def test_the_step_of_the_fault_ends_neither_an_epoch_nor_with_a_checkpoint_and_two_are_before_it() -> None:
    # Else it is told twice, and one loss that is no number would be over before its step.
    assert drill.AT % drill.SAVE_EVERY and not ends_epoch(drill.AT, drill.BATCH, drill.PICTURES)
    assert drill.AT > 2 * drill.SAVE_EVERY and drill.AT + 2 * drill.SAVE_EVERY < drill.STEPS


def test_one_loss_is_no_number_on_one_process_once_for_the_run(tmp_path: Path) -> None:
    job, whole = Job(drill.small("", ""), str(tmp_path), "", "", "drill"), Objective.__call__
    for rank, spoilt in ((0, False), (1, True), (1, False)):
        fault = drill.no_number(job, World(rank, 2))
        next(fault, None)
        assert (Objective.__call__ is not whole) == spoilt
        next(fault, None)
        assert Objective.__call__ is whole


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_every_mistake_is_answered_by_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").touch()
    kinds = "kill-worker, drain-node, s3-faults, nan-batch, truncate-checkpoint, all"
    for words, address, said in (
        (["earthquake"], "", f"no drill 'earthquake'; there are: {kinds}"),
        (["all", "--to", str(tmp_path)], "", "is not empty: a drill needs a folder of its own"),
        (["s3-faults", "--to", str(tmp_path)], "", "s3-faults needs --to s3://bucket/prefix"),
        (["all"], "127.0.0.1:1", "--to is missing: on a cluster, a drill needs a folder or URL"),
    ):
        if address:
            monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(SystemExit) as ended:
            run(lambda words=words: drill.main(words))
        assert ended.value.code == 2 and said in capsys.readouterr().err
