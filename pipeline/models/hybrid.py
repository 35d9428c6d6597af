"""The hybrids of Dosovitskiy et al. 2021 (section 3.1 and appendix B.1): a vision transformer on the map of a ResNet.

The trunk is a ResNet with its activations after the shortcuts, GroupNorm in place of batch normalisation, and
standardised weights; its convolutions and its pooling pad by what fills the last window, one more below and to the
right than above and to the left where it is odd. Parameters bear the names that timm gives them.

Legend: b batch, m channels, i channels of a filter, o filters, y x rows and columns of a map, p q of a picture's
pixels, n patches, d width.
"""

from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import max_pool2d, pad, relu

from pipeline.architectures.hybrid import ROOT, Hybrid
from pipeline.models import vit
from pipeline.models.standardised import by_filter, standardise
from pipeline.models.vit import PatchEmbed, VisionTransformer, lecun

GROUPS = 32
_layer_norm_slopes = torch.ops.aten.native_layer_norm_backward
_TINY = 1e-20  # beside a variance: keeps a filter of equal weights from 0 / 0, and changes no other


class _Divided(torch.autograd.Function):
    """Every filter of (o, ...) less its mean, over `epsilon` beside its deviation.

    The kernels of layer norm do it in one pass each way, since what differs is a number for each filter. With y the
    result, s the deviation and z the filter less its mean over s, the slope of a weight w for the slopes g of y is
    (g - mean(g) - y mean(g z)) / (s + epsilon).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, epsilon: float) -> Tensor:
        result, mean, inverse = torch.native_layer_norm(weight, weight.shape[1:], None, None, _TINY)
        divisor = inverse / (1 + epsilon * inverse)  # 1 / (s + epsilon), for each of o
        ctx.save_for_backward(weight, mean, inverse, divisor)
        return result.mul_(divisor / inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        weight, mean, inverse, divisor = ctx.saved_tensors
        between = (inverse * divisor).sqrt()  # its square divides the product of two filters as y z does
        shape, wanted = weight.shape[1:], [True, False, False]
        found = _layer_norm_slopes(slope.contiguous(), weight, shape, mean, between, None, None, wanted)
        return found[0].mul_(divisor / between), None


def standardised(weight: Tensor, how: Literal["deviation", "variance"]) -> Tensor:
    """Every filter of (o, i, y, x) less its mean and over its deviation, which 1e-5 or, in the root, 1e-8 is added to.

    The statistics are worked out in fp32 also for half precision.
    """
    if how == "variance":
        return standardise(weight, 1e-8)
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return by_filter(exact, lambda filters: _Divided.apply(filters, 1e-5)).to(weight.dtype)


class Convolution(nn.Conv2d):
    """A convolution without bias, of standardised weights, with a result of the size of the picture over the stride."""

    def __init__(self, config: Hybrid, channels: int, filters: int, side: int, stride: int = 1) -> None:
        super().__init__(channels, filters, side, stride, bias=False)
        self.config = config

    def forward(self, input: Tensor) -> Tensor:
        """(b, m, y, x) to (b, o, y / stride, x / stride), rounded up."""
        input = _filled(input, self.kernel_size[0], self.stride[0], 0.0)
        return self._conv_forward(input, standardised(self.weight, self.config.standardisation), None)


class Root(nn.Module):
    """From pixels to the first map, at a stride of 4."""

    def __init__(self, config: Hybrid) -> None:
        super().__init__()
        self.conv = Convolution(config, 3, ROOT, 7, 2)
        self.norm = _norm(config, ROOT)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, p, q) to (b, m, p / 4, q / 4), rounded up."""
        x = relu(self.norm(self.conv(images)))
        return max_pool2d(_filled(x, 3, 2, float("-inf")), 3, 2)


