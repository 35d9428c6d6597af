"""What a step makes smaller: the loss of a batch, of a model alone, with a teacher, or against over-smoothing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.architectures import Cmt, Vit
from pipeline.config import Config, Suppression
from pipeline.data.loader import Batch
from pipeline.data.mix import Draws, applied, normalised, targets
from pipeline.models.build import build
from pipeline.models.cmt import ConvolutionalTransformer
from pipeline.models.maxvit import MultiAxisVisionTransformer
from pipeline.models.vit import TwoLogits, VisionTransformer
from pipeline.models.weights.exported import Exported, find
from pipeline.objectives import classify, distill, masked, patches
from pipeline.seed import number
from pipeline.train.engine import Engine

PYRAMIDS = (ConvolutionalTransformer, MultiAxisVisionTransformer)
PATCH_HEAD, MASKED = "patch_head", "masked"
"""Under these names a model has what only training looks at."""


class Objective:
    """The mean loss of a batch under an engine; ValueError where the run's teacher does not fit."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.teacher = Teacher(config, engine.device, engine.dtype) if config.distillation.teacher else None
        self.watched = Watched(config.suppression, engine.model) if config.suppression.wanted else None
        self.hidden = Hidden(config, engine.model) if config.objective == "masked" else None

    def __call__(self, batch: Batch) -> Tensor:
        config = self.config
        given = to_device(batch, self.engine.device, config.classes)
        if self.hidden is not None:
            return self.hidden.loss(self.engine, batch, given)
        assert config.objective != "masked"
        outputs = self.engine.forward(given.images)
        # A model with a distillation token answers twice; one without learns both from the same logits. Without a
        # teacher both tokens learn the labels, as they are read: together.
        ours, taught = outputs if isinstance(outputs, TwoLogits) else (outputs, outputs)
        if self.teacher is None and isinstance(outputs, TwoLogits):
            ours = (ours + taught) / 2
        value = classify.loss(ours, given.shown, config.objective, config.smoothing, given.weights)
        if self.watched is not None:
            value = self._suppressed(self.watched, value, given)
        if self.teacher is None:
            return value
        return distill.loss(config.distillation, value, taught, self.teacher(given.images), given.weights)

    def _suppressed(self, watched: "Watched", value: Tensor, given: "Given") -> Tensor:
        choices, config, seen = self.config.suppression, self.config, watched.tokens(given.images)
        mixing = None
        if choices.mixing:
            assert given.draws is not None and given.draws.mixing is not None, "checked with the configuration"
            assert config.objective != "masked"
            own = patches.own_shares(*given.draws.mixing[:2], seen.grid, watched.stride)
            compared = patches.mixed(choices, seen.last, given.labels, own, watched.head, config.classes)
            mixing = patches.mixing_loss(compared, config.objective, config.smoothing, given.weights)
        return patches.loss(choices, value, seen, mixing, given.weights)


