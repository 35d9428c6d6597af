"""The module of any architecture, and its first weights."""

from typing import Any

import torch
from torch import nn

from pipeline.architectures import Architecture, Bit, Cmt, Efficientnet, Hybrid, Maxvit, Vit
from pipeline.models import bit, cmt, efficientnet, hybrid, maxvit, vit


def build(config: Architecture, classes: int) -> nn.Module:
    """The module of an architecture, with whatever weights torch gives it; 0 classes for no head."""
    match config:
        case Hybrid():
            return hybrid.HybridTransformer(config, classes)
        case Vit():
            return vit.VisionTransformer(config, classes)
        case Bit():
            return bit.ResNetV2(config, classes)
        case Cmt():
            return cmt.ConvolutionalTransformer(config, classes)
        case Maxvit():
            return maxvit.MultiAxisVisionTransformer(config, classes)
        case Efficientnet():
            return efficientnet.EfficientNet(config, classes)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model of any family, in order: what is compiled, or computed a second time rather than kept."""
    blocks: Any = model.blocks
    match model:
        case efficientnet.EfficientNet():
            return [block for stage in blocks for block in stage.children()]
        case hybrid.HybridTransformer():
            return [*model.trunk_blocks, *blocks]
        case _:
            return list(blocks)


def initialise(model: nn.Module, generator: torch.Generator, *, head_bias: float = 0.0) -> None:
    """The first weights as the family's authors draw them, all from `generator`; `head_bias` for the head."""
    match model:
        case hybrid.HybridTransformer():
            hybrid.initialise(model, generator, head_bias=head_bias)
        case vit.VisionTransformer():
            vit.initialise(model, generator, head_bias=head_bias)
        case bit.ResNetV2():
            bit.initialise(model, generator, head_bias=head_bias)
        case cmt.ConvolutionalTransformer():
            cmt.initialise(model, generator, head_bias=head_bias)
        case maxvit.MultiAxisVisionTransformer():
            maxvit.initialise(model, generator, head_bias=head_bias)
        case efficientnet.EfficientNet():
            efficientnet.initialise(model, generator, head_bias=head_bias)
        case _:
            raise ValueError(f"{type(model).__name__} is of no family of this project")
