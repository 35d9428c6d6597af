"""Lines of progress and what is made of them: stages on a terminal."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shards.progress import Progress, ProgressReading, duration, read
from shards.stages import LiveStages, StageProgress


@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_a_line_of_progress_reads_as_what_it_was_made_of(done: int, total: int) -> None:
    said: list[str] = []
    Progress("digits/train800", total, "pictures", every=0.0, say=said.append).update(done, MB_s="1.0")
    assert read(said[0]) == ProgressReading("digits/train800", done, total, "pictures")


def test_other_lines_are_no_progress() -> None:
    for line in ("demo: val accuracy 85.10 % after 468 steps; /runs/demo/export", "digits: 9 pictures in 1 shards", ""):
        assert read(line) is None


def test_progress_says_nothing_while_nothing_changes() -> None:
    said: list[str] = []
    progress = Progress("digits", 9, "pictures", every=0.0, say=said.append)
    for done in (0, 0, 0, 4, 4, 9):
        progress.update(done)
    assert [line.split(" of ")[0] for line in said] == ["digits: 0", "digits: 4", "digits: 9"]


def heard(*lines: tuple[float, str], total: int = 0) -> StageProgress:
    stage = StageProgress("a stage", total, result=r"val accuracy [\d.]+ %")
    stage.begin(100.0)
    for now, line in lines:
        stage.hear(line, now)
    return stage


def test_the_time_left_is_what_the_rate_says_and_runs_down_between_lines() -> None:
    stage = heard((110.0, "demo: 100 of 500 steps (20 %)"), (120.0, "demo: 200 of 500 steps (40 %)"))
    assert stage.rate() == 10.0
    assert [stage.left(now) for now in (120.0, 125.0, 150.0, 200.0)] == [30.0, 25.0, 0.0, 0.0]
    assert stage.row(125.0) == (0.4, "200 of 500", "10.0/s", "25 s left")


def test_a_stage_of_several_sets_counts_the_images_of_all() -> None:
    stage = heard(
        (101.0, "train: 0 of 60 pictures (0 %)"),
        (103.0, "train: 60 pictures in 12 shards, 138.8 MB, at /sets/train"),
        (104.0, "test: 20 of 40 pictures (50 %), 1.0/s"),
        total=100,
    )
    assert stage.row(104.0)[:2] == (0.8, "80 of 100")


def test_a_stage_without_lines_says_for_how_long_and_one_that_has_ended_what_came_of_it() -> None:
    assert StageProgress("a stage").row(100.0) == (0.0, "", "", "")
    assert heard().row(142.0) == (None, "", "", f"{duration(42)} so far")
    stage = heard((110.0, "demo: val accuracy 85.10 % after 468 steps; /runs/demo/export"))
    stage.end(131.0)
    assert stage.row(200.0) == (1.0, "val accuracy 85.10 %", "", "took 31 s")


@pytest.mark.parametrize("width", [80, 120])
def test_every_stage_has_a_row_that_fits_the_terminal(width: int) -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    stages = [
        StageProgress("prepare the images", 86_797),
        StageProgress("pretrain demo_medium"),
        StageProgress("fine-tune"),
    ]
    with LiveStages(stages, console) as view:
        view.begin(stages[0])
        view.hear(stages[0], "fashion_mnist/train: 60,000 of 60,000 pictures (100 %)")
        view.end(stages[0])
        view.begin(stages[1])
        view.hear(stages[1], "demo_medium: 120 of 586 steps (20 %), 30.1/s, 15 s left, " + "and more " * 20)
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.getvalue()).replace("\r", "\n").splitlines()
    rows = [line.rstrip() for line in frames if line.startswith("[")][-3:]
    assert [row[:5] for row in rows] == ["[1/3]", "[2/3]", "[3/3]"]
    assert all(stage.title in row and len(row) <= width for stage, row in zip(stages, rows, strict=True))
    assert "took" in rows[0] and "120 of 586" in rows[1] and "so far" in rows[1]