class Unit(nn.Module):
    """A bottleneck of three convolutions beside a shortcut, which is a convolution where shapes differ."""

    def __init__(self, config: Hybrid, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        inner = filters // 4
        self.conv1 = Convolution(config, channels, inner, 1)
        self.norm1 = _norm(config, inner)
        self.conv2 = Convolution(config, inner, inner, 3, stride)
        self.norm2 = _norm(config, inner)
        self.conv3 = Convolution(config, inner, filters, 1)
        self.norm3 = _norm(config, filters)
        self.downsample = _shortcut(config, channels, filters, stride) if channels != filters else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, m, y, x) to (b, o, y / stride, x / stride), rounded up."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = relu(self.norm1(self.conv1(x)))
        x = relu(self.norm2(self.conv2(x)))
        return relu(self.norm3(self.conv3(x)) + shortcut)


class Stage(nn.Module):
    """Units of one resolution; the first has the stride."""

    def __init__(self, config: Hybrid, channels: int, filters: int, stride: int, units: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Unit(config, channels, filters, stride))
        self.blocks.extend(Unit(config, filters, filters, 1) for _ in range(units - 1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, m, y, x) to (b, o, y / stride, x / stride), rounded up."""
        return self.blocks(x)


class Trunk(nn.Module):
    """The root and stages behind it, each but the first at twice the stride of the one before."""

    def __init__(self, config: Hybrid) -> None:
        super().__init__()
        self.stem = Root(config)
        self.stages = nn.Sequential()
        channels, filters = ROOT, 4 * ROOT
        for number, units in enumerate(config.trunk):
            self.stages.append(Stage(config, channels, filters, 2 if number else 1, units))
            channels, filters = filters, 2 * filters

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, p, q) to (b, m, y, x)."""
        return self.stages(self.stem(images))


class HybridEmbed(PatchEmbed):
    """Each patch of the trunk's map, as a vector."""

    def __init__(self, config: Hybrid) -> None:
        super().__init__(config, config.channels)
        self.backbone = Trunk(config) if config.trunk else Root(config)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, p, q) to (b, n, d), row by row."""
        return super().forward(self.backbone(images))


class HybridTransformer(VisionTransformer):
    """Pictures of any size to logits; `classes` may be 0 for none. All that `VisionTransformer` says holds.

    `blocks` are those of the transformer; the units of the trunk stand in `trunk_blocks`.
    """

    def __init__(self, config: Hybrid, classes: int) -> None:
        super().__init__(config, classes, HybridEmbed(config))

    @property
    def trunk_blocks(self) -> list[nn.Module]:
        """The trunk's units in order, without its root."""
        return [module for module in self.patch_embed.modules() if isinstance(module, Unit)]


@torch.no_grad()
def initialise(model: HybridTransformer, generator: torch.Generator, *, head_bias: float = 0.0) -> None:
    """The initialisation of the paper's code, drawn from `generator`; every parameter is set.

    Truncated normals of variance 1/fan-in for the trunk's convolutions; a scale of 0 in the last GroupNorm of each
    unit, so that it begins as its shortcut. The transformer's is that of `pipeline.models.vit.initialise`.
    """
    vit.initialise(model, generator, head_bias=head_bias)
    for module in model.patch_embed.modules():
        if isinstance(module, Convolution):
            lecun(module, generator)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for unit in model.trunk_blocks:
        assert isinstance(unit, Unit)
        nn.init.zeros_(unit.norm3.weight)


def _shortcut(config: Hybrid, channels: int, filters: int, stride: int) -> nn.Sequential:
    layers: dict[str, nn.Module] = {
        "conv": Convolution(config, channels, filters, 1, stride),
        "norm": _norm(config, filters),
    }
    return nn.Sequential(OrderedDict(layers))


def _norm(config: Hybrid, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=config.trunk_epsilon)


def _filled(x: Tensor, side: int, stride: int, value: float) -> Tensor:
    """Padded so that windows of so many places a side, at such strides, begin at each place that a stride reaches."""
    rows, columns = (max(0, (-(-size // stride) - 1) * stride + side - size) for size in x.shape[-2:])
    if not rows and not columns:
        return x
    return pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=value)
