"""Whether the feed keeps a model busy: the share of training steps that waits for pictures.

    python benchmarks/wait.py [--model b16|l16|h14] [--batch 256] [--threads 16] [--steps 100] [--quick]

Photographs of about 500 x 375 (`photographs.py`) are packed into shards; then, in turns and several rounds, (a) the
feed alone, (b) training steps on a batch that lies on the device, (c) training steps on what the feed gives. A step is
forward, backward and AdamW at 224 pixels: on a GPU in bf16 with compiled blocks and fp32 weights, on a CPU in fp32 by a
tiny model in batches of 16, which shows no more than that it runs. Needs neither Ray nor DeepSpeed. --quick takes fewer
steps and photographs.

Last line, as JSON, medians: pictures/s of each, `wait_share` (time in which (c) waited, of all its time), and
`real_over_synthetic`, (c) over (b).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from peers import sets
from peers.contest import divide_rounds, report
from torch import Tensor

from pipeline.architectures.vit import Vit, vit_b16, vit_h14, vit_l16
from pipeline.config import Config, Data
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Batch, Feed
from pipeline.models.vit import VisionTransformer, initialise
from pipeline.objectives.classify import loss
from pipeline.train.objective import to_device

MODELS = {"b16": vit_b16, "l16": vit_l16, "h14": vit_h14}
TINY = Vit(width=192, depth=2, heads=3, hidden=768)
WARM = 5  # steps before anything is measured


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", choices=MODELS, default="b16")
    arguments.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 16)
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--count", type=int, default=4096, help="photographs")
    arguments.add_argument("--quick", action="store_true", help="fewer steps and photographs")
    given = arguments.parse_args()
    if given.quick:
        given.steps, given.count = (20, 1024) if torch.cuda.is_available() else (8, 256)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MODELS[given.model] if device.type == "cuda" else TINY
    with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:
        config = prepared(Path(folder), given.count, given.batch, given.threads, model)
        rates = measure(config, device, given.steps, given.rounds)
    named = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "threads": given.threads}
    ratios = {"real_over_synthetic": divide_rounds(rates["real"], rates["synthetic"])}
    report(ratios, named | {name: median(values) for name, values in rates.items()})


def prepared(folder: Path, count: int, batch: int, threads: int, model: Vit) -> Config:
    """A run over photographs in shards under `folder`."""
    shards = sets.photographs(folder, count)
    lanes = next(lanes for lanes in range(min(64, batch), 0, -1) if batch % lanes == 0)
    data = Data(shards=shards, threads=threads, lanes=lanes, window=count, cache=str(folder / "cache"))
    return Config("wait", sets.CLASSES, model=model, data=data, batch=batch, micro_batch=batch)


def measure(config: Config, device: torch.device, steps: int, rounds: int) -> dict[str, list[float]]:
    """Pictures/s of feed, synthetic and real steps, and the real ones' share of waiting, in each round."""
    take = trainer(config, device)
    rates: dict[str, list[float]] = {"feed": [], "synthetic": [], "real": [], "wait_share": []}
    for _round in range(rounds):
        pictures = Feed(Corpus.open(config.data.shards), config, pinned=device.type == "cuda")
        batches = pictures.training(0, WARM + steps)
        still = [next(batches) for _ in range(WARM)][-1]
        run(take, repeated(still, WARM), device)
        rates["feed"].append(rate(config, steps, lambda batches=batches: list(map(id, batches))))
        rates["synthetic"].append(rate(config, steps, lambda still=still: run(take, repeated(still, steps), device)))
        batches = pictures.training(0, WARM + steps)
        run(take, (next(batches) for _ in range(WARM)), device)
        before, began = pictures.measures().waited, time.perf_counter()
        rates["real"].append(rate(config, steps, lambda batches=batches: run(take, batches, device)))
        rates["wait_share"].append((pictures.measures().waited - before) / (time.perf_counter() - began))
        pictures.close()
    return rates


def rate(config: Config, steps: int, work: Callable[[], object]) -> float:
    """Pictures/s of so many steps."""
    began = time.perf_counter()
    work()
    return steps * config.batch / (time.perf_counter() - began)


def repeated(batch: Batch, count: int) -> Iterator[Batch]:
    return (batch for _ in range(count))


def run(take: Callable[[Batch], Tensor], batches: Iterator[Batch], device: torch.device) -> None:
    """All steps; the device has finished them when this returns."""
    for batch in batches:
        take(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()


def trainer(config: Config, device: torch.device) -> Callable[[Batch], Tensor]:
    """One step of training."""
    model = VisionTransformer(replace(config.model, representation=False), config.classes)
    initialise(model, torch.Generator().manual_seed(0))
    model.to(device).train()
    gpu = device.type == "cuda"
    if gpu:
        torch.set_float32_matmul_precision("high")
        for block in model.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: Batch) -> Tensor:
        given = to_device(batch, device, config.classes)
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            logits = model(given.images)
        value = loss(logits, given.labels, "softmax", 0.0, given.weights)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


if __name__ == "__main__":
    main()
