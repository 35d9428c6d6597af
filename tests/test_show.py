"""What `jobs/show.py` shows is what the run was given."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import to_dict
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Feed
from pipeline.insight.batch import batch
from pipeline.world import World
from tests import tiny
from tests.gang import run_job

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder before its first step."""
    shards = tiny.shard_set(tmp_path / "set")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(tiny.config(shards))))
    (tmp_path / "run" / "about.json").write_text(json.dumps({"code": "x", "data": {"training": shards.manifest.root}}))
    return tmp_path / "run"


@pytest.mark.parametrize("step", [0, 3, 19])
def test_what_is_shown_of_every_step_is_what_the_processes_were_given(run: Path, tmp_path: Path, step: int) -> None:
    shards = tiny.ShardSet(str(tmp_path / "set"))
    config = replace(tiny.config(shards), micro_batch=2)
    given = []
    for rank in range(4):
        given += list(Feed(Corpus([shards]), config, World(rank, 4)).training(step, step + 1))
    pixels = np.concatenate([one.images.numpy() for one in given])
    keys = [f"picture-{sample:04}" for one in given for sample in one.samples.tolist()]
    shown = list(batch(str(run), step))
    assert [one.key for one in shown] == keys
    assert np.array_equal(np.stack([one.pixels for one in shown]), pixels)
    assert [one.classes for one in shown] == [
        (f"class {label}",) for one in given for label in one.labels[:, 0].tolist()
    ]


def show(*words: object) -> subprocess.CompletedProcess[str]:
    return run_job("show.py", *words)


def test_the_command_lists_and_draws_the_step_wherever_the_shards_lie_now(run: Path, tmp_path: Path) -> None:
    (tmp_path / "set").rename(tmp_path / "moved")
    done = show("batch", run, "--step", 2, "--shards", tmp_path / "moved", "--sheet", tmp_path / "step.png")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 17 and lines[0].split()[0].endswith(".tar") and lines[-1] == f"sheet: {tmp_path}/step.png"
    with Image.open(tmp_path / "step.png") as sheet:
        assert sheet.width > 4 * 112


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["batch", "/nowhere", "--step", "1"], "/nowhere holds no run: it has no config.json"),
        (["batch", "RUN", "--step", "20"], "there is no step 20: RUN has the steps 0 to 19"),
        (["batch", "RUN", "--step", "-1"], "there is no step -1: RUN has the steps 0 to 19"),
        (["batch", "RUN", "--step", "1", "--shards", "OTHER"], "OTHER does not hold the pictures of RUN"),
        (["batch"], "show takes the word batch and the run's folder, then --step"),
        (["step", "RUN"], "show takes the word batch and the run's folder, then --step"),
    ],
)
def test_every_mistake_is_answered_in_one_line(run: Path, tmp_path: Path, words: list[str], answer: str) -> None:
    other = tiny.shard_set(tmp_path / "other", sizes=(32,)).folder.absolute
    places = {"RUN": str(run), "OTHER": other}
    done = show(*(places.get(word, word) for word in words))
    for name, place in places.items():
        answer = answer.replace(name, place)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {answer}")
