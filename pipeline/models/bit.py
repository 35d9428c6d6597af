"""The pre-activation ResNet of Kolesnikov et al., "Big Transfer (BiT)" (ECCV 2020).

Wiring and constants are those of the paper's code, parameters bear the names that timm gives them. No unit couples
the pictures of a batch, and a picture may have any size and shape.

Legend: b batch, d channels, h w rows and columns, t = h w places, c classes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad, relu

from pipeline.architectures.bit import Bit
from pipeline.models.features import Features
from pipeline.models.standardised import StandardisedConv2d

GROUPS = 32
EPSILON = 1e-5


class Stem(nn.Module):
    """A wide convolution and a pooling, both of stride 2, with no normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = StandardisedConv2d(3, channels, 7, 2)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, d, h / 4, w / 4), rounded up twice."""
        # The zeros take part in the maximum, as in the paper's code; the pooling's own padding would never win.
        return max_pool2d(pad(self.conv(images), (1, 1, 1, 1)), 3, 2)


class Projection(nn.Module):
    """A shortcut to another number of channels."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = StandardisedConv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, h, w) to (b, d', h / stride, w / stride)."""
        return self.conv(x)


class Unit(nn.Module):
    """A bottleneck: each of three convolutions behind a GroupNorm and a ReLU, beside a shortcut.

    The stride is the middle convolution's. The first unit of a stage projects its shortcut, from what comes out of
    the first ReLU; the others leave theirs as it is.
    """

    def __init__(self, channels: int, out: int, stride: int, *, first: bool) -> None:
        super().__init__()
        inner = out // 4
        self.downsample = Projection(channels, out, stride) if first else None
        self.norm1 = nn.GroupNorm(GROUPS, channels, EPSILON)
        self.conv1 = StandardisedConv2d(channels, inner, 1)
        self.norm2 = nn.GroupNorm(GROUPS, inner, EPSILON)
        self.conv2 = StandardisedConv2d(inner, inner, 3, stride)
        self.norm3 = nn.GroupNorm(GROUPS, inner, EPSILON)
        self.conv3 = StandardisedConv2d(inner, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, h, w) to (b, d', h / stride, w / stride)."""
        active = relu(self.norm1(x), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(active)
        x = self.conv1(active)
        x = self.conv2(relu(self.norm2(x), inplace=True))
        x = self.conv3(relu(self.norm3(x), inplace=True))
        return x + shortcut


class Stage(nn.Module):
    """Units of one resolution; the first may halve it."""

    def __init__(self, channels: int, out: int, stride: int, units: int) -> None:
        super().__init__()
        first = Unit(channels, out, stride, first=True)
        self.blocks = nn.ModuleList([first, *(Unit(out, out, 1, first=False) for _ in range(units - 1))])

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, h, w) to (b, d', h / stride, w / stride)."""
        for unit in self.blocks:
            x = unit(x)
        return x


class Head(nn.Module):
    """A linear layer, as a convolution of a single place."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, d) to (b, c)."""
        return self.fc(x[:, :, None, None]).flatten(1)


class ResNetV2(nn.Module):
    """Pictures to logits; `classes` may be 0 for none."""

    def __init__(self, config: Bit, classes: int) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.stem = Stem(config.stem)
        before = (config.stem, *config.channels)
        self.stages = nn.ModuleList(
            Stage(channels, out, stride, units)
            for channels, out, stride, units in zip(before, config.channels, (1, 2, 2, 2), config.units, strict=False)
        )
        self.norm = nn.GroupNorm(GROUPS, config.channels[-1], EPSILON)
        self.head = Head(config.channels[-1], classes) if classes else None

    @property
    def blocks(self) -> list[nn.Module]:
        """The units, first to last."""
        return [unit for stage in self.stages for unit in stage.get_submodule("blocks").children()]

    def forward_features(self, images: Tensor) -> Features:
        """(b, 3, h, w) to the last stage's places, t = h / 32 times w / 32, rounded up, after the last ReLU."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        x = relu(self.norm(x), inplace=True)
        return Features(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]), 0)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, c); without a head, to (b, d), the mean over all places."""
        x = self.forward_features(images).tokens.mean(1)
        return x if self.head is None else self.head(x)

    def undecayed(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: those of the norms, and the head's bias."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim == 1}


@torch.no_grad()
def initialise(model: ResNetV2, generator: torch.Generator, *, head_bias: float = 0.0) -> None:
    """The initialisation of the paper's code (big_vision, models/bit_paper.py), drawn from `generator`.

    A truncated normal of variance 1/fan-in for convolutions, zeros for the head with `head_bias` as its bias (-10
    for the sigmoid objective on ImageNet-21k), norms that change nothing.
    """
    for module in model.modules():
        match module:
            case StandardisedConv2d():
                _lecun(module.weight, generator)
            case nn.GroupNorm():
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            case Head():
                nn.init.zeros_(module.fc.weight)
                assert module.fc.bias is not None
                nn.init.constant_(module.fc.bias, head_bias)


def _lecun(weight: Tensor, generator: torch.Generator) -> None:
    # A normal cut off at two deviations has 0.8796 of the deviation it was drawn with.
    std = 1 / 0.87962566 / math.sqrt(weight[0].numel())
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
