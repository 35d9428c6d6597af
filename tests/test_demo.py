"""`make demo`, in short: real jobs submitted to a Ray of its own, which is gone afterwards whatever happens."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "jobs"))
import demo  # noqa: E402 - a script, not a package

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def of_ray(folder: Path) -> list[str]:
    """Command lines of the processes that belong to the Ray of a demo in `folder`, or that its jobs have started."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            # in short folders Ray's files lie inside, in long ones they lie elsewhere and are named in ray.log
            if str(folder) in line or ((folder / "ray.log").exists() and _session(folder) in line):
                found.append(line)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _session(folder: Path) -> str:
    lines = (folder / "ray.log").read_text().splitlines()
    return next((word for line in lines for word in line.split() if "/session_" in word), "no session").split("/logs")[
        0
    ]


def test_a_stopped_demo_leaves_no_ray_and_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs/demo.py"), "--to", str(tmp_path / "demo"), "--quick"]

    def hears() -> None:  # also where the tests run in the background of a shell, which ignores this signal
        signal.signal(signal.SIGINT, signal.default_int_handler)

    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=hears)
    assert first.stdout
    for line in first.stdout:
        if line.startswith("[2/6]"):
            break
    assert of_ray(tmp_path / "demo")
    first.send_signal(signal.SIGINT)
    said = first.stdout.read()
    assert first.wait() == 130, said
    assert of_ray(tmp_path / "demo") == []

    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "fashion_mnist/train: 60,000 pictures in 12 shards are at" in second.stdout
    for said in (
        "demo_small: val accuracy",
        "demo: val accuracy",
        "2 of 2 trials have results",
        "report.html",
        "mlflow ui",
    ):
        assert said in second.stdout
    assert of_ray(tmp_path / "demo") == []

    third = subprocess.run(command, capture_output=True, text=True)
    assert third.returncode == 0 and "The demo has been run" in third.stdout


def test_whoever_has_no_token_is_turned_away(tmp_path: Path) -> None:
    with demo.ray_head(tmp_path) as environment:
        address = f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address, timeout=10)
        assert refused.value.code == 401
        known = urllib.request.Request(address, headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"})
        with urllib.request.urlopen(known, timeout=10) as answer:
            assert answer.status == 200
        assert os.environ.get("RAY_AUTH_TOKEN") != environment["RAY_AUTH_TOKEN"]  # told to nobody else
    assert of_ray(tmp_path) == []
