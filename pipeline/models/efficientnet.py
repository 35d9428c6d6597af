"""EfficientNet of Tan and Le (ICML 2019): mobile bottlenecks with squeeze and excitation.

Wiring, constants and initialisation are those of the paper's code, parameters bear the names that timm gives them.
A picture may have any size and shape. BatchNorm couples the pictures of a batch in training.

Legend: b batch, d channels, h w rows and columns, t = h w places, c classes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from pipeline.architectures.efficientnet import SQUEEZE, Efficientnet, Stage
from pipeline.models.depth import StochasticDepth
from pipeline.models.features import Features

MOMENTUM = 0.01  # TensorFlow's 0.99 is what is kept


class SameConv2d(nn.Conv2d):
    """A convolution padded until `stride` divides, by half of what is missing before and by the rest after."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, d, h, w) to (b, d', h / stride, w / stride), rounded up."""
        rows, columns = (self._missing(side) for side in input.shape[2:])
        input = pad(input, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return self._conv_forward(input, self.weight, self.bias)

    def _missing(self, side: int) -> int:
        kernel, stride = self.kernel_size[0], self.stride[0]
        last = (side - 1) // stride * stride
        return max(0, last + kernel - side)


class SqueezeExcite(nn.Module):
    """Each channel scaled by what all channels are in the mean (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, h, w) to (b, d, h, w)."""
        mean = x.mean((2, 3), keepdim=True)  # b d 1 1
        return x * self.conv_expand(silu(self.conv_reduce(mean))).sigmoid()


class Separable(nn.Module):
    """A mobile bottleneck that expands nothing: depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, config: Efficientnet, stage: Stage, channels: int, stride: int, drop: float) -> None:
        super().__init__()
        self.conv_dw = _convolution(config, channels, channels, stage.kernel, stride, channels)
        self.bn1 = _norm(config, channels)
        self.se = SqueezeExcite(channels, channels // SQUEEZE)
        self.conv_pw = _convolution(config, channels, stage.channels)
        self.bn2 = _norm(config, stage.channels)
        self.drop = StochasticDepth(drop) if stride == 1 and channels == stage.channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, h, w) to (b, d', h / stride, w / stride)."""
        y = self.se(silu(self.bn1(self.conv_dw(x))))
        y = self.bn2(self.conv_pw(y))
        return y if self.drop is None else x + self.drop(y)


class Bottleneck(nn.Module):
    """The mobile bottleneck, MBConv (Sandler et al. 2018): expansion, depthwise convolution, projection.

    Squeeze and excitation come before the projection, and squeeze to a quarter of what comes in. Beside a shortcut
    where nothing changes shape.
    """

    def __init__(self, config: Efficientnet, stage: Stage, channels: int, stride: int, drop: float) -> None:
        super().__init__()
        inner = stage.expansion * channels
        self.conv_pw = _convolution(config, channels, inner)
        self.bn1 = _norm(config, inner)
        self.conv_dw = _convolution(config, inner, inner, stage.kernel, stride, inner)
        self.bn2 = _norm(config, inner)
        self.se = SqueezeExcite(inner, channels // SQUEEZE)
        self.conv_pwl = _convolution(config, inner, stage.channels)
        self.bn3 = _norm(config, stage.channels)
        self.drop = StochasticDepth(drop) if stride == 1 and channels == stage.channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, h, w) to (b, d', h / stride, w / stride)."""
        y = silu(self.bn1(self.conv_pw(x)))
        y = self.se(silu(self.bn2(self.conv_dw(y))))
        y = self.bn3(self.conv_pwl(y))
        return y if self.drop is None else x + self.drop(y)


class EfficientNet(nn.Module):
    """Pictures to logits; `classes` may be 0 for none.

    `blocks` holds the stages, first to last: what activation checkpointing and sharding wrap.
    """

    def __init__(self, config: Efficientnet, classes: int) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.conv_stem = _convolution(config, 3, config.stem, 3, 2)
        self.bn1 = _norm(config, config.stem)
        self.blocks = nn.ModuleList(_stages(config))
        self.conv_head = _convolution(config, config.stages[-1].channels, config.head)
        self.bn2 = _norm(config, config.head)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.head, classes) if classes else None

    def forward_features(self, images: Tensor) -> Features:
        """(b, 3, h, w) to the last stage's places, t = h / 32 times w / 32, rounded up, after the last convolution."""
        x = silu(self.bn1(self.conv_stem(images)))
        for stage in self.blocks:
            x = stage(x)
        x = silu(self.bn2(self.conv_head(x)))
        return Features(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]), 0)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, c); without a head, to (b, d), the mean over all places."""
        x = self.forward_features(images).tokens.mean(1)
        return x if self.classifier is None else self.classifier(self.dropout(x))

    def undecayed(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: those of the norms, and all biases."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim == 1}


def _stages(config: Efficientnet) -> list[nn.Sequential]:
    total = sum(stage.blocks for stage in config.stages)
    made: list[nn.Sequential] = []
    channels, index = config.stem, 0
    for stage in config.stages:
        block = Separable if stage.expansion == 1 else Bottleneck
        blocks: list[nn.Module] = []
        for stride in (stage.stride, *[1] * (stage.blocks - 1)):
            blocks.append(block(config, stage, channels, stride, config.stochastic_depth * index / total))
            channels, index = stage.channels, index + 1
        made.append(nn.Sequential(*blocks))
    return made


def _convolution(
    config: Efficientnet, channels: int, filters: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    if stride > 1 and config.padding == "same":
        return SameConv2d(channels, filters, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=False)


def _norm(config: Efficientnet, channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, config.epsilon, MOMENTUM)


@torch.no_grad()
def initialise(model: EfficientNet, generator: torch.Generator, *, head_bias: float = 0.0) -> None:
    """The initialisation of the paper's code (tensorflow/tpu, efficientnet_model.py), drawn from `generator`.

    A normal of variance 2/fan-out for convolutions, where a depthwise one counts its own channel only; a uniform
    distribution up to the root of 1/classes for the head, with `head_bias` as its bias; norms that change nothing.
    """
    for module in model.modules():
        match module:
            case nn.Conv2d():
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            case nn.BatchNorm2d():
                module.reset_parameters()
    if model.classifier is not None:
        bound = 1 / math.sqrt(model.classifier.out_features)
        nn.init.uniform_(model.classifier.weight, -bound, bound, generator=generator)
        nn.init.constant_(model.classifier.bias, head_bias)
