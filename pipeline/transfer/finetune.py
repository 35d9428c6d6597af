"""One fine-tuning: from what decides it to its accuracy.

A trial's name is the digest of everything that decides its result, so that the same trial is never run for a second
result, and another one never takes its place.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.architectures import Vit
from pipeline.config import Optim
from pipeline.data.image import Crops, central_crops, cut, placed_crops
from pipeline.models.build import build, initialise
from pipeline.models.vit import TwoLogits
from pipeline.models.weights.exported import Exported
from pipeline.models.weights.exported import find as find_model
from pipeline.models.weights.fit import take
from pipeline.optim.schedule import learning_rate
from pipeline.seed import number, permutation
from pipeline.transfer.protocols import Protocol
from pipeline.transfer.tasks import Pictures, Task, find, read

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Trial:
    """All that decides a fine-tuning."""

    task: Task
    data: tuple[tuple[str, str], ...]
    """Split and root digest of each shard set of the task."""
    split: Literal["val200", "test"]
    """What the accuracy is of."""
    start: Literal["pretrained", "scratch"]
    model: str
    """Digest of the weights it starts from, or of the architecture where it starts from scratch."""
    protocol: Protocol
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The trial's digest; which other rates its protocol proposes decides nothing of its result."""
        deciding = asdict(self)
        del deciding["protocol"]["rates"]
        return sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:24]

    def describe(self) -> str:
        """The trial in a few words."""
        return f"{self.task.name} {self.start} lr {self.rate:g} seed {self.seed} on {self.split}"


def perform(trial: Trial, source: str, data: str) -> dict[str, Any]:
    """Run a trial with the checkpoint at `source` and the tasks' shard sets under `data`; returns its result."""
    began = time.monotonic()
    start = find_model(source)
    training, test, classes = _pictures(trial, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = prepared(start, trial, classes).to(device)
    finetune(model, training, trial, start)
    correct = count_correct(model, test, start)
    count = len(test.labels)
    seconds = time.monotonic() - began
    return {
        "trial": asdict(trial),
        "accuracy": correct / count,
        "correct": correct,
        "count": count,
        "seconds": seconds,
        "classes": classes,
    }


def _pictures(trial: Trial, data: str) -> tuple[Pictures, Pictures, int]:
    sets = find(data, trial.task)
    if (found := tuple((split, s.manifest.root) for split, s in sets.items())) != trial.data:
        raise ValueError(f"the shard sets of {trial.task.name} have changed: {found} instead of {trial.data}")
    classes = len(sets[trial.split].manifest.classes)
    training = _decoded(data, trial.task, trial.task.training(trial.split), trial.data)
    return training, _decoded(data, trial.task, (trial.split,), trial.data), classes


@lru_cache(maxsize=8)
def _decoded(data: str, task: Task, splits: tuple[str, ...], roots: tuple[tuple[str, str], ...]) -> Pictures:
    """Kept from one trial of a process to the next; `roots` makes other pictures another entry."""
    sets = find(data, task)
    return read([sets[split] for split in splits])


def prepared(start: Exported, trial: Trial, classes: int) -> nn.Module:
    """The model to fine-tune: the pretraining's head, with its tanh layer if it has one, is replaced by zeros."""
    config = start.config
    if isinstance(config, Vit):  # or a hybrid
        config = replace(config, representation=False)
    model = build(config, classes)
    initialise(model, torch.Generator().manual_seed(number("scratch", trial.seed)))
    if trial.start == "pretrained":
        take(model, start.weights(), config, head="fresh")
    return model


def finetune(model: nn.Module, training: Pictures, trial: Trial, start: Exported) -> None:
    """Train by the trial's protocol; which pictures a step sees and how they are cut follows from the seed."""
    protocol, count = trial.protocol, len(training.labels)
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=protocol.momentum)
    schedule = Optim(lr=trial.rate, warmup=protocol.warmup, decay="cosine", end_lr=0.0)
    model.train()
    for step in range(protocol.steps):
        torch.manual_seed(number("finetune", trial.seed, step))
        chosen, epoch = _turn(count, step, protocol.batch, trial.seed)
        images = _batch(training, chosen, _training_crops(training, chosen, epoch, trial), start.config.image_size)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, protocol.steps)
        logits = model(start.scaled(_normalised(images, device)))
        if isinstance(logits, TwoLogits):  # without a teacher both tokens learn the labels, as they are read: together
            logits = (logits.labels + logits.teacher) / 2
        loss = cross_entropy(logits, torch.from_numpy(training.labels[chosen]).to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), protocol.clip)
        optimizer.step()


def _turn(count: int, step: int, batch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of a step and the epoch of each: every picture once an epoch, short steps run into the next."""
    position = np.arange(step * batch, (step + 1) * batch)
    epoch = position // count
    chosen = np.empty_like(position)
    for one in np.unique(epoch).tolist():
        here = epoch == one
        chosen[here] = permutation(count, "finetune", seed, one)[position[here] % count]
    return chosen, epoch


def _training_crops(pictures: Pictures, chosen: np.ndarray, epoch: np.ndarray, trial: Trial) -> Crops:
    width, height = (side[chosen] for side in pictures.sizes)
    share = trial.protocol.crop_side if trial.task.crop else 1.0
    return placed_crops(width, height, chosen, epoch, seed=trial.seed, share=share, flip=trial.task.flip)


def _batch(pictures: Pictures, chosen: np.ndarray, crops: Crops, size: int) -> np.ndarray:
    images = np.empty((len(chosen), size, size, 3), np.uint8)
    for i, which in enumerate(chosen.tolist()):
        cut(pictures.images[which], crops, i, images[i])
    return images


def _normalised(images: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


@torch.no_grad()
def count_correct(model: nn.Module, pictures: Pictures, start: Exported) -> int:
    """Pictures that the model names rightly; every picture is looked at once."""
    model.eval()
    device = next(model.parameters()).device
    width, height = pictures.sizes
    correct = 0
    for first in range(0, len(pictures.labels), EVALUATION_BATCH):
        chosen = np.arange(first, min(first + EVALUATION_BATCH, len(pictures.labels)))
        crops = central_crops(width[chosen], height[chosen], share=1.0)
        images = start.scaled(_normalised(_batch(pictures, chosen, crops, start.config.image_size), device))
        named = model(images).argmax(1).cpu().numpy()
        correct += int((named == pictures.labels[chosen]).sum())
    return correct
