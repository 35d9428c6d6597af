"""One fine-tuning: from what decides it to its accuracy.

A trial's name is the digest of everything that decides its result, so that the same trial is never run for a second
result, and another one never takes its place.

Legend: n pictures, b of a batch, c classes, m labels a picture at the most.
"""

import json
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.architectures import Architecture
from pipeline.config import Config, Optim
from pipeline.data import mix
from pipeline.models.memory import activation_bytes
from pipeline.models.vit import TwoLogits
from pipeline.models.weights.exported import Exported
from pipeline.objectives import fewshot
from pipeline.objectives.classify import correct, loss
from pipeline.optim.optimizers import follow, optimizer_of
from pipeline.seed import number
from pipeline.transfer.batches import Cut, Some, Source, made_ahead, training_cuts
from pipeline.transfer.features import Shelf, computed, fitted, look, model_of, on_device, packed, seen, started
from pipeline.transfer.linear import train_heads
from pipeline.transfer.pictures import Pictures, pictures_of
from pipeline.transfer.protocols import Recipe
from pipeline.transfer.tasks import TEST, Part, Split, Task, find, roots
from shards.manifest import ShardSet

Result = dict[str, Any]
Start = Literal["pretrained", "scratch"]

ROOM = 2 << 30
"""Bytes that a CPU keeps of a forward pass; what needs more is computed in several passes."""

_shelf = Shelf()


@dataclass(frozen=True)
class Trial:
    """All that decides a fine-tuning."""

    task: Task
    data: tuple[tuple[str, str], ...]
    """Name and root digest of each shard set of the task."""
    split: Split
    """What the accuracy is of."""
    start: Start
    model: str
    """Digest of the weights it starts from, or of the architecture where it starts from scratch."""
    protocol: str
    """Name and version."""
    recipe: Recipe
    rate: float
    """The highest learning rate; of few-shot learning, the penalty."""
    seed: int

    @property
    def name(self) -> str:
        """The trial's digest. A field of the recipe counts where it is not as ever: one more renames no old trial."""
        recipe = {field.name: getattr(self.recipe, field.name) for field in fields(Recipe)}
        ever = {field.name: field.default for field in fields(Recipe)}
        said = {name: value for name, value in recipe.items() if value != ever[name]}
        deciding = {**asdict(self), "recipe": said, "rate": float(self.rate)}
        return sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def kind(self) -> Literal["memory", "run"]:
        """Whether one process does it, or it is a run of its own."""
        return kind_of(self.task, self.recipe)

    def describe(self) -> str:
        """The trial in a few words."""
        return f"{self.task.name} {self.start} {self.protocol} lr {self.rate:g} seed {self.seed} on {self.split}"


def kind_of(task: Task, recipe: Recipe) -> Literal["memory", "run"]:
    """What the task asks for; but of a frozen model only features are kept, for which one process is enough."""
    return task.kind if recipe.method == "all" else "memory"


def together(trial: Trial) -> str:
    """Trials of an equal word are worth doing in one go, since they look at the same frozen features."""
    if trial.recipe.method == "all":
        return trial.name
    first = trial.seed if trial.start == "scratch" else 0  # which decides the weights
    return replace(trial, rate=0.0, seed=first).name


def check(recipe: Recipe, architecture: Architecture) -> Architecture:
    """The model that a recipe makes of an architecture; ValueError where there is none, or no such training."""
    if recipe.method != "fewshot" and recipe.steps < 1:
        raise ValueError(f"steps is {recipe.steps}; at least 1 is needed")
    if recipe.method == "fewshot" and recipe.shots < 1:
        raise ValueError(f"shots is {recipe.shots}; at least 1 is needed")
    if recipe.batch < 1 or ((recipe.mixup or recipe.cutmix) and recipe.batch % 2):
        raise ValueError(f"batch is {recipe.batch}; at least 1 is needed, and an even number to mix pairs of pictures")
    if 1 < recipe.repeats > recipe.batch // 2 and (recipe.mixup or recipe.cutmix):
        raise ValueError(f"batch is {recipe.batch}: {recipe.repeats} repeats would mix pictures with themselves")
    return fitted(architecture, recipe)


