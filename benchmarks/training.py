"""What a whole training step costs beside plain loops: the run as it is, PyTorch, DDP, DeepSpeed, and inside Ray.

    python benchmarks/training.py [--rounds 5] [--steps 20] [--batch 8] [--only NAME ...] [--quick]

ViT-Ti/16 at 224 pixels, fp32. Ours is the run itself (`pipeline.train.run.work`): photographs of `photographs.py` read
from shards, decoded and cropped, the engine, logging to MLflow, a checkpoint every 50 steps; the plain loops go over
batches that lie in memory, and write nothing. Every contestant is a group of processes that waits until it is its turn;
they take turns, one not measured and then `--rounds` of `--steps` steps; figures are medians over rounds of ratios
within a round. With two processes each has half of the threads. --quick takes fewer rounds of fewer steps.

Last line, as JSON: `step_over_bare` (the slower of ZeRO-1 and -2 beside a loop of PyTorch alone),
`step_over_deepspeed`, `two_over_ddp`, `ray_over_torchrun`, `quiet_over_saving` (at one checkpoint in 100 steps: what
one adds is measured by a run that makes one in each turn, beside one that makes none) and `flops_over_matmul`: the
model's FLOP/s of our step over those of an fp32 matmul of 2048 by 2048 in between.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers.contest import divide_rounds, report, take_turns  # noqa: E402

from pipeline.architectures.vit import vit_ti16  # noqa: E402
from pipeline.config import Config, Data, Optim, from_dict, to_dict  # noqa: E402
from pipeline.models import flops  # noqa: E402
from pipeline.models.build import build, initialise  # noqa: E402
from pipeline.objectives import classify  # noqa: E402

ENDLESS = 1_000_000  # steps: nobody gets there
CONTESTANTS = {
    "ours zero 1": ("ours", 1, {"zero": 1}),
    "ours zero 2": ("ours", 1, {"zero": 2}),
    "ours saving": ("ours", 1, {"zero": 1, "save_every": 0}),
    "ours quiet": ("ours", 1, {"zero": 1, "save_every": ENDLESS}),
    "ours of two": ("ours", 2, {"zero": 1}),
    "ours in Ray": ("ray", 1, {"zero": 1}),
    "bare": ("bare", 1, {}),
    "DDP of two": ("bare", 2, {}),
    "DeepSpeed": ("deepspeed", 1, {"zero": 1}),
}


# --- a contestant ---------------------------------------------------------------------------------------------------


class Turns:
    """Asks for a turn and does nothing until it is given; of several processes the first asks."""

    def __init__(self, port: int, steps: int) -> None:
        self.steps, self.done = steps, 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        self.line = socket.create_connection(("127.0.0.1", port)) if self.first else None

    def step(self) -> None:
        """Say that a step is done; at the end of a turn, report its seconds and wait for the next."""
        if self.done % self.steps == 0:
            self._together()
            if self.line:
                seconds = time.perf_counter() - self.began if self.done else 0.0
                self.line.sendall(f"{seconds}\n".encode())
                if not self.line.recv(1):
                    os._exit(0)
            self._together()
            self.began = time.perf_counter()
        self.done += 1

    def _together(self) -> None:
        if self.size > 1:
            dist.barrier()


def contestant(kind: str, folder: Path, port: int, steps: int, threads: int) -> None:
    """One process, in what torchrun has started."""
    config = from_dict(json.loads((folder / "config.json").read_text()))
    torch.set_num_threads(threads)
    if kind == "ours":
        return ours(config, folder, port, steps)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or kind == "deepspeed":
        dist.init_process_group("gloo")
    return {"bare": bare, "deepspeed": by_deepspeed}[kind](config, Turns(port, steps))


def ours(config: Config, folder: Path, port: int, steps: int) -> None:
    """The run as it is, which takes its turns where it logs a step."""
    from pipeline.train import run
    from pipeline.train.folder import Job
    from pipeline.world import World

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    turns, log = Turns(port, steps), run.Meter.log

    def in_turns(meter: run.Meter, done: int, values: dict[str, Any]) -> None:
        log(meter, done, values)
        turns.step()

    run.Meter.log = in_turns  # type: ignore[method-assign]
    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow_run = begin(uri, folder) if turns.first else ""
    job = Job(config, str(folder), uri, mlflow_run, folder.name)
    run.work(job, World(dist.get_rank(), dist.get_world_size()), torch.device("cpu"), lambda line: None)


def begin(uri: str, folder: Path) -> str:
    from pipeline.track import log

    return log.begin(uri, folder.name, {"vitscale.folder": str(folder)}, {}, same="vitscale.folder")


def in_ray(folder: Path, port: int, steps: int, threads: int) -> None:
    """The same run in a process of Ray Train."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def work(settings: dict[str, Any]) -> None:
        sys.path[:0] = settings["path"]
        import training

        training.contestant("ours", Path(settings["folder"]), settings["port"], settings["steps"], settings["threads"])

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    TorchTrainer(
        work,
        train_loop_config={
            "folder": str(folder), "port": port, "steps": steps, "threads": threads,
            "path": [str(ROOT), str(ROOT / "benchmarks")],
        },
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="ray", storage_path=str(folder)),
    ).fit()  # fmt: skip


