"""Fine-tune one task after the other, as a plain script does it: PyTorch, Pillow, tarfile, all cores for one model.

Reads from stdin where the model lies, and of each trial the folder of its sets and its settings.
"""

import io
import json
import math
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.models.build import build
from pipeline.models.weights.exported import find
from pipeline.models.weights.fit import take


def pictures(folder: Path, splits: tuple[str, ...]) -> tuple[list[Image.Image], Tensor]:
    """All pictures of a task's splits, decoded, and their labels."""
    images, labels = [], []
    for split in splits:
        for path in sorted((folder / split).glob("*.tar")):
            with tarfile.open(path) as tar:
                files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            for name, data in files.items():
                if name.endswith(".cls"):
                    labels.append(int(data))
                else:
                    images.append(Image.open(io.BytesIO(data)).convert("RGB"))
    return images, torch.tensor(labels)


def batch(images: list[Image.Image], which: list[int], size: int, settings: dict[str, Any], chance: Any) -> Tensor:
    """Pictures for a step: a crop each, scaled."""
    made = np.empty((len(which), size, size, 3), np.float32)
    for place, number in enumerate(which):
        image = images[number]
        wide, high = image.size
        keep = settings["share"] if settings["crop"] else 1.0
        left, top = chance.uniform(0, wide * (1 - keep)), chance.uniform(0, high * (1 - keep))
        box = (left, top, left + wide * keep, top + high * keep)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
        made[place] = pixels[:, ::-1] if settings["flip"] and chance.random() < 0.5 else pixels
    return torch.from_numpy(made).permute(0, 3, 1, 2) / 127.5 - 1


def trial(url: str, folder: Path, settings: dict[str, Any]) -> float:
    """The accuracy of one fine-tuning."""
    source = find(url)
    images, labels = pictures(folder, ("train800", "val200"))
    model = build(source.config, int(labels.max()) + 1)
    take(model, source.weights(), source.config, head="fresh")
    train(model, images, labels, source.config.image_size, settings)
    return accuracy(model, *pictures(folder, ("test",)), source.config.image_size)


def train(model: nn.Module, images: list[Image.Image], labels: Tensor, size: int, settings: dict[str, Any]) -> None:
    """SGD with momentum, a warm-up and a cosine."""
    chance, steps, warmup = np.random.default_rng(settings["seed"]), settings["steps"], settings["warmup"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=settings["momentum"])
    model.train()
    order: list[int] = []
    for step in range(steps):
        if len(order) < settings["batch"]:
            order += chance.permutation(len(images)).tolist()
        which, order = order[: settings["batch"]], order[settings["batch"] :]
        share = step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        optimizer.param_groups[0]["lr"] = settings["rate"] * share
        loss = cross_entropy(model(batch(images, which, size, settings, chance)), labels[which])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: list[Image.Image], labels: Tensor, size: int) -> float:
    """The share of pictures named rightly."""
    model.eval()
    whole = {"crop": False, "flip": False}
    shown = batch(images, list(range(len(images))), size, whole, np.random.default_rng(0))
    return float((model(shown).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    told = json.load(sys.stdin)
    for folder, settings in zip(told["sets"], told["trials"], strict=True):
        trial(told["model"], Path(folder), settings)
