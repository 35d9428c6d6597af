"""Laws of the command line that all jobs share."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from pipeline.cli import counts, parse, run

JOBS = Path(__file__).resolve().parents[1] / "jobs"


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    end_lr: float = 0.0
    decay: Literal["linear", "cosine"] = "linear"


@dataclass(frozen=True)
class Everything:
    optim: Optim = field(default_factory=Optim)
    batch: int = 8
    flip: bool = True


def test_what_is_not_said_is_as_in_the_default() -> None:
    default = Everything(Optim(lr=0.5, decay="cosine"), batch=3)
    assert parse(Everything, [], default=default) == default
    found = parse(Everything, ["--optim.end-lr", "1e-5", "--no-flip"], default=default)
    assert found == Everything(Optim(0.5, 1e-5, "cosine"), 3, False)


@pytest.mark.parametrize("underscore", ["--optim.end_lr", "--optim.end-lr"])
def test_every_option_may_be_spelled_as_its_field(underscore: str) -> None:
    assert parse(Everything, [underscore, "2"]).optim.end_lr == 2.0


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--optim.lrr", "3"], ["--optim.lrr", "--optim.lr", "--optim.end-lr", "--optim.decay"]),
        (["--optim.lrr=3"], ["--optim.lrr", "--optim.lr", "--optim.end-lr", "--optim.decay"]),
        (["--bach", "3"], ["--bach", "--batch", "--flip", "--optim"]),
        (["--opt.lr", "3"], ["--opt.lr", "--batch", "--flip", "--optim"]),
        (["--batch", "many"], ["--batch", "many"]),
        (["--optim.lr", "fast"], ["--optim.lr", "fast"]),
        (["--optim.decay", "sudden"], ["--optim.decay", "sudden", "linear", "cosine"]),
        (["--batch"], ["--batch"]),
        (["word"], ["word"]),
    ],
)
def test_every_mistake_is_one_line_that_names_what_is_known(argv: list[str], named: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parse(Everything, argv)
    words = str(caught.value)
    assert "\n" not in words and not set(words) & set("╭│╰─")
    assert [name for name in named if name not in words] == []


def _raise(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize("error", [ValueError("two\n  lines"), OSError("two\nlines")])
def test_every_mistake_of_the_user_ends_with_one_line_and_2(error: Exception, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run(_raise(error))
    assert ended.value.code == 2 and capsys.readouterr() == ("", "error: two lines\n")


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError):
        run(_raise(AssertionError("ours")))


def test_a_main_that_returns_ends_well() -> None:
    run(lambda: None)


HEAVY = {"torch", "ray", "deepspeed", "mlflow", "webdataset", "transformers", "altair", "pandas", "pyarrow", "scipy"}
HEAVY |= {"numpy", "fsspec"}
LISTED = """
import runpy, sys
from contextlib import redirect_stdout
from io import StringIO
for line in sys.stdin.read().splitlines():
    sys.argv, before = line.split(), set(sys.modules)
    with redirect_stdout(StringIO()) as said:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, line
    assert said.getvalue(), line
    print(line, *(set(sys.modules) - before), sep="\t")
"""


def test_every_job_tells_its_options_and_plans_without_a_heavy_import() -> None:
    words = [f"{job} --help" for job in sorted(JOBS.glob("*.py"))]
    words += [
        f"{JOBS}/prepare.py digits --help",
        f"{JOBS}/pretrain.py demo --help",
        f"{JOBS}/pretrain.py demo --dry-run",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", LISTED], input="\n".join(words), capture_output=True, text=True, cwd=JOBS.parent
    )
    assert not ended.returncode, ended.stderr
    lines = [line.split("\t") for line in ended.stdout.splitlines()]
    assert [job for job, *_ in lines] == words
    assert {job: heavy for job, *loaded in lines if (heavy := HEAVY & set(loaded))} == {}


@pytest.mark.parametrize(("text", "found"), [("1", [1]), ("2:4", [2, 3, 4]), ("8", [8]), ("8:8", [8])])
def test_every_number_of_processes_is_read(text: str, found: list[int]) -> None:
    assert list(counts(text)) == found


@pytest.mark.parametrize("text", ["0", "4:2", "many", "1:2:3", "", "-1"])
def test_every_other_number_of_processes_is_refused_with_one_that_would_do(text: str) -> None:
    with pytest.raises(ValueError, match=r"at least 1 is needed|as in 2:8, is needed|goes first, 2:4"):
        counts(text)