def batches(config: Config) -> Callable[[], tuple[Tensor, Tensor]]:
    """Batches that lie in memory, normalised."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(config.batch // size, 3, 224, 224, generator=generator) * 2 - 1
    labels = torch.randint(config.classes, (config.batch // size, 1), generator=generator)
    return lambda: (images, labels)


def model_of(config: Config) -> nn.Module:
    model = build(config.model, config.classes)
    initialise(model, torch.Generator().manual_seed(0))
    return model.train()


def bare(config: Config, turns: Turns) -> None:
    """PyTorch alone, with DDP where there are two."""
    model = model_of(config)
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.03, fused=True)
    take = batches(config)
    while True:
        images, labels = take()
        loss = classify.loss(model(images), labels, "softmax", 0.1, None)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        turns.step()


def by_deepspeed(config: Config, turns: Turns) -> None:
    """DeepSpeed alone, by our settings."""
    from pipeline.train.engine import library, settings

    model = model_of(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.03, fused=True)
    deepspeed = library(torch.device("cpu"))
    engine = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings(config, 1), dist_init_required=False
    )[0]
    take = batches(config)
    while True:
        images, labels = take()
        engine.backward(classify.loss(engine(images), labels, "softmax", 0.1, None))
        engine.step()
        turns.step()


# --- the course -----------------------------------------------------------------------------------------------------


class Group:
    """The processes of one contestant, and the line on which its first one asks for turns."""

    def __init__(self, name: str, config: Config, folder: Path, steps: int) -> None:
        kind, processes, changes = CONTESTANTS[name]
        changes = {**changes, "save_every": changes.get("save_every", 50) or steps}
        self.folder = folder / name.replace(" ", "-")
        self.folder.mkdir()
        (self.folder / "config.json").write_text(json.dumps(to_dict(replace(config, name=name, **changes))))
        door = socket.create_server(("127.0.0.1", 0))
        door.settimeout(300)
        threads = max(1, (os.cpu_count() or 1) // processes)
        words = [kind, str(self.folder), str(door.getsockname()[1]), str(steps), str(threads)]
        launch = (
            [] if kind == "ray" else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        )
        self._log = (self.folder / "log.txt").open("w")
        self._process = subprocess.Popen(
            [sys.executable, *launch, str(Path(__file__).resolve()), "--contestant", *words],
            stdout=self._log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        try:
            self._line = door.accept()[0].makefile("rwb", buffering=0)
            self._line.readline()
        except TimeoutError as error:
            raise RuntimeError(f"{name} does not start:\n{(self.folder / 'log.txt').read_text()[-3000:]}") from error

    def turn(self, number: int) -> float:
        """The seconds of a turn."""
        self._line.write(b"g")
        said = self._line.readline()
        if not said:
            raise RuntimeError(f"{self.folder.name} has ended:\n{(self.folder / 'log.txt').read_text()[-3000:]}")
        return float(said)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()


def matmul_rate() -> float:
    """FLOP/s of an fp32 matmul, the best of five."""
    a, b = torch.randn(2, 2048, 2048).unbind()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def prepared(folder: Path, count: int, batch: int) -> Config:
    """A run over photographs in shards under `folder`."""
    from peers import sets

    shards = sets.photographs(folder, count)
    return Config(
        name="training",
        classes=sets.CLASSES,
        model=vit_ti16,
        data=Data(shards=shards, lanes=4, window=count, threads=2, cache=str(folder / "cache")),
        optim=Optim(lr=1e-4, warmup=10, decay="constant"),
        objective="softmax",
        smoothing=0.1,
        duration=ENDLESS,
        unit="steps",
        batch=batch,
        micro_batch=batch,
        precision="fp32",
        save_every=50,
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--contestant", nargs=5, help=argparse.SUPPRESS)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--count", type=int, default=512, help="photographs")
    arguments.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    arguments.add_argument("--quick", action="store_true", help="three rounds of four steps")
    given = arguments.parse_args()
    if given.contestant:
        kind, folder, port, steps, threads = given.contestant
        if kind == "ray":
            return in_ray(Path(folder), int(port), int(steps), int(threads))
        return contestant(kind, Path(folder), int(port), int(steps), int(threads))
    if given.quick:
        given.rounds, given.steps, given.count = 3, 4, 64
    with tempfile.TemporaryDirectory(prefix="vitscale-", ignore_cleanup_errors=True) as folder:
        config = prepared(Path(folder), given.count, given.batch)
        seconds, matmul = course(config, Path(folder), given.only, given.steps, given.rounds)
    report(*compared(config, seconds, matmul, given.steps))


def course(
    config: Config, folder: Path, names: list[str], steps: int, rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each contestant's turns, and the matmul's FLOP/s of each round; the first round is not kept."""
    groups = {name: Group(name, config, folder, steps) for name in names}
    turns = {name: group.turn for name, group in groups.items()}
    seconds = take_turns({"matmul": lambda number: matmul_rate(), **turns}, rounds)
    for group in groups.values():
        group.end()
    matmul = seconds.pop("matmul")
    return seconds, matmul