def perform(trials: Sequence[Trial], source: str, data: str, *, threads: int) -> Iterator[tuple[Trial, Result]]:
    """Run trials of one `together` with the checkpoint at `source` and the tasks' shard sets under `data`.

    Each result as soon as it is there. So many threads cut pictures ahead of need. ValueError, before anything is
    loaded, where the checkpoint is not complete or has changed, the recipe does not fit it, or the sets have changed.
    """
    trial = trials[0]
    assert {together(each) for each in trials} == {together(trial)}, "trials that have nothing in common"
    began = time.monotonic()
    found = found_for(trial, source, data)
    start, given = found.start, _given(trial, found, data, threads)
    match trial.recipe.method:
        case "all":
            done = ((each, _finetuned(start, given, each)) for each in trials)
        case "linear":
            done = _linear(start, given, trials)
        case "fewshot":
            done = _fewshot(start, given, trials)
    for each, judgements in done:
        yield each, _result(each, given, judgements, time.monotonic() - began)
        began = time.monotonic()


class Found(NamedTuple):
    """What a trial starts from and looks at, none of it read yet."""

    start: Exported
    model: Architecture
    """What the recipe makes of its architecture."""
    sets: dict[str, ShardSet]
    judged: dict[str, tuple[Part, ...]]
    """What the accuracy is of, under "", and further test sets by their names."""
    classes: int


def found_for(trial: Trial, source: str, data: str) -> Found:
    """ValueError where checkpoint, recipe and shard sets do not fit the trial or each other."""
    start, task = started(source), trial.task
    model = check(trial.recipe, start.config)
    if trial.model != (there := start.digest if trial.start == "pretrained" else start.architecture):
        raise ValueError(f"the checkpoint at {source} has changed: it is {there}, not {trial.model}")
    sets = find(data, task)
    if (found := roots(sets)) != trial.data:
        raise ValueError(f"the shard sets of {task.name} have changed: {found} instead of {trial.data}")
    judged = {"": task.judged(trial.split)}
    if trial.split == TEST:
        judged |= {name: (Part(where),) for name, where in task.also if where in sets}
    parts = [*task.training(trial.split), *(part for some in judged.values() for part in some)]
    return Found(start, model, sets, judged, _classes(task, sets, parts))


class Given(NamedTuple):
    """The pictures of a task, and what else trials of it have in common."""

    classes: int
    training: Pictures
    judged: dict[str, Pictures]
    """What the accuracy is of, under "", and further test sets by their names."""
    threads: int


def _given(trial: Trial, found: Found, data: str, threads: int) -> Given:
    task = trial.task
    pictures = {name: pictures_of(data, task, parts, trial.data) for name, parts in found.judged.items()}
    training = pictures_of(data, task, task.training(trial.split), trial.data)
    for one in (training, *pictures.values()):
        _check_labels(task, one, found.classes)
    return Given(found.classes, training, pictures, threads)


def _classes(task: Task, sets: dict[str, ShardSet], parts: Sequence[Part]) -> int:
    """Of all these parts; ValueError where they have not as many."""
    counts = {where: len(sets[where].manifest.classes) for where in map(task.where, parts)}
    if len(set(counts.values())) != 1:
        said = ", ".join(f"{where} {count:,}" for where, count in counts.items())
        raise ValueError(f"the shard sets of {task.name} have not as many classes as each other: {said}")
    classes = next(iter(counts.values()))
    if classes < 2:
        raise ValueError(f"{task.name} has {classes} classes; nothing can be told apart with fewer than 2")
    return classes


def _check_labels(task: Task, pictures: Pictures, classes: int) -> None:
    if (last := int(pictures.labels.max(initial=-1))) >= classes:
        raise ValueError(f"{task.name} has {classes} classes, and a picture with the label {last}")
    if last < 0:
        raise ValueError(f"{task.name} has {len(pictures)} pictures without a label, and no others, in one of its sets")


