"""What the pipeline costs over a bare loop: pictures/s of the same model on the same batches.

    python benchmarks/overhead.py [--quick]

(a) a bare PyTorch loop over batches that lie in memory; (b) the same with the DeepSpeed engine; (c) our loop, with the
DeepSpeed engine, our feed from shards, logging to MLflow and checkpoints. Each in this one process with one thread for
arithmetic, in turns, several rounds; the ratios are medians over the rounds. Last line: the ratios as JSON.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import Config
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Batch, Feed
from pipeline.experiments import load
from pipeline.objectives.classify import loss
from pipeline.optim.schedule import learning_rate
from pipeline.track import log
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.engine import Engine, library, settings
from pipeline.train.loop import train
from pipeline.train.objective import Objective, to_device
from pipeline.train.run import Meter, build
from pipeline.world import World
from shards.manifest import ShardSet
from shards.progress import Progress
from shards.storage import Folder

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
WARM = 10  # steps before anything is measured


def bare(config: Config, batches: list[Batch]) -> Callable[[int], float]:
    """(a): no more than it takes."""
    model = build(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=config.optim.betas, weight_decay=config.optim.weight_decay, fused=True
    )

    def steps(count: int) -> float:
        began = time.perf_counter()
        for step in range(count):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optim, step, count)
            given = to_device(batches[step % len(batches)], CPU, config.classes)
            value = loss(model(given.images), given.labels, "softmax", config.smoothing)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began

    return steps


def deepspeed(config: Config, batches: list[Batch]) -> Callable[[int], float]:
    """(b): what DeepSpeed's documentation says."""
    model = build(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=config.optim.betas, weight_decay=config.optim.weight_decay, fused=True
    )
    engine = library(CPU).initialize(
        model=model, optimizer=optimizer, config=settings(config, 1), dist_init_required=False
    )[0]

    def steps(count: int) -> float:
        began = time.perf_counter()
        for step in range(count):
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(config.optim, step, count)
            given = to_device(batches[step % len(batches)], CPU, config.classes)
            engine.backward(loss(engine(given.images), given.labels, "softmax", config.smoothing))
            engine.step()
        return time.perf_counter() - began

    return steps


def ours(config: Config, shards: ShardSet, folder: Path) -> Callable[[int], float]:
    """(c): all that a run does, validation aside."""
    world, samples = World(), shards.manifest.samples
    engine = Engine(config, build(config), world, CPU)
    uri = f"sqlite:///{folder}/mlflow.db"
    run = log.begin(uri, "overhead", {"vitscale.folder": str(folder)}, {}, same="vitscale.folder")
    writer = log.Log(uri, run, [])
    checkpoints = Checkpoints(Folder(str(folder)), world, "bench", keep=2)
    pictures = Feed(Corpus([shards]), config)  # one for all rounds, as a run has one
    done = 0

    def steps(count: int) -> float:
        nonlocal done
        until = replace(config, duration=done + count, unit="steps")
        progress = Progress("overhead", done + count, "steps", say=lambda line: None)
        meter = Meter(until, engine, pictures, writer, progress, samples)
        batches: Iterator[Batch] = pictures.training(done, done + count)
        began = time.perf_counter()
        train(
            until, engine, batches, Objective(until, engine), samples=samples, start=done, log=meter.log,
            validate=lambda step: None,
            save=lambda step: checkpoints.save(step, engine, lambda: {"metrics": writer.unsent()}),
        )  # fmt: skip
        checkpoints.wait()
        spent = time.perf_counter() - began
        done += count
        return spent

    return steps


def pictures() -> ShardSet:
    """Fashion-MNIST, made into shards where the demo has not done so."""
    command = [sys.executable, "jobs/prepare.py", "fashion_mnist", "--to", "demo/sets"]
    subprocess.run(command, cwd=ROOT, check=True)
    return ShardSet(str(ROOT / "demo/sets/fashion_mnist/train"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    quick = parser.parse_args().quick
    rounds, count = (3, 60) if quick else (5, 150)
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group("gloo")
    shards = pictures()
    config = replace(load("demo"), save_every=50, micro_batch=128)
    batches = list(islice(Feed(Corpus([shards]), config).training(0, 100), 100))
    with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:
        ways = {
            "bare": bare(config, batches),
            "deepspeed": deepspeed(config, batches),
            "ours": ours(config, shards, Path(folder)),
        }
        rates = measure(ways, rounds, count, config.batch)
    report(rates)


def measure(ways: dict[str, Callable[[int], float]], rounds: int, count: int, batch: int) -> dict[str, list[float]]:
    """Pictures/s of each way in each round, the order turned from round to round."""
    for steps in ways.values():
        steps(WARM)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            rates[name].append(count * batch / ways[name](count))
    return rates


def report(rates: dict[str, list[float]]) -> None:
    """A line a way, then the ratios."""
    for name, values in rates.items():
        print(f"{name:10} {statistics.median(values):8,.0f} pictures/s   {[round(value) for value in values]}")
    ratios: dict[str, Any] = {
        f"ours_over_{other}": round(
            statistics.median(a / b for a, b in zip(rates["ours"], rates[other], strict=True)), 3
        )
        for other in ("bare", "deepspeed")
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
