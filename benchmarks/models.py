"""Training speed of every family beside timm's model of the same name: forward and backward, the same batch.

    python benchmarks/models.py [--quick] [--only vit bit ...] [--rounds 5] [--batch 8] [--precision fp32|bf16]

On a CPU in fp32 (bf16 too if asked for: emulated there, it says nothing of a GPU); on a GPU in bf16 by autocast, where
ours has its blocks compiled and timm's is run plain and wholly compiled, convolutional families with channels last.
Passes take turns, a round is the best of three passes of each, the figure is the median over rounds of timm's time over
ours. timm is found without torchvision (tests/timm.py). --quick takes fewer rounds of the same batches. Last line: the
ratios as JSON, with `vit_over_timm` and `worst_family_over_timm`; on a GPU pictures/s, peak memory and the share of a
matmul's rate, too.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers.contest import divide_rounds, report, take_turns
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.architectures import Architecture, preset
from pipeline.models import flops
from pipeline.models.build import build, initialise
from tests.timm import load

# Family: ours, theirs, whether it is convolutional.
FAMILIES = {
    "vit": ("vit_s16", "vit_small_patch16_224", False),
    "deit": ("deit_s16", "deit_small_patch16_224", False),
    "hybrid": ("r26_s32", "vit_small_r26_s32_224", False),
    "bit": ("bit_r50x1", "resnetv2_50x1_bit", True),
    "maxvit": ("maxvit_t", "maxvit_tiny_tf_224", True),
    "efficientnet": ("efficientnet_b0", "tf_efficientnet_b0", True),
}
LARGE = {
    "vit": ("vit_b16", "vit_base_patch16_224", False),
    "vit_l": ("vit_l16", "vit_large_patch16_224", False),
    "vit_h": ("vit_h14", "vit_huge_patch14_224", False),
    "bit": ("bit_r50x1", "resnetv2_50x1_bit", True),
    "maxvit": ("maxvit_t", "maxvit_tiny_tf_224", True),
}
PASSES = 3


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    known = LARGE if gpu else FAMILIES
    arguments.add_argument("--quick", action="store_true", help="three rounds")
    arguments.add_argument("--only", nargs="+", choices=known, default=list(known))
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--batch", type=int, default=128 if gpu else 4)
    arguments.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if gpu else "fp32")
    given = arguments.parse_args()
    rounds = 3 if given.quick else given.rounds
    device = torch.device("cuda" if gpu else "cpu")
    ratios: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for family in given.only:
        found, more = compare(family, *known[family], device, rounds, given.batch, given.precision)
        ratios, figures = ratios | found, figures | more
    over = [median(values) for name, values in ratios.items() if name.endswith("_over_timm")]
    report(ratios, figures | {"worst_family_over_timm": min(over)})


def compare(
    family: str,
    ours: str,
    theirs: str,
    convolutional: bool,
    device: torch.device,
    rounds: int,
    batch: int,
    precision: str,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """timm's time over ours in each round, and on a GPU what ours does."""
    config = preset(ours)
    models = {"ours": own(config, device)}
    models["timm"] = load("timm").create_model(theirs, num_classes=1000).to(device)
    if device.type == "cuda":
        models["timm_compiled"] = torch.compile(load("timm").create_model(theirs, num_classes=1000).to(device))
    if convolutional:
        models = {name: model.to(memory_format=torch.channels_last) for name, model in models.items()}
    images = torch.rand(batch, 3, config.image_size, config.image_size, device=device)
    if convolutional:
        images = images.contiguous(memory_format=torch.channels_last)
    ways = {name: training(model.train(), images, precision) for name, model in models.items()}
    times = measure(ways, rounds)
    for name, values in times.items():
        print(f"{family:13} {name:14} {batch / median(values):9.1f} pictures/s", flush=True)
    ratios = {f"{family}_over_{name}": divide_rounds(times[name], times["ours"]) for name in times if name != "ours"}
    return ratios, on_gpu(family, config, batch / median(times["ours"])) if device.type == "cuda" else {}


def own(config: Architecture, device: torch.device) -> nn.Module:
    """Our model, its blocks compiled on a GPU."""
    model = build(config, 1000)
    initialise(model, torch.Generator().manual_seed(0))
    model.to(device)
    blocks: Any = model.blocks
    for block in blocks if device.type == "cuda" else ():
        block.compile()
    return model


def training(model: nn.Module, images: Tensor, precision: str) -> Callable[[], None]:
    """A forward and a backward pass."""

    def once() -> None:
        model.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        logits.float().square().mean().backward()
        if images.device.type == "cuda":
            torch.cuda.synchronize()

    return once


def measure(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the best of a few passes, in each round; one pass of each warms up."""

    def timed(way: Callable[[], None]) -> Callable[[int], float]:
        def turn(number: int) -> float:
            began = time.perf_counter()
            way()
            return time.perf_counter() - began

        return turn

    passes = take_turns({name: timed(way) for name, way in ways.items()}, rounds * PASSES)
    starts = range(0, rounds * PASSES, PASSES)
    return {name: [min(each[start : start + PASSES]) for start in starts] for name, each in passes.items()}


def on_gpu(family: str, config: Architecture, rate: float) -> dict[str, float]:
    """Pictures/s, peak memory, and the share of what a large matmul reaches in this run."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    spent = min(measure({"matmul": lambda: (a @ b, torch.cuda.synchronize())[1]}, 5)["matmul"])
    ceiling = 2 * 8192**3 / spent
    return {
        f"{family}_pictures_per_second": rate,
        f"{family}_share_of_matmul": rate * 6 * flops.macs(config, 1000) / ceiling,
        f"{family}_peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9,
    }


if __name__ == "__main__":
    main()
