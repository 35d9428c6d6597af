"""Models as trials take them: fitted to a recipe; and what a frozen one sees in the pictures of a task."""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.architectures import Architecture, Vit, at_size, family
from pipeline.data.mix import normalised
from pipeline.models.build import build, initialise
from pipeline.models.weights.exported import ABOUT, WEIGHTS, Exported
from pipeline.models.weights.exported import find as find_model
from pipeline.models.weights.fit import take
from pipeline.seed import number
from pipeline.transfer.batches import Source, judged_cuts, made_ahead
from pipeline.transfer.protocols import Recipe

FEATURES = 2 << 30
"""Bytes of features that a process keeps."""


def device_of() -> torch.device:
    """Where trials are computed: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fitted(architecture: Architecture, recipe: Recipe) -> Architecture:
    """The architecture at the recipe's size, with its dropouts, and where it is trained without the tanh layer before
    the pretraining's head (Dosovitskiy et al. 2021, section 3.2).

    ValueError, with sizes that would do, where the family has none of this size.
    """
    try:
        made = at_size(architecture, recipe.size) if recipe.size else architecture
    except ValueError as error:
        raise ValueError(f"a {family(architecture)} cannot be fine-tuned at {recipe.size} pixels: {error}") from error
    changes: dict[str, Any] = {"dropout": recipe.dropout, "stochastic_depth": recipe.stochastic_depth}
    made = replace(made, **{name: to for name, to in changes.items() if to is not None and hasattr(made, name)})
    if recipe.method == "all" and isinstance(made, Vit):
        made = replace(made, representation=False)
    return made


def started(source: str) -> Exported:
    """The model to start from; ValueError where it is not there, or not all of it."""
    try:
        found = find_model(source)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the checkpoint at {source} is not complete: its {ABOUT} is damaged ({error})") from error
    lacking = {"architecture", "model", "classes", "digest", "mean", "std"} - found.about.keys()
    if lacking or not found.folder.exists(WEIGHTS):
        what = f"its {ABOUT} lacks {', '.join(sorted(lacking))}" if lacking else f"it has no {WEIGHTS}"
        raise ValueError(f"the checkpoint at {source} is not complete: {what}; copy or export it again")
    return found


def model_of(start: Exported, recipe: Recipe, classes: int, *, pretrained: bool, seed: int) -> nn.Module:
    """The model that a trial begins with, on its device, with a head of zeros for so many classes, or none for 0.

    From scratch it has its family's first weights, the head's too, drawn by the seed.
    """
    config = fitted(start.config, recipe)
    model = build(config, classes)
    initialise(model, torch.Generator().manual_seed(number("scratch", seed)))
    if pretrained:
        take(model, weights_of(start), config, head="fresh")
    return model.to(device_of())


def weights_of(start: Exported) -> dict[str, Tensor]:
    """The weights, which a process reads once; not to be written to."""
    return _weights(start.folder.absolute, start.digest)


@lru_cache(maxsize=1)
def _weights(folder: str, digest: str) -> dict[str, Tensor]:
    found = find_model(folder)
    if found.digest != digest:
        raise ValueError(f"the checkpoint at {folder} has changed: it is {found.digest}, not {digest}")
    return found.weights()


@dataclass(frozen=True)
class Look:
    """How frozen pictures are looked at, and by which model."""

    model: str
    """Digest of the weights, or from scratch of the architecture."""
    pretrained: bool
    seed: int
    """Of the weights from scratch; 0 for pretrained ones."""
    recipe: Recipe


def look(start: Exported, recipe: Recipe, *, pretrained: bool, seed: int) -> Look:
    """As a trial with this recipe looks; equal for all that see the same features."""
    seen = Recipe("linear", size=recipe.size, evaluation=recipe.evaluation, judged=recipe.judged)
    model = start.digest if pretrained else start.architecture
    return Look(model, pretrained, 0 if pretrained else seed, seen)


class Shelf:
    """The features a process has, as many as `FEATURES` bytes hold, those of the last look last."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Look, object], Tensor] = {}

    def features(self, start: Exported, how: Look, pictures: Source, which: object, threads: int) -> Tensor:
        """Of pictures that `which` stands for: (n, d), float32, on the CPU."""
        key = (how, which)
        found = self.kept.pop(key, None)
        if found is None:
            model = model_of(start, how.recipe, 0, pretrained=how.pretrained, seed=how.seed)
            found = seen(model, pictures, how.recipe, start, threads).cpu()
        self.kept[key] = found
        while len(self.kept) > 1 and sum(one.nbytes for one in self.kept.values()) > FEATURES:
            del self.kept[next(iter(self.kept))]
        return found


@torch.no_grad()
def seen(model: nn.Module, pictures: Source, recipe: Recipe, start: Exported, threads: int) -> Tensor:
    """What the model, as it is judged, says of each picture: features or logits (n, k), float32, on its device.

    Every picture is looked at once. bf16 on a GPU, fp32 on a CPU.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    size = recipe.size or start.config.image_size
    found: list[Tensor] = []
    for _, images in made_ahead(pictures, judged_cuts(pictures, recipe), size, threads, pinned=device.type == "cuda"):
        found.append(computed(model, start.scaled(on_device(images, device))).float())
    model.train(training)
    return torch.cat(found)


def on_device(images: Tensor, device: torch.device) -> Tensor:
    """(n, s, s, 3) of uint8 to (n, 3, s, s) of float32 in [-1, 1] there."""
    return normalised(images.to(device, non_blocking=True))


def computed(model: nn.Module, images: Tensor) -> Any:
    """The model's answer: in bf16 on a GPU, in fp32 on a CPU."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        return model(images)


def packed(right: Tensor) -> bytes:
    """A bit a picture, in their order, eight to a byte, the first one highest."""
    return np.packbits(right.cpu().numpy()).tobytes()
