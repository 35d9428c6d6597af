"""`make demo`, in short: real jobs submitted to a Ray of its own, which is gone afterwards whatever happens."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "jobs"))
import demo  # noqa: E402 - a script, not a package

from shards.stages import LiveStages, PrintedStages  # noqa: E402


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files whose path is short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="demo-"))
    yield folder
    shutil.rmtree(folder)


def of_ray(temporary: Path) -> list[str]:
    """Command lines of the processes of a demo with this folder for temporary files, but for its own."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if "jobs/demo.py" not in line and (
                str(temporary) in line or process.environ().get("TMPDIR") == str(temporary)
            ):
                found.append(line)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def refuses_strangers(environment: dict[str, str]) -> None:
    """Fails unless the Ray answers those alone who have its token, which nobody else was told."""
    address = f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(address, timeout=60)
    assert refused.value.code == 401
    known = urllib.request.Request(address, headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"})
    with urllib.request.urlopen(known, timeout=60) as answer:
        assert answer.status == 200
    assert os.environ.get("RAY_AUTH_TOKEN") != environment["RAY_AUTH_TOKEN"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_demo_leaves_no_ray_and_goes_on_where_it_was(tmp_path: Path, temporary: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs/demo.py"), "--to", str(tmp_path / "demo"), "--quick"]
    settings = {**os.environ, "TMPDIR": str(temporary)}

    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings)
    assert first.stdout
    for line in first.stdout:
        if line.startswith("[2/5]"):
            break
    assert of_ray(temporary) and list(temporary.glob("vitscale-*/session_*"))
    (head,) = (child for child in psutil.Process(first.pid).children() if "start" in child.cmdline())
    refuses_strangers(head.environ())
    first.send_signal(signal.SIGINT)
    said = first.stdout.read()
    assert first.wait() == 130, said
    assert of_ray(temporary) == []
    assert not list(temporary.glob("vitscale-*/session_*")) and not (tmp_path / "demo/ray.log").exists()

    second = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "fashion_mnist/train: 60,000 pictures in 12 shards are at" in second.stdout
    for said in (
        "demo_small: val accuracy",
        "demo: val accuracy",
        "2 of 2 trials have results",
        "report.html",
        "mlflow ui",
        "prepare.py folder --name mine",
    ):
        assert said in second.stdout
    assert of_ray(temporary) == []
    assert not list(temporary.glob("vitscale-*/session_*")) and not (tmp_path / "demo/ray.log").exists()

    third = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert third.returncode == 0 and "The demo has been run" in third.stdout


def test_the_files_of_a_ray_that_fails_are_kept_and_their_place_is_said(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(demo, "_beside_python", lambda name: script(tmp_path / name, "echo no room; exit 1"))
    with pytest.raises(RuntimeError, match=r"Ray has not started; see .*ray\.log"), demo.ray_head(tmp_path):
        raise AssertionError("a Ray that has not started is nobody's to use")
    said = capsys.readouterr().out
    assert (tmp_path / "ray.log").read_text() == "no room\n" and str(tmp_path / "ray.log") in said
    (session,) = temporary.iterdir()
    assert str(session) in said


@pytest.mark.parametrize("kind", [PrintedStages, LiveStages])
def test_a_stage_that_fails_shows_all_that_its_job_has_printed(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = ["digits: 1 of 9 pictures (11 %)", "Traceback (most recent call last):", "error: [bold] no room"]
    prints = "; ".join(f"echo '{line}'" for line in lines)
    monkeypatch.setattr(demo, "_beside_python", lambda name: script(tmp_path / name, f"{prints}; exit 1"))
    stage = demo.DemoStage("prepare", command=("prepare.py",))
    with pytest.raises(RuntimeError, match="prepare has failed"), kind([stage]) as view:
        demo.submit(stage, tmp_path, dict(os.environ), view, every=5)
    said = capsys.readouterr().out
    assert all(f"  {line}\n" in said for line in lines)


def script(path: Path, commands: str) -> str:
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return str(path)
