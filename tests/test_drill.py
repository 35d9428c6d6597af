"""`jobs/drill.py` holds its drills for real, and tells what did not hold from what did."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jobs import drill
from pipeline.cli import run

pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
def test_every_drill_finds_that_a_run_holds_what_is_promised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drill.main(["all", "--to", str(tmp_path / "drill")])
    said = capsys.readouterr().out
    assert said.count("  held ") == 4 * len(drill.KINDS) and "NOT HELD" not in said


@pytest.mark.parametrize("changed", [False, True])
def test_a_difference_of_one_bit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool) -> None:
    runs = []
    for name in ("quiet", "disturbed"):
        one = object.__new__(drill.Run)
        one.name, one.folder = name, tmp_path / name
        (one.folder / "export").mkdir(parents=True)
        values = np.array([0.0, -0.0 if changed and name == "disturbed" else 0.0], np.float32)
        save_file({"weight": values}, one.folder / "export" / "model.safetensors")
        runs.append(one)
    monkeypatch.setattr(drill, "losses", lambda place, name: [(1, 0.5)])
    quiet, disturbed = runs
    assert [finding.held for finding in drill.compared(tmp_path, disturbed, quiet)] == [not changed, True, True]


def test_every_line_that_is_there_twice_or_not_at_all_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = object.__new__(drill.Run)
    one.name, one.folder = "one", tmp_path
    (tmp_path / "export").mkdir()
    save_file({"weight": np.zeros(1, np.float32)}, tmp_path / "export" / "model.safetensors")
    quiet = object.__new__(drill.Run)
    quiet.name, quiet.folder = "quiet", tmp_path
    wanted = [(1, 0.5), (2, 0.25)]
    for logged, held in (
        (wanted, (True, True)),
        ([*wanted, (2, 0.25)], (False, False)),
        (wanted[:1], (False, False)),
        ([(1, 0.5), (2, 0.125)], (True, False)),
    ):
        monkeypatch.setattr(drill, "losses", lambda place, name, logged=logged: logged if name == "one" else wanted)
        assert tuple(finding.held for finding in drill.compared(tmp_path, one, quiet)[1:]) == held


@pytest.mark.parametrize(
    ("said", "step", "held"),
    [
        ("x: goes on after step 1,030 of 1,600", None, True),
        ("x: goes on after step 30 of 160", 30, True),
        ("x: goes on after step 40 of 160", 30, False),
        ("160 steps", None, False),
    ],
)
def test_a_run_that_began_anew_or_elsewhere_has_not_gone_on(said: str, step: int | None, held: bool) -> None:
    assert drill.went_on(said, "", step).held == held


def test_every_mistake_is_answered_by_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").touch()
    for words, said in (
        (["earthquake"], "no drill 'earthquake'; there are: kill-worker, truncate-checkpoint, all"),
        (["all", "--to", str(tmp_path)], "is not empty: a drill needs a folder of its own"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(lambda words=words: drill.main(words))
        assert ended.value.code == 2 and said in capsys.readouterr().err
