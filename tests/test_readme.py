"""The README says what is so: its commands run, its table is that of the files."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from pipeline import experiments
from shards.datasets import known
from tests.gang import run_job

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for line in README.split("```sh")[2].split("```")[0].splitlines() if line.strip()]

# What makes a command of the README short enough for a test, without changing what it is.
SHORT = {
    "prepare.py": ["--samples-per-shard", "20000"],
    "pretrain.py": ["--duration", "0.02", "--optim.warmup", "2", "--model.width", "16", "--model.depth", "1"],
    "finetune.py": ["--tasks", "digits", "--rates", "0.03", "--seeds", "1"],
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_of_the_readme_runs_one_after_the_other(address: str, tmp_path: Path) -> None:
    given = {"HOME": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/ml.db", "RAY_ADDRESS": address}
    given |= {"PATH": "/usr/bin:/bin", **{name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}}
    for command in COMMANDS:
        python, script, *options = shlex.split(command)
        assert python == "python"
        short = [] if "--dry-run" in options else SHORT.get(Path(script).name, [])
        ended = run_job(ROOT / script, *options, *short, env=given, cwd=tmp_path)
        assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
    assert "pretrained" in (tmp_path / "work/report/report.html").read_text()


def test_every_experiment_stands_in_the_readme_as_its_file_says() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", README, re.MULTILINE)
    assert rows == [(name, experiments.summary(name)) for name in experiments.known()]


def test_every_file_and_folder_of_the_readme_is_there() -> None:
    tree = README.split("## What lies where")[1].split("```")[1]
    top = ""
    for line in tree.splitlines():
        top = line.split()[0] if line and not line.startswith(" ") else top
        inside = top if line.startswith("  ") else ""
        for name in re.findall(r"^ {0,2}([\w./]+(?: [\w./]+)*) {2,}", line):
            for one in name.split():
                assert (ROOT / inside / one).exists(), one


def test_every_data_set_and_form_that_the_documentation_names_is_there() -> None:
    named = re.findall(r"prepare\.py (\w[\w,]*)", (ROOT / "docs/shards.md").read_text())
    every = {name for names in named for name in names.split(",")} - {"", "index", "subset", "verify", "describe"}
    assert len(every) > 10 and every <= known().keys()


def test_every_script_of_jobs_is_named_like_no_module_of_the_standard_library() -> None:
    assert not {path.stem for path in (ROOT / "jobs").glob("*.py")} & sys.stdlib_module_names
