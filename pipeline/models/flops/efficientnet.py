"""What an EfficientNet (Tan and Le 2019) costs, from its configuration alone: needs no torch.

Legend: i channels that come into a block, m channels inside it, r squeezed ones, o channels that come out, k side of
the depthwise convolution, n side of the output.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.architectures.efficientnet import SQUEEZE, Efficientnet


class _Block(NamedTuple):
    i: int
    expansion: int
    o: int
    k: int
    before: int
    """Side of its input."""
    n: int

    @property
    def m(self) -> int:
        return self.i * self.expansion

    @property
    def r(self) -> int:
        return self.i // SQUEEZE

    @property
    def widening(self) -> int:
        """Weights of its first convolution; one that expands nothing has none."""
        return self.i * self.m if self.expansion > 1 else 0


def parameters(config: Efficientnet, classes: int) -> int:
    """Parameters of the model with a head of so many classes; running statistics are none."""
    stem = (9 * 3 + 2) * config.stem
    head = (config.stages[-1].channels + 2) * config.head
    return stem + sum(map(_block_parameters, _blocks(config))) + head + classes * (config.head + 1)


def macs(config: Efficientnet, classes: int) -> int:
    """Multiply-accumulates of one picture's forward pass; only convolutions count, and the head."""
    stem = 9 * 3 * config.stem * _divided(config.image_size, 2) ** 2
    blocks = list(_blocks(config))
    head = config.stages[-1].channels * config.head * blocks[-1].n ** 2
    return stem + sum(map(_block_macs, blocks)) + head + classes * config.head


def _block_parameters(b: _Block) -> int:
    widening = b.widening + 2 * b.m if b.widening else 0
    depthwise = (b.k**2 + 2) * b.m
    squeeze = (b.m + 1) * b.r + (b.r + 1) * b.m
    return widening + depthwise + squeeze + (b.m + 2) * b.o


def _block_macs(b: _Block) -> int:
    return b.before**2 * b.widening + b.n**2 * (b.k**2 * b.m + b.m * b.o) + 2 * b.m * b.r


def _blocks(config: Efficientnet) -> Iterator[_Block]:
    channels, side = config.stem, _divided(config.image_size, 2)
    for stage in config.stages:
        for stride in (stage.stride, *[1] * (stage.blocks - 1)):
            after = _divided(side, stride)
            yield _Block(channels, stage.expansion, stage.channels, stage.kernel, side, after)
            channels, side = stage.channels, after


def _divided(side: int, stride: int) -> int:
    return -(-side // stride)
