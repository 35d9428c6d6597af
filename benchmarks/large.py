"""ViT-H/14 for real: three steps of ZeRO-2 on two processes of this machine's CPUs, killed, resumed and exported.

    python benchmarks/large.py [--model vit_h14] [--precision fp32] [--batch 2] [--quick]

The first start is killed (SIGKILL) after its third step, when the second is in a checkpoint; the second start takes the
third step again and exports. Blocks are computed twice rather than kept, and training waits for checkpoints, as there
is no memory for a copy of the state. Needs 24 GB of memory and 20 GB of disk; --quick takes a tiny model and shows that
the chain works: its figures say nothing of a large one.

Last line, as JSON: seconds of each step and of a checkpoint, the most memory that a process had (VmHWM of Linux, less
what it had before the model was there) beside what `pipeline.models.memory` predicts, GB on the disk, the exported
parameters.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from pipeline.architectures import preset  # noqa: E402
from pipeline.config import Config, Data, Optim, from_dict  # noqa: E402

STEPS, PROCESSES = 3, 2


class Watched:
    """Writes down when each step was done, and kills both processes after the last where that is wanted."""

    def __init__(self, folder: Path, rank: int, deadly: bool) -> None:
        self.path, self.deadly = folder / f"told-{rank}.jsonl", deadly
        self.tell("begins")

    def step(self, done: int) -> None:
        """So many steps are done, or a checkpoint after them."""
        self.tell(str(done))
        if self.deadly and done == STEPS:
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(self, what: str) -> None:
        """A line: what, when, and the most memory so far."""
        with self.path.open("a") as file:
            file.write(json.dumps([what, time.time(), peak()]) + "\n")


def peak() -> int:
    """The most bytes of memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def process(folder: Path, deadly: bool) -> None:
    """One process of the run, in what torchrun has started."""
    import torch
    import torch.distributed as dist

    from pipeline.train import engine, run
    from pipeline.train.folder import CONFIG, Job
    from pipeline.world import World

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
    dist.init_process_group("gloo")
    world, device = World(dist.get_rank(), dist.get_world_size()), torch.device("cpu")
    engine.library(device)
    config = from_dict(json.loads((folder / CONFIG).read_text()))
    job = Job(config, str(folder), f"sqlite:///{folder}/mlflow.db", (folder / "mlflow-run").read_text(), "large")
    watched = Watched(folder, world.rank, deadly)
    run.work(job, world, device, print, hang=watched)
    watched.tell("ends")


def start(folder: Path, *, deadly: bool) -> None:
    """Run both processes, to their death or to the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    command += [str(Path(__file__).resolve()), "--process", str(folder), "deadly" if deadly else "whole"]
    ended = subprocess.run(command, capture_output=deadly, text=True)
    if bool(ended.returncode) != deadly:
        raise RuntimeError(f"the run ended with {ended.returncode}: {ended.stdout}{ended.stderr}")


def prepared(folder: Path, model: str, precision: Any, batch: int) -> Config:
    """The run over a few photographs, in `folder`/run."""
    from peers import sets

    from pipeline.track import log
    from pipeline.train.folder import open_folder
    from shards.manifest import ShardSet

    shards = sets.photographs(folder, 8)
    config = Config(
        name="large",
        classes=sets.CLASSES,
        model=preset(model),
        data=Data(shards=shards, lanes=2, window=16, threads=1, cache=str(folder / "cache")),
        optim=Optim(lr=1e-4, warmup=0),
        objective="softmax",
        duration=STEPS,
        unit="steps",
        batch=batch,
        micro_batch=1,
        zero=2,
        precision=precision,
        recompute=True,
        save_beside=False,
        save_every=2,
        log_every=1,
    )
    run = folder / "run"
    open_folder(config, str(run), {"training": ShardSet(config.data.shards).manifest.root})
    told = log.begin(f"sqlite:///{run}/mlflow.db", "large", {"vitscale.folder": str(run)}, {}, same="vitscale.folder")
    (run / "mlflow-run").write_text(told)
    return config


def report(config: Config, run: Path) -> dict[str, Any]:
    """What was measured beside what was predicted."""
    from safetensors import safe_open

    from pipeline.models.memory import memory

    told = [[json.loads(line) for line in (run / f"told-{rank}.jsonl").open()] for rank in range(PROCESSES)]
    lines, (second,) = told[0], [i for i, line in enumerate(told[0]) if line[0] == "begins"][1:]
    first = lines[:second]
    base = max(line[0][2] for line in told)
    steps = [round(b[1] - a[1], 1) for a, b in pairwise(first[1:]) if a[0] != b[0]]
    saving = [round(b[1] - a[1], 1) for a, b in pairwise(first[1:]) if a[0] == b[0]]
    need = memory(config, PROCESSES)
    with safe_open(run / "export" / "model.safetensors", "pt") as file:
        exported = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    disk = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    return {
        "seconds_to_first_step": round(first[1][1] - first[0][1], 1),
        "seconds_of_later_steps": steps,
        "seconds_of_a_checkpoint": saving,
        "seconds_from_start_to_resumed_step": round(lines[second + 1][1] - lines[second][1], 1),
        "gigabytes_of_a_process": round((max(line[2] for one in told for line in one) - base) / 1e9, 2),
        "gigabytes_predicted": round(need.total / 1e9, 2),
        "gigabytes_before_the_model": round(base / 1e9, 2),
        "gigabytes_of_checkpoints": round(disk / 1e9, 2),
        "exported_parameters": exported,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    arguments.add_argument("--model", default="vit_h14")
    arguments.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    arguments.add_argument("--batch", type=int, default=PROCESSES)
    arguments.add_argument("--to", default="", help="folder for all of it; a temporary one if empty")
    arguments.add_argument("--quick", action="store_true", help="a tiny model")
    given = arguments.parse_args()
    if given.process:
        return process(Path(given.process[0]), given.process[1] == "deadly")
    name = "vit_ti16" if given.quick else given.model
    with tempfile.TemporaryDirectory(prefix="vitscale-", dir=given.to or None) as folder:
        config = prepared(Path(folder), name, given.precision, given.batch)
        start(Path(folder) / "run", deadly=True)
        start(Path(folder) / "run", deadly=False)
        found = report(config, Path(folder) / "run")
    print(json.dumps({"model": name} | found))


if __name__ == "__main__":
    main()
