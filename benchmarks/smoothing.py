"""Whether the losses against over-smoothing do what they are for: how alike patches are, layer by layer.

    python benchmarks/smoothing.py [--quick] [--steps 400] [--seeds 3]

A DeiT-like model of 24 blocks is trained on Fashion-MNIST (prepared where the demo has not done so) with and without
the losses of Gong et al. 2021 (arXiv v3), the same pictures in the same order; then the mean absolute cosine between
patches of a picture is taken of 512 test pictures after every block. Last line: as JSON the mean over the seeds of the
last block's, and its deviation, with the accuracy on those pictures, in per cent.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from pipeline.architectures.vit import Vit
from pipeline.config import Augment, Config, Data, Optim, Suppression
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Feed
from pipeline.insight.smoothing import similarities
from pipeline.models.vit import VisionTransformer
from pipeline.objectives.patches import THIRD_VERSION
from pipeline.optim.schedule import learning_rate
from pipeline.seed import number
from pipeline.train.objective import Objective, to_device
from pipeline.train.run import build

ROOT = Path(__file__).resolve().parents[1]
SETS = ROOT / "demo/sets/fashion_mnist"
CPU = torch.device("cpu")
NONE = Suppression(cosine=0.0, contrastive=0.0, mixing=0.0)


class Plain:
    """What an objective needs of an engine, without DeepSpeed."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.forward, self.device, self.dtype = model, model, CPU, torch.float32


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="150 steps, one seed")
    arguments.add_argument("--steps", type=int, default=400)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    steps, seeds = (150, 1) if given.quick else (given.steps, given.seeds)
    command = [sys.executable, "jobs/prepare.py", "fashion_mnist", "--to", "demo/sets"]
    subprocess.run(command, cwd=ROOT, check=True)
    figures: dict[str, float] = {}
    for name, suppression in (("without", NONE), ("with", THIRD_VERSION)):
        found = [trained(configured(suppression, seed, steps)) for seed in range(seeds)]
        for seed, (layers, accuracy) in enumerate(found):
            print(
                f"{name:8} seed {seed}: accuracy {accuracy:.1f} %, {' '.join(f'{x:.2f}' for x in layers)}", flush=True
            )
        last = [layers[-1] for layers, _ in found]
        figures |= {f"{name}_similarity": mean(last), f"{name}_accuracy": mean(accuracy for _, accuracy in found)}
        figures |= {f"{name}_deviation": stdev(last)} if seeds > 1 else {}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def configured(suppression: Suppression, seed: int, steps: int) -> Config:
    model = Vit(
        width=48, depth=24, heads=3, hidden=96, patch=7, image_size=28, gelu="erf", initialisation="deit",
        stochastic_depth=0.1,
    )  # fmt: skip
    return Config(
        name="smoothing", classes=10, model=model, suppression=suppression, seed=seed, objective="softmax",
        smoothing=0.1, duration=steps, unit="steps", batch=64, micro_batch=64, zero=0, precision="fp32",
        data=Data(shards=str(SETS / "train"), lanes=16, crop_area=0.5, threads=1, cache=str(SETS.parent / "cache")),
        augment=Augment(cutmix=1.0),
        optim=Optim(lr=1e-3, warmup=steps // 10, decay="cosine", end_lr=0.0, weight_decay=0.05),
    )  # fmt: skip


def trained(config: Config) -> tuple[list[float], float]:
    """Similarity after each block, and accuracy, of the model that a run of this configuration ends with."""
    config.check(1)
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=config.optim.weight_decay)
    objective = Objective(config, Plain(model))  # type: ignore[arg-type]
    feed, steps = Feed(Corpus.open(config.data.shards), config), int(config.duration)
    for step, batch in enumerate(feed.training(0, steps)):
        torch.manual_seed(number("step", config.seed, step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, steps)
        optimizer.zero_grad()
        objective(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
    feed.close()
    return measured(model, config)


@torch.no_grad()
def measured(model: nn.Module, config: Config) -> tuple[list[float], float]:
    assert isinstance(model, VisionTransformer)
    model.eval()
    test = Feed(Corpus.open(str(SETS / "test")), replace(config, data=replace(config.data, eval_crop=1.0)))
    batch = next(test.evaluation(512))
    test.close()
    given, layers = to_device(batch, CPU, config.classes), list[Tensor]()
    hooks = [block.register_forward_hook(lambda m, i, output: layers.append(output)) for block in model.blocks]
    right = (model(given.images).argmax(1) == given.labels[:, 0]).float().mean()
    for hook in hooks:
        hook.remove()
    alike = similarities(layers, signed=False, prefix=model.config.prefix).mean(1)
    return alike.tolist(), 100 * float(right)


if __name__ == "__main__":
    main()
