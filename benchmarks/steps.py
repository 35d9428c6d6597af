"""Whole pretraining steps on one device beside timm's model and transformers' ViT in plain loops.

    python benchmarks/steps.py [--only vit_b16 vit_l16 vit_h14] [--rounds 5] [--steps 10] [--peak 989e12] [--quick]

A step starts from uint8 pictures in the memory of the CPU and ends with the weights changed: copied, normalised on the
device, forward, softmax cross-entropy over 1,000 classes, backward, gradient clipped, AdamW (fused). Ours is the run's
own engine and objective, in bf16 with fp32 master weights and compiled blocks; the others are loops of PyTorch with
autocast and fp32 weights, as their users write them: timm eager, timm compiled, transformers compiled. On a CPU all are
in fp32 and none is compiled: that shows that the script works, and says nothing of a GPU.

Contestants take turns, one not measured and then `--rounds` of `--steps` steps; ratios are medians over rounds. --quick
takes fewer rounds. Last line, as JSON, for each model: pictures/s, `mfu` (three forward passes' FLOPs over `--peak`, by
default an H100's or H200's dense bf16), `share_of_matmul` (over a bf16 matmul of 8192 in this run), peak gigabytes, and
ours over each other.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from peers.contest import divide_rounds, report, take_turns
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

# Before timm, beside which there seems to be a torchvision (tests/timm.py).
from transformers import ViTConfig, ViTForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.architectures import preset
from pipeline.config import Config, Data, Optim, Vit
from pipeline.data.loader import Batch
from pipeline.data.mix import normalised
from pipeline.models import flops
from pipeline.models.build import build, initialise
from pipeline.world import World
from tests.timm import load

CLASSES = 1000
# Ours, timm's name, pictures in a step.
MODELS = {
    "vit_ti16": ("vit_tiny_patch16_224", 512),
    "vit_b16": ("vit_base_patch16_224", 256),
    "vit_l16": ("vit_large_patch16_224", 128),
    "vit_h14": ("vit_huge_patch14_224", 64),
}
MATMUL = "matmul"
Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """What all contestants have in common."""

    name: str
    model: Vit
    batch: Batch
    device: torch.device

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


# --- contestants ----------------------------------------------------------------------------------------------------


def ours(setting: Setting) -> Step:
    """The engine and the objective of a run."""
    from pipeline.train.engine import Engine
    from pipeline.train.objective import Objective

    count = len(setting.batch.images)
    config = Config(
        "steps",
        CLASSES,
        model=setting.model,
        data=Data(lanes=1),
        optim=Optim(lr=1e-4, weight_decay=0.03, clip=1.0),
        objective="softmax",
        smoothing=0.0,
        batch=count,
        micro_batch=count,
        zero=1,
        precision="bf16" if setting.gpu else "fp32",
        compiled=setting.gpu,
    )
    model = build(config.model, CLASSES)
    initialise(model, torch.Generator().manual_seed(0))
    engine = Engine(config, model.train(), World(0, 1), setting.device)
    objective = Objective(config, engine)
    engine.set_rate(1e-4)

    def step() -> None:
        engine.backward(objective(setting.batch))
        engine.step()

    return step


def plain(setting: Setting, model: nn.Module, *, compiled: bool, logits: Callable[[Any], Tensor]) -> Step:
    """A loop as one writes it."""
    model = model.to(setting.device).train()
    forward: Any = torch.compile(model) if compiled and setting.gpu else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.03, fused=True)

    def step() -> None:
        images = normalised(setting.batch.images.to(setting.device, non_blocking=True))
        labels = setting.batch.labels[:, 0].to(setting.device, non_blocking=True)
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.gpu):
            loss = cross_entropy(logits(forward(images)).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def timm(setting: Setting, *, compiled: bool) -> Step:
    model = load("timm").create_model(MODELS[setting.name][0], num_classes=CLASSES)
    return plain(setting, model, compiled=compiled, logits=lambda output: output)


def transformers(setting: Setting) -> Step:
    ours = setting.model
    config = ViTConfig(
        hidden_size=ours.width,
        num_hidden_layers=ours.depth,
        num_attention_heads=ours.heads,
        intermediate_size=ours.hidden,
        patch_size=ours.patch,
        image_size=ours.image_size,
    )
    config.num_labels = CLASSES
    return plain(setting, ViTForImageClassification(config), compiled=True, logits=lambda output: output.logits)


CONTESTANTS: dict[str, Callable[[Setting], Step]] = {
    "ours": ours,
    "timm compiled": lambda setting: timm(setting, compiled=True),
    "timm eager": lambda setting: timm(setting, compiled=False),
    "transformers": transformers,
}


# --- the course -----------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    standard = ["vit_b16", "vit_l16", "vit_h14"] if gpu else ["vit_ti16"]
    arguments.add_argument("--only", nargs="+", choices=MODELS, default=standard)
    arguments.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=10 if gpu else 2)
    arguments.add_argument("--batch", type=int, help="pictures in a step, in place of the model's own number")
    arguments.add_argument("--peak", type=float, default=989e12, help="FLOP/s of the device")
    arguments.add_argument("--quick", action="store_true", help="three rounds")
    given = arguments.parse_args()
    rounds = 3 if given.quick else given.rounds
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if gpu else "cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_RANK="0")
    dist.init_process_group("nccl" if gpu else "gloo", rank=0, world_size=1)
    ratios: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for name in given.only:
        pictures = given.batch or (MODELS[name][1] if gpu else 8)
        setting = setting_of(name, pictures, device)
        found, more = measured(setting, given.contestants, rounds, given.steps, given.peak)
        ratios, figures = ratios | found, figures | more
    report(ratios, figures)
    dist.destroy_process_group()


def setting_of(name: str, pictures: int, device: torch.device) -> Setting:
    """Pictures of noise, pinned where there is a GPU."""
    model: Any = preset(name)
    generator = torch.Generator().manual_seed(0)
    side = model.image_size
    images = torch.randint(0, 256, (pictures, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (pictures, 1), generator=generator)
    if device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    numbers = torch.arange(pictures)
    return Setting(name, model, Batch(images, labels, numbers, torch.ones(pictures), torch.zeros_like(numbers)), device)


def measured(
    setting: Setting, names: list[str], rounds: int, steps: int, peak: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """What each contestant does with one model: ratios in each round, and figures of ours."""
    made, gigabytes = {}, {}
    for name in names:  # the first steps, in which things are compiled, with the memory of one at a time
        others = torch.cuda.memory_allocated() if setting.gpu else 0
        made[name] = CONTESTANTS[name](setting)
        gigabytes[name] = (highest(setting, made[name]) - others) / 1e9
    turns = {name: lambda number, step=step: turn(setting, step, steps) for name, step in made.items()}
    found = take_turns({MATMUL: lambda number: matmul_rate(setting.device), **turns}, rounds)
    turns.clear()
    made.clear()
    gc.collect()
    ceiling = median(found.pop(MATMUL))
    return compared(setting, found, ceiling, peak, gigabytes)


def highest(setting: Setting, step: Step) -> int:
    """The most bytes of the device that are in use in three steps, once it has warmed up; 0 on a CPU."""
    step()
    if not setting.gpu:
        return 0
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def turn(setting: Setting, step: Step, steps: int) -> float:
    """Seconds of a step, the mean of so many."""
    if setting.gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if setting.gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matmul, the best of five."""
    side, kind = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def compared(
    setting: Setting, seconds: dict[str, list[float]], ceiling: float, peak: float, gigabytes: dict[str, float]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    name, pictures = setting.name, len(setting.batch.images)
    work = 6 * flops.macs(setting.model, CLASSES) * pictures  # FLOPs of a step: three forward passes
    ratios: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for who, taken in seconds.items():
        each = median(taken)
        said = {"pictures_per_second": pictures / each, "share_of_matmul": work / each / ceiling}
        if setting.gpu:
            said |= {"mfu": work / each / peak, "peak_gigabytes": gigabytes[who]}
        print(f"{name:10}{who:15}" + "".join(f"{value:10.3f} {key}" for key, value in said.items()), flush=True)
        if who == "ours":
            figures |= {f"{name}_{key}": value for key, value in said.items()}
        elif "ours" in seconds:
            ratios[f"{name}_over_{who.replace(' ', '_')}"] = divide_rounds(taken, seconds["ours"])
    return ratios, figures


if __name__ == "__main__":
    main()
