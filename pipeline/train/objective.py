"""What a step makes smaller: the loss of a batch, of a model alone or with a teacher."""

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.data.mix import applied, normalised, targets
from pipeline.models.build import build
from pipeline.models.vit import TwoLogits
from pipeline.models.weights.exported import Exported, find
from pipeline.objectives import classify, distill
from pipeline.train.engine import Engine


class Objective:
    """The mean loss of a batch under an engine; ValueError where the run's teacher does not fit."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.teacher = Teacher(config, engine.device, engine.dtype) if config.distillation.teacher else None

    def __call__(self, batch: Batch) -> Tensor:
        config = self.config
        images, shown, weights = to_device(batch, self.engine.device, config.classes)
        outputs = self.engine.forward(images)
        # A model with a distillation token answers twice; one without learns both from the same logits.
        ours, taught = outputs if isinstance(outputs, TwoLogits) else (outputs, outputs)
        value = classify.loss(ours, shown, config.objective, config.smoothing, weights)
        if self.teacher is None:
            return value
        return distill.loss(config.distillation, value, taught, self.teacher(images), weights)


def teacher_of(config: Config) -> Exported:
    """The run's teacher; ValueError where it is not there or knows other classes."""
    exported = find(config.distillation.teacher)
    if exported.classes != config.classes:
        where = exported.folder.absolute
        raise ValueError(f"the teacher at {where} knows {exported.classes} classes, the run {config.classes}")
    return exported


class Teacher:
    """A finished model that says what it sees; any of this project's families."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.exported = exported = teacher_of(config)
        model = build(exported.config, exported.classes)
        model.load_state_dict(exported.weights())
        self.model: nn.Module = model.requires_grad_(False).eval().to(device, dtype)
        self.dtype = dtype

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (b, c) of pictures (b, 3, s, s) in [-1, 1]."""
        return self.model(self.exported.scaled(images).to(self.dtype))


def to_device(batch: Batch, device: torch.device, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (b, 3, s, s), normalised and mixed on the device, what they show, and their weights (b).

    What they show is labels (b, m), or where pictures were mixed the share of each class (b, c).
    """
    images = normalised(batch.images.to(device, non_blocking=True))
    labels, weights = (each.to(device, non_blocking=True) for each in (batch.labels, batch.weights))
    if batch.draws is None:
        return images, labels, weights
    draws = batch.draws.to(device, non_blocking=True)
    if draws.mixing is None:
        return applied(images, draws), labels, weights
    pairs = weights.unflatten(0, (-1, 2)).prod(1, keepdim=True).expand(-1, 2).flatten()  # what is mixed with nothing
    return applied(images, draws), targets(labels, draws, classes), pairs