class Hidden:
    """Masked patch prediction, by a vision transformer that sees other patches than its pictures have."""

    def __init__(self, config: Config, model: nn.Module) -> None:
        assert isinstance(model, VisionTransformer), "checked with the configuration"
        self.config, self.model = config, model
        self.module: masked.MaskedPatches = getattr(model, MASKED)
        self._corruption: masked.Corruption | None = None
        self._last: Tensor | None = None
        model.patch_embed.register_forward_hook(self._corrupt)
        model.norm.register_forward_hook(self._keep)

    def loss(self, engine: Engine, batch: Batch, given: "Given") -> Tensor:
        """The mean loss over the corrupted patches of a batch."""
        vit = self.model.config
        rows, columns = vit.grid_of(given.images.shape[-2], given.images.shape[-1])
        drawn = masked.draw(batch.samples.numpy(), batch.epochs.numpy(), rows * columns, seed=self.config.seed)
        corruption = self._corruption = drawn.to(given.images.device, non_blocking=True)
        engine.forward(given.images)
        assert self._last is not None
        logits = self.module.predicted(self._last[:, -rows * columns :], corruption)
        self._corruption = self._last = None
        return masked.loss(logits, masked.mean_colours(given.pixels, vit.patch), corruption, given.weights)

    def _corrupt(self, module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
        return embedded if self._corruption is None else self.module.corrupted(embedded, self._corruption)

    def _keep(self, module: nn.Module, given: Any, tokens: Tensor) -> None:
        if self._corruption is not None:
            self._last = tokens


class Watched:
    """The patches' tokens of a model's first and last layer, kept of its last forward pass in training.

    Of a pyramid, those of the last stage, for both: its first layer has another grid.
    """

    def __init__(self, choices: Suppression, model: nn.Module) -> None:
        self.model, self._kept = model, dict[str, Tensor]()
        if isinstance(model, VisionTransformer):
            first = model.blocks[0] if choices.first == "block" else model.patch_embed
            first.register_forward_hook(self._keeper("first"))
            model.norm.register_forward_hook(self._keeper("last"))
        else:
            assert isinstance(model, PYRAMIDS), "checked with the configuration"
            model.blocks[-1].register_forward_hook(self._keeper("last"))
        own: Any = getattr(model, PATCH_HEAD) if choices.mixing and choices.head == "own" else model.head
        self.head: Callable[[Tensor], Tensor] = own

    def tokens(self, images: Tensor) -> patches.Tokens:
        """Of the patches alone, of the last forward pass, which was of these pictures; they are kept no longer."""
        last = self._kept.pop("last")
        if isinstance(self.model, VisionTransformer):
            grid = self.model.config.grid_of(images.shape[-2], images.shape[-1])
            count = grid[0] * grid[1]
            return patches.Tokens(self._kept.pop("first")[:, -count:], last[:, -count:], grid)
        tokens = last.flatten(2).transpose(1, 2)  # b d y x to b n d
        return patches.Tokens(tokens, tokens, (last.shape[2], last.shape[3]))

    @property
    def stride(self) -> int:
        """Pixels along the side of one token."""
        config: Any = self.model.config
        return config.stages[-1].stride if isinstance(config, Cmt) else config.stride

    def _keeper(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, given: Any, output: Tensor) -> None:
            if module.training:
                self._kept[name] = output

        return keep


def with_heads(config: Config, model: nn.Module) -> nn.Module:
    """The model with what only training needs, whose weights are trained and kept, but not exported."""
    chosen = config.suppression
    if config.objective == "masked":
        assert isinstance(model, VisionTransformer), "checked with the configuration"
        module = masked.MaskedPatches(model.config.width)
        masked.initialise(module, torch.Generator().manual_seed(number("masked patches", config.seed)))
        model.add_module(MASKED, module)
    if chosen.mixing and chosen.head == "own":
        width = config.model.width if isinstance(config.model, Vit) else config.model.widths[-1]  # type: ignore[union-attr]
        head = patches.PatchHead(width, config.classes, chosen.dropout)
        patches.initialise(head, torch.Generator().manual_seed(number("patch head", config.seed)))
        model.add_module(PATCH_HEAD, head)
    return model


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


class Given(NamedTuple):
    """A batch on the device."""

    pixels: Tensor
    """(b, s, s, 3) uint8, as they came."""
    images: Tensor
    """(b, 3, s, s), normalised and mixed."""
    shown: Tensor
    """What they show: labels (b, m), or where pictures were mixed the share of each class (b, c)."""
    weights: Tensor
    """(b)."""
    labels: Tensor
    """(b, m), as they were before mixing."""
    draws: Draws | None


def to_device(batch: Batch, device: torch.device, classes: int) -> Given:
    """The batch, with all that is done to its pictures on the device."""
    pixels = batch.images.to(device, non_blocking=True)
    images = normalised(pixels)
    labels, weights = (each.to(device, non_blocking=True) for each in (batch.labels, batch.weights))
    if batch.draws is None:
        return Given(pixels, images, labels, weights, labels, None)
    draws = batch.draws.to(device, non_blocking=True)
    images = applied(images, draws)
    if draws.mixing is None:
        return Given(pixels, images, labels, weights, labels, draws)
    pairs = weights.unflatten(0, (-1, 2)).prod(1, keepdim=True).expand(-1, 2).flatten()  # what is mixed with nothing
    return Given(pixels, images, targets(labels, draws, classes), pairs, labels, draws)
