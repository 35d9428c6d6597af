"""The whole chain on this machine, on real images: prepare, pretrain three times, fine-tune, compare.

    python jobs/demo.py [--to demo] [--full | --quick]

Starts a Ray of its own with token authentication, submits the very jobs that run on a cluster, one after the other,
and stops that Ray again. What is there already is not done again. On a terminal it shows the stages as they go, and
elsewhere the lines that the jobs print.
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
from typing import NamedTuple

from pipeline import code
from pipeline.cli import parse, run
from shards.progress import EVERY
from shards.stages import LiveStages, PrintedStages, StageProgress

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 300
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

    to: str = ""
    """Folder for everything that is downloaded or made; demo if empty, or demo/full with --full."""
    full: bool = False
    """Longer pretrainings and fine-tunings, and more learning rates: about 14 minutes on two cores."""
    quick: bool = False
    """Only so much that every kind of stage runs: results are worth nothing."""


class DemoSize(NamedTuple):
    """How much of everything is done."""

    runs: dict[str, tuple[str, ...]]
    """Options of each pretraining by its name, from little compute to much."""
    tasks: str
    """Downstream tasks, each also the name of its data set."""
    transfer: tuple[str, ...]
    """Options of the fine-tuning."""


def model(width: int, depth: int) -> tuple[str, ...]:
    """A ViT of this size."""
    return "--model.width", f"{width}", "--model.depth", f"{depth}", "--model.hidden", f"{4 * width}"


TASKS = "digits,mnist,fashion_offset"
SHORT = DemoSize(
    {
        "demo_small": (*model(32, 4), "--duration", "1"),
        "demo_medium": (*model(48, 4), "--duration", "1.25"),
        "demo": (*model(64, 4), "--duration", "2"),
    },
    TASKS,
    ("--protocol", "demo-short"),
)
FULL = DemoSize(
    {
        "demo_small": (*model(32, 4), "--duration", "2"),
        "demo_medium": (*model(48, 4), "--duration", "3"),
        "demo": (),
    },
    TASKS,
    (),
)
FEW = ("--duration", "0.05", "--optim.warmup", "5")
QUICK = DemoSize(
    {"demo_small": (*model(32, 4), *FEW), "demo": FEW},
    "digits",
    ("--protocol", "demo-short", "--seeds", "1", "--rates", "0.03"),
)


@dataclass(eq=False)
class DemoStage(StageProgress):
    """A stage, and the command that does it."""

    command: tuple[str, ...] = ()


def stages(folder: Path, size: DemoSize) -> list[DemoStage]:
    """The jobs, in order."""
    from shards.datasets import find

    sets, runs, transfer = f"{folder}/sets", f"{folder}/runs", f"{folder}/transfer"
    data = ("--data.shards", f"{sets}/fashion_mnist/train", "--data.validation", f"{sets}/fashion_mnist/test")
    names = ["fashion_mnist", *size.tasks.split(",")]
    images = sum(count or 0 for name in names for count in find(name).splits.values())
    pretrain = [
        DemoStage(
            f"pretrain {name}",
            result=r"val accuracy [\d.]+ %",
            command=("pretrain.py", "demo", "--run", name, *data, "--to", runs, "--processes", "2", *options),
        )
        for name, options in size.runs.items()
    ]
    checkpoint = f"{runs}/{list(size.runs)[-1]}"
    finetune = ("finetune.py", "--checkpoint", checkpoint, "--data", sets, "--to", transfer, "--scratch")
    return [
        DemoStage("prepare the images", images, command=("prepare.py", ",".join(names), "--to", sets)),
        *pretrain,
        DemoStage("fine-tune", command=(*finetune, "--tasks", size.tasks, *size.transfer)),
        DemoStage("compare", command=("compare.py", "--to", f"{folder}/report")),
    ]


def main(argv: list[str]) -> None:
    """Run the chain, or say that it has been run."""
    arguments = parse(Arguments, argv)
    size = QUICK if arguments.quick else FULL if arguments.full else SHORT
    folder = Path(arguments.to or ("demo/full" if arguments.full else "demo")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chain = stages(folder, size)
    done = folder / "done.json"
    asked = [list(stage.command) for stage in chain]
    if done.exists() and json.loads(done.read_text()) == asked:
        print(f"The demo has been run; `make clean` removes it.\n{_next(folder)}")
        return
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the Ray is stopped then, too
    watched = sys.stdout.isatty()
    with ray_head(folder) as environment, LiveStages(chain) if watched else PrintedStages(chain) as view:
        for stage in chain:
            submit(stage, folder, environment, view, every=1 if watched else 5)
    if watched:
        print("".join(f"{line}\n" for line in chain[-1].lines))  # what has come of it all
    done.write_text(json.dumps(asked))
    print(f"\nAll done in {(time.monotonic() - began) / 60:.1f} minutes.\n{_next(folder)}")


def _next(folder: Path) -> str:
    python, mlflow = _short(_beside_python("python")), _short(_beside_python("mlflow"))
    own = f"folder --name mine --source IMAGES --to {_short(folder / 'sets')}"
    return (
        f"The report:      {folder}/report/report.html\n"
        f"MLflow's pages:  {mlflow} ui --backend-store-uri {tracking_uri(folder)}\n"
        f"Your own images: {python} {_short(ROOT / 'jobs/prepare.py')} {own}  # IMAGES has a folder for each class"
    )


def _short(path: str | Path) -> str:
    """The path as it reads from here."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else str(path)


def tracking_uri(folder: Path) -> str:
    """The demo's MLflow."""
    return f"sqlite:///{folder}/mlflow.db"


def submit(
    stage: DemoStage, folder: Path, environment: dict[str, str], view: LiveStages | PrintedStages, *, every: float
) -> None:
    """Submit a job and show what it prints until it ends; RuntimeError where it fails.

    `every` is the number of seconds from one line of progress to the next.
    """
    told = {"MLFLOW_TRACKING_URI": tracking_uri(folder), "VITSCALE_CODE": code.version(), EVERY: f"{every:g}"}
    command = [
        _beside_python("ray"), "job", "submit", "--working-dir", str(ROOT),
        "--runtime-env-json", json.dumps({"env_vars": told}), "--",
        "python", f"jobs/{stage.command[0]}", *stage.command[1:],
    ]  # fmt: skip
    job = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert job.stdout
    view.begin(stage)
    try:
        for line in takewhile(lambda line: not ENDED.match(line), job.stdout):
            if not NOISE.match(line):
                view.hear(stage, line.rstrip("\n"))
        job.stdout.read()
        failed = job.wait() != 0
    finally:
        job.kill()
    view.end(stage, failed)
    if failed:
        raise RuntimeError(f"{stage.title} has failed; started again, the demo goes on where it was")


@contextmanager
def ray_head(folder: Path) -> Iterator[dict[str, str]]:
    """A Ray on this machine, reachable with the environment that this yields, and stopped at the end.

    Its files are removed then, unless something has failed.
    """
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
    print("Starting a Ray on this machine", flush=True)
    with log.open("w") as output:
        head = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us; we stop it in order
        )  # fmt: skip
    failed = False
    try:
        wait_for(head, environment, log)
        yield environment
    except Exception:  # but neither Ctrl-C nor SIGTERM, after which nothing is to be looked up
        failed = True
        raise
    finally:
        print("Stopping the Ray", flush=True)
        stop(head)
        if failed:
            print(f"Ray's own files are kept, its log in {log}, those of its session in {temporary}", flush=True)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
            log.unlink()


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