def compared(
    config: Config, seconds: dict[str, list[float]], matmul: list[float], steps: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Ratios in each round, and figures."""
    for name, taken in seconds.items():
        print(f"{name:14}{median(taken) / steps * 1000:10.1f} ms a step")
    wanted = {
        "step_over_bare": [("bare", "ours zero 1"), ("bare", "ours zero 2")],
        "step_over_deepspeed": [("DeepSpeed", "ours zero 1")],
        "two_over_ddp": [("DDP of two", "ours of two")],
        "ray_over_torchrun": [("ours zero 1", "ours in Ray")],
    }
    ratios: dict[str, list[float]] = {}
    for name, pairs in wanted.items():
        there = [(seconds[a], seconds[b]) for a, b in pairs if a in seconds and b in seconds]
        if there:
            ratios[name] = min((divide_rounds(a, b) for a, b in there), key=median)
    if {"ours quiet", "ours saving"} <= seconds.keys():
        turns = [
            (quiet, saving - quiet) for quiet, saving in zip(seconds["ours quiet"], seconds["ours saving"], strict=True)
        ]
        ratios["quiet_over_saving"] = [1 / (1 + added / (quiet * 100 / steps)) for quiet, added in turns]
    if "ours zero 1" in seconds:
        work = 3 * 2 * flops.macs(config.model, config.classes) * config.batch * steps
        rates = zip(seconds["ours zero 1"], matmul, strict=True)
        ratios["flops_over_matmul"] = [work / taken / rate for taken, rate in rates]
    return ratios, {f"{name.replace(' ', '_')}_ms": median(taken) / steps * 1000 for name, taken in seconds.items()}


if __name__ == "__main__":
    main()
