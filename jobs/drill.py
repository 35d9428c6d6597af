"""A fire drill: a small run is disturbed on purpose, and what comes of it is compared with a quiet one.

    python jobs/drill.py kill-worker            a process of the run dies, as one that is out of memory does
    python jobs/drill.py truncate-checkpoint    all of the run dies, and its newest checkpoint has lost its end
    python jobs/drill.py all [--to FOLDER]      one after the other

Runs on a Ray of this machine (Linux) in FOLDER, or in a folder that is removed. Exit code 1 where something that is
promised did not hold.
"""

import atexit
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import parse, run

JOBS = Path(__file__).resolve().parent
STEPS, SAVE_EVERY, CLASSES, PICTURES, SIDE = 160, 10, 3, 48, 12
END_SECONDS = 600
OPTIONS = {
    "classes": CLASSES, "model.width": 16, "model.depth": 2, "model.heads": 2, "model.hidden": 32, "model.patch": 4,
    "model.image-size": SIDE, "model.dropout": 0.1, "data.lanes": 8, "batch": 16, "duration": STEPS, "unit": "steps",
    "optim.warmup": 5, "save-every": SAVE_EVERY, "log-every": 2, "keep": 3, "processes": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Drill:
    """Where it is held."""

    to: str = ""
    """Folder that keeps all that the drill makes; a temporary one if empty."""


class Run:
    """`python jobs/pretrain.py` with a small model, in the folder of the drill; goes on from what it finds there."""

    def __init__(self, place: Path, name: str) -> None:
        self.name, self.folder = name, place / "runs" / name
        options = {**OPTIONS, "data.shards": place / "set", "data.cache": place / "cache", "to": place / "runs"}
        options |= {"run": name, "tracking-uri": tracking_uri(place)}
        kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        self._output = (place / f"{name}.log").open("a+")
        self._began = self._output.tell()
        self._process = subprocess.Popen(
            [sys.executable, str(JOBS / "pretrain.py"), "demo", *(f"--{k}={v}" for k, v in options.items())],
            env=kept,
            cwd=JOBS.parent,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        atexit.register(self.close)

    def workers(self) -> list[int]:
        """Its processes that train."""
        found = {self._process.pid}
        while more := {pid for pid, parent in _parents().items() if parent in found} - found:
            found |= more
        return [pid for pid in sorted(found) if b"TrainWorker" in _command(pid)]

    def wait_for_checkpoint(self, after: int) -> None:
        """Return when there is a complete checkpoint of a later step; RuntimeError where the run ends before it."""
        limit = time.monotonic() + END_SECONDS
        while not any(step > after for step in checkpoints(self.folder)):
            if self._process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"{self.name} has not come to step {after + 1}; see {self._output.name}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End all of it at once, so that no process does a step more."""
        workers = self.workers()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            self._process.send_signal(number)
        self._process.wait()

    def close(self) -> None:
        """End it, if it still is there."""
        if self._process.poll() is None:
            self.kill()

    def end(self) -> str:
        """Wait for the end; returns what was said. RuntimeError where it has failed."""
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            code = 1
        if code:
            raise RuntimeError(f"{self.name} has failed; see {self._output.name}")
        self._output.seek(self._began)
        return self._output.read()


@dataclass(frozen=True)
class Finding:
    """Whether something that is promised held."""

    held: bool
    what: str


def main(argv: list[str]) -> None:
    """Hold the drills that are asked for and print what held."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    kinds = list(KINDS) if argv[0] == "all" else [argv[0]]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"no drill {unknown[0]!r}; there are: {', '.join(KINDS)}, all")
    wanted = parse(Drill, argv[1:])
    place = Path(wanted.to).resolve() if wanted.to else Path(tempfile.mkdtemp(prefix="vitscale-drill-"))
    if wanted.to and place.exists() and any(place.iterdir()):
        raise ValueError(f"{place} is not empty: a drill needs a folder of its own")
    place.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no run outlives the drill
    try:
        findings = drills(place, kinds)
    finally:
        if not wanted.to:
            shutil.rmtree(place, ignore_errors=True)
    if not all(finding.held for finding in findings):
        sys.exit(1)


def drills(place: Path, kinds: list[str]) -> list[Finding]:
    """Hold them, telling each finding as it comes."""
    make_set(place)
    print(f"a quiet run of {STEPS} steps on two processes", flush=True)
    quiet = Run(place, "quiet")
    quiet.end()
    findings: list[Finding] = []
    for kind in kinds:
        print(f"{kind}: {(KINDS[kind].__doc__ or '').splitlines()[0]}", flush=True)
        disturbed, said = KINDS[kind](place)
        for finding in (said, *compared(place, disturbed, quiet)):
            print(f"  {'held    ' if finding.held else 'NOT HELD'} {finding.what}", flush=True)
            findings.append(finding)
    return findings


def kill_worker(place: Path) -> tuple[Run, Finding]:
    """One of the two processes is killed after a checkpoint; nobody starts the run again."""
    disturbed = Run(place, "kill-worker")
    disturbed.wait_for_checkpoint(after=2 * SAVE_EVERY)
    os.kill(disturbed.workers()[-1], signal.SIGKILL)
    return disturbed, went_on(disturbed.end(), "the run went on by itself from a checkpoint")


def truncate_checkpoint(place: Path) -> tuple[Run, Finding]:
    """All of the run is killed, its newest checkpoint loses the second half of a file, and the run is started again."""
    disturbed = Run(place, "truncate-checkpoint")
    disturbed.wait_for_checkpoint(after=2 * SAVE_EVERY)
    disturbed.kill()
    *_, before, newest = checkpoints(disturbed.folder)
    part = max((disturbed.folder / "checkpoints" / f"step-{newest:08}").glob("*.safetensors"))
    os.truncate(part, part.stat().st_size // 2)
    again = Run(place, "truncate-checkpoint")
    return again, went_on(again.end(), f"the damaged checkpoint of step {newest} was passed over", before)


KINDS: dict[str, Callable[[Path], tuple[Run, Finding]]] = {
    "kill-worker": kill_worker,
    "truncate-checkpoint": truncate_checkpoint,
}


def went_on(said: str, what: str, step: int | None = None) -> Finding:
    """Whether the run said that it goes on, after this step where one is given."""
    found = re.search(r"goes on after step ([\d,]+) of", said)
    at = int(found[1].replace(",", "")) if found else 0
    return Finding(at > 0 and step in (None, at), f"{what}: it went on after step {at}")


def compared(place: Path, disturbed: Run, quiet: Run) -> list[Finding]:
    """What is promised of a disturbed run beside a quiet one."""
    from safetensors.numpy import load_file

    ours, theirs = (load_file(run.folder / "export" / "model.safetensors") for run in (disturbed, quiet))
    same = ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    logged, wanted = (losses(place, run.name) for run in (disturbed, quiet))
    return [
        Finding(same, "its weights are those of the quiet run, bit for bit"),
        Finding(
            [step for step, _ in logged] == [step for step, _ in wanted],
            f"MLflow has each of its {len(wanted)} lines once",
        ),
        Finding(logged == wanted, "every loss in MLflow is that of the quiet run: nothing was lost, nothing repeated"),
    ]


def losses(place: Path, name: str) -> list[tuple[int, float]]:
    """Steps and losses of a run, each as often as MLflow's file has it: its own reader shows a step once."""
    query = "SELECT step, value FROM metrics JOIN runs USING (run_uuid) WHERE key = 'loss' AND name = ? ORDER BY step"
    with closing(sqlite3.connect(place / "mlflow.db")) as file:
        return file.execute(query, (name,)).fetchall()


def tracking_uri(place: Path) -> str:
    """The drill's MLflow."""
    return f"sqlite:///{place}/mlflow.db"


def checkpoints(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, in order."""
    from pipeline.train.checkpoint import complete
    from shards.storage import Folder

    return complete(Folder(str(folder)))


def make_set(place: Path) -> None:
    """A shard set of noise, as bright as its class, as jobs/prepare.py makes it of a folder of pictures."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for number in range(PICTURES):
        label = number % CLASSES
        pixels = draw.integers(0, 60, (SIDE, SIDE, 3)) + label * 190 // (CLASSES - 1)
        path = place / "pictures" / f"class-{label}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    options = {"name": "drill", "source": place / "pictures", "to": place / "sets", "samples-per-shard": 12}
    done = subprocess.run(
        [sys.executable, str(JOBS / "prepare.py"), "folder", *(f"--{k}={v}" for k, v in options.items())],
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        cwd=JOBS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    made = [path.parent for path in (place / "sets").rglob("manifest.json")]
    if done.returncode or len(made) != 1:
        raise RuntimeError(f"the pictures of the drill could not be prepared: {done.stdout.strip()}")
    made[0].rename(place / "set")


def _parents() -> dict[int, int]:
    """The parent of each process of this machine."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return found


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
