"""The whole chain on this machine, on real pictures: prepare, pretrain three times, fine-tune, compare.

    python jobs/demo.py [--to demo] [--quick]

Starts a Ray of its own with token authentication, submits the very jobs that run on a cluster, one after the other,
and stops that Ray again. What is there already is not done again.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from pipeline import code
from pipeline.cli import parse, run

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 120
STOP_SECONDS = 45
SOCKET_PATH = 107 - len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.00")
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+"
NOISE = re.compile(rf"{STAMP}(INFO|SUCC|WARNING working_dir.py)|Running entrypoint for job |\s*$")
ENDED = re.compile(
    rf"{STAMP}(SUCC|ERR) cli.py.*Job '\S+' (succeeded|failed|was stopped)"
)  # then Ray repeats the last lines


@dataclass(frozen=True)
class Arguments:
    """Where everything goes, and how much of it there is."""

    to: str = "demo"
    """Folder for everything that is downloaded or made."""
    quick: bool = False
    """Only so much that every stage runs: results are worth nothing."""


@dataclass(frozen=True)
class Stage:
    """A job of the chain."""

    title: str
    command: tuple[str, ...]


def stages(folder: Path, quick: bool) -> list[Stage]:
    """The jobs, in order."""
    sets, runs = f"{folder}/sets", f"{folder}/runs"
    few = ("--duration", "0.05", "--optim.warmup", "5") if quick else ()
    less = ("--tasks", "digits", "--seeds", "1", "--rates", "0.03") if quick else ()
    data = ("--data.shards", f"{sets}/fashion_mnist/train", "--data.validation", f"{sets}/fashion_mnist/test")
    sizes = {
        "demo_small": ("--model.width", "32", "--model.depth", "4", "--model.hidden", "128", "--duration", "2"),
        "demo_medium": ("--model.width", "48", "--model.depth", "4", "--model.hidden", "192", "--duration", "3"),
        "demo": (),
    }
    pretrainings = [
        Stage(
            f"pretrain {name}",
            ("pretrain.py", "demo", "--run", name, *data, "--to", runs, "--processes", "2", *size, *few),
        )
        for name, size in sizes.items()
    ]
    prepared = ("fashion_mnist", "digits", "mnist", "fashion_offset")
    return [
        Stage("prepare the pictures", ("prepare.py", ",".join(prepared), "--to", sets)),
        *pretrainings,
        Stage(
            "fine-tune to the downstream tasks",
            (
                "finetune.py",
                "--checkpoint",
                f"{runs}/demo",
                "--data",
                sets,
                "--to",
                f"{folder}/transfer",
                "--scratch",
                *less,
            ),
        ),
        Stage("compare", ("compare.py", "--to", f"{folder}/report")),
    ]


def main(argv: list[str]) -> None:
    """Run the chain, or say that it has been run."""
    arguments = parse(Arguments, argv)
    folder = Path(arguments.to).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chain = stages(folder, arguments.quick)
    done = folder / "done.json"
    asked = [list(stage.command) for stage in chain]
    if done.exists() and json.loads(done.read_text()) == asked:
        print(f"The demo has been run; `make clean` removes it.\n{_where(folder)}")
        return
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the Ray is stopped then, too
    with ray_head(folder) as environment:
        for number, stage in enumerate(chain, 1):
            print(f"\n[{number}/{len(chain)}] {stage.title}", flush=True)
            submit(stage, folder, environment)
    done.write_text(json.dumps(asked))
    print(f"\nAll done in {(time.monotonic() - began) / 60:.1f} minutes.\n{_where(folder)}")


def _where(folder: Path) -> str:
    mlflow = Path(sys.executable).with_name("mlflow")
    return (
        f"The report:     {folder}/report/report.html\n"
        f"MLflow's pages: {mlflow} ui --backend-store-uri {tracking_uri(folder)}"
    )


def tracking_uri(folder: Path) -> str:
    """The demo's MLflow."""
    return f"sqlite:///{folder}/mlflow.db"


def submit(stage: Stage, folder: Path, environment: dict[str, str]) -> None:
    """Submit a job and show what it prints until it ends; RuntimeError where it fails."""
    told = {"MLFLOW_TRACKING_URI": tracking_uri(folder), "VITSCALE_CODE": code.version()}
    command = [
        _beside_python("ray"), "job", "submit", "--working-dir", str(ROOT),
        "--runtime-env-json", json.dumps({"env_vars": told}), "--",
        "python", f"jobs/{stage.command[0]}", *stage.command[1:],
    ]  # fmt: skip
    job = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert job.stdout
    try:
        for line in takewhile(lambda line: not ENDED.match(line), job.stdout):
            if not NOISE.match(line):
                print(f"  {line}", end="", flush=True)
        job.stdout.read()
        failed = job.wait()
    finally:
        job.kill()
    if failed:
        raise RuntimeError(f"{stage.title} has failed; started again, the demo goes on where it was")


@contextmanager
def ray_head(folder: Path) -> Iterator[dict[str, str]]:
    """A Ray on this machine, reachable with the environment that this yields, and stopped at the end."""
    gcs, dashboard, client, agent = free_ports(4)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    temporary = folder / "ray"
    aside = len(str(temporary)) > SOCKET_PATH  # a socket's path cannot be longer
    if aside:
        temporary = Path(tempfile.mkdtemp(prefix="vitscale-"))
    command = [
        _beside_python("ray"), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address", "127.0.0.1", "--port", str(gcs),
        "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
        "--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent),
        "--min-worker-port", "0", "--max-worker-port", "0",
        "--num-cpus", str(max(2, os.cpu_count() or 2)), "--temp-dir", str(temporary),
    ]  # fmt: skip
    log = folder / "ray.log"
    print(f"Starting a Ray on this machine (its log: {log})", flush=True)
    with log.open("w") as output:
        head = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us; we stop it in order
        )  # fmt: skip
    try:
        wait_for(head, environment, log)
        yield environment
    finally:
        print("Stopping the Ray", flush=True)
        stop(head)
        if aside:
            shutil.rmtree(temporary, ignore_errors=True)


def wait_for(head: subprocess.Popen, environment: dict[str, str], log: Path) -> None:
    """Return when jobs can be submitted; RuntimeError where that does not come about."""
    request = urllib.request.Request(
        f"{environment['RAY_API_SERVER_ADDRESS']}/api/version",
        headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"},
    )
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit and head.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RuntimeError(f"Ray has not started; see {log}")


def stop(head: subprocess.Popen) -> None:
    """End the Ray and all that it has started."""
    head.terminate()
    with suppress(subprocess.TimeoutExpired):
        head.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _beside_python(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