def _finetuned(start: Exported, given: Given, trial: Trial) -> dict[str, Tensor]:
    """Which pictures are right after the training of all weights, by test set."""
    pretrained = trial.start == "pretrained"
    model = model_of(start, trial.recipe, given.classes, pretrained=pretrained, seed=trial.seed)
    finetune(model, start, given, trial)
    return {
        name: _right(seen(model, pictures, trial.recipe, start, given.threads), pictures)
        for name, pictures in given.judged.items()
    }


def _right(logits: Tensor, pictures: Pictures) -> Tensor:
    return correct(logits.cpu(), torch.from_numpy(pictures.labels))


def _linear(start: Exported, given: Given, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Tensor]]]:
    """All rates and seeds in one pass."""
    rates, seeds = sorted({each.rate for each in trials}), sorted({each.seed for each in trials})
    learnt = _looked_at(start, given, trials[0], given.training, trials[0].task.training(trials[0].split))
    judged = _judged(start, given, trials[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = torch.from_numpy(given.training.labels[:, 0])
    # Some of these heads may have results already: a step has one for each pair.
    heads = train_heads(learnt.to(device), labels.to(device), given.classes, trials[0].recipe, rates, seeds)
    for each in trials:
        place = seeds.index(each.seed), rates.index(each.rate)
        yield each, {name: _right(heads.logits(of, *place), given.judged[name]) for name, of in judged.items()}


def _fewshot(start: Exported, given: Given, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, Tensor]]]:
    """All penalties of a seed from one decomposition; of the training pictures the shots alone are looked at."""
    labels, judged = given.training.labels[:, 0], _judged(start, given, trials[0])
    seeds = sorted({each.seed for each in trials})
    chosen = {seed: fewshot.shots(labels, trials[0].recipe.shots, seed) for seed in seeds}
    which = np.unique(np.concatenate(list(chosen.values())))
    learnt = _looked_at(start, given, trials[0], Some(given.training, which), (trials[0].split, which.tobytes()))
    for seed in seeds:
        some = [each for each in trials if each.seed == seed]
        own = learnt[np.searchsorted(which, chosen[seed])], torch.from_numpy(labels[chosen[seed]])
        for each, head in zip(some, fewshot.ridges(*own, given.classes, [each.rate for each in some]), strict=True):
            right = (
                fewshot.right(head, of, torch.from_numpy(given.judged[name].labels)) for name, of in judged.items()
            )
            yield each, dict(zip(judged, right, strict=True))


def _judged(start: Exported, given: Given, trial: Trial) -> dict[str, Tensor]:
    """Features of each test set."""
    parts = trial.task.judged(trial.split)
    return {name: _looked_at(start, given, trial, one, (parts, name)) for name, one in given.judged.items()}


def _looked_at(start: Exported, given: Given, trial: Trial, pictures: Source, which: object) -> Tensor:
    """Features of pictures that `which` tells from others of the task; kept from one group of trials to the next."""
    how = look(start, trial.recipe, pretrained=trial.start == "pretrained", seed=trial.seed)
    return _shelf.features(start, how, pictures, (trial.task.name, trial.data, which), given.threads)


def _result(trial: Trial, given: Given, judgements: dict[str, Tensor], seconds: float) -> Result:
    """What is kept of a trial, JSON alone. A picture without a label has a bit in `right`, but is not counted."""
    said = {name: _judgement(right, given.judged[name].labels) for name, right in judgements.items()}
    own = said.pop("")
    return {"trial": asdict(trial), **own, "classes": given.classes, "seconds": seconds, "also": said}


def _judgement(right: Tensor, labels: np.ndarray) -> dict[str, Any]:
    hits, count = int(right.sum()), int((labels >= 0).any(1).sum())
    return {"accuracy": hits / count, "correct": hits, "count": count, "right": b64encode(packed(right)).decode()}


def finetune(model: nn.Module, start: Exported, given: Given, trial: Trial) -> None:
    """Train all weights by the trial's recipe; which pictures a step sees and how they are cut follows from its seed.

    A step whose pictures do not fit into the memory is computed in several passes, half as many pictures in each until
    they fit. With `recipe.average` the model is left with the moving average of its weights and buffers.
    """
    recipe, device = trial.recipe, next(model.parameters()).device
    optim = Optim(recipe.optimizer, momentum=recipe.momentum, weight_decay=recipe.weight_decay, decayed=recipe.decayed)
    undecayed: Any = getattr(model, "undecayed", set)
    optimizer = optimizer_of(optim, model.named_parameters(), undecayed())
    averages = [tensor.detach().clone() for tensor in _averaged(model)] if recipe.average else []
    passes = Passes(model, start, recipe, _micro(start, recipe, device))
    cuts, size = training_cuts(given.training, recipe, trial.seed), recipe.size or start.config.image_size
    model.train()
    batches = made_ahead(given.training, cuts, size, given.threads, pinned=device.type == "cuda")
    for step, (cut, pixels) in enumerate(batches):
        torch.manual_seed(number("finetune", trial.seed, step))
        images, shown = _shown(given, cut, on_device(pixels, device), trial)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(trial.rate, step)
        passes.gradient(images, shown)
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if averages:
            follow(averages, _averaged(model), recipe.average)
    with torch.no_grad():
        for tensor, average in zip(_averaged(model), averages, strict=False):
            tensor.copy_(average)


def _shown(given: Given, cut: Cut, images: Tensor, trial: Trial) -> tuple[Tensor, Tensor]:
    """The batch (b, 3, s, s), mixed, and its labels (b, m), or the share of each class (b, c) where it is mixed."""
    labels = torch.from_numpy(given.training.labels[cut.chosen]).to(images.device, non_blocking=True)
    draws = mix.draw(trial.recipe.augment, cut.chosen, cut.epoch, seed=trial.seed, side=images.shape[-1])
    if draws is None:
        return images, labels
    draws = draws.to(images.device, non_blocking=True)
    images = mix.applied(images, draws)
    return images, labels if draws.mixing is None else mix.targets(labels, draws, given.classes)


class Passes:
    """The gradient of a batch, in as many passes as the memory asks for."""

    def __init__(self, model: nn.Module, start: Exported, recipe: Recipe, micro: int) -> None:
        self.model, self.start, self.recipe, self.micro = model, start, recipe, micro

    def gradient(self, images: Tensor, shown: Tensor) -> None:
        """Set the gradients of the model to that of the batch's mean loss.

        OutOfMemoryError where there is no room for one picture. What is found to fit once is kept for later batches.
        """
        while True:
            try:
                self.model.zero_grad(set_to_none=True)
                for first in range(0, len(images), self.micro):
                    self._add(images[first : first + self.micro], shown[first : first + self.micro], len(images))
                return
            except torch.OutOfMemoryError:
                if self.micro == 1:
                    raise
                self.micro = -(-self.micro // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _add(self, images: Tensor, shown: Tensor, whole: int) -> None:
        logits = computed(self.model, self.start.scaled(images))
        if isinstance(logits, TwoLogits):  # without a teacher both tokens learn the labels, as they are read: together
            logits = (logits.labels + logits.teacher) / 2
        value = loss(logits, shown, "softmax", self.recipe.smoothing)
        (value * (len(images) / whole)).backward()


def _micro(start: Exported, recipe: Recipe, device: torch.device) -> int:
    """Pictures of a pass: on a CPU, which does not say when its memory ends, as many as `ROOM` holds."""
    if device.type == "cuda":
        return recipe.batch
    each, micro = _bytes_of(fitted(start.config, recipe)), recipe.batch
    while micro > 1 and micro * each > ROOM:
        micro = -(-micro // 2)
    return micro


@lru_cache(maxsize=16)
def _bytes_of(model: Architecture) -> float:
    return activation_bytes(Config(name="fine-tuning", classes=2, model=model, precision="fp32"))


def _averaged(model: nn.Module) -> list[Tensor]:
    """Weights, and buffers such as a BatchNorm's statistics, which belong to them."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
