"""What a hybrid costs: its trunk's convolutions and normalisations, and the transformer behind them (Dosovitskiy et al.
2021, section 3.1).
"""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.architectures.hybrid import ROOT, Hybrid
from pipeline.models.flops import vit


class Convolution(NamedTuple):
    """One convolution of the trunk, with a normalisation behind it and no bias."""

    channels: int
    filters: int
    side: int
    stride: int
    """Pixels from one of its results to the next."""

    @property
    def weights(self) -> int:
        """How many weights its filters have."""
        return self.channels * self.filters * self.side**2

    def places(self, image_size: int) -> int:
        """Where it is worked out, in a picture of so many pixels a side."""
        return (-(-image_size // self.stride)) ** 2


def convolutions(config: Hybrid) -> Iterator[Convolution]:
    """Those of the trunk in order."""
    yield Convolution(3, ROOT, 7, 2)
    channels, filters, stride = ROOT, 4 * ROOT, 4
    for number, units in enumerate(config.trunk):
        before, stride = stride, 4 * 2**number
        yield Convolution(channels, filters, 1, stride)
        for _ in range(units):
            yield Convolution(channels, filters // 4, 1, before)
            yield Convolution(filters // 4, filters // 4, 3, stride)
            yield Convolution(filters // 4, filters, 1, stride)
            channels, before = filters, stride
        filters *= 2


def parameters(config: Hybrid, classes: int) -> int:
    """Parameters of the model with a head of so many classes."""
    trunk = sum(one.weights + 2 * one.filters for one in convolutions(config))
    patches = (config.channels * config.patch**2 + 1) * config.width
    return trunk + patches + vit.behind_patches(config, classes)


def macs(config: Hybrid, classes: int) -> int:
    """Multiply-accumulates of one picture's forward pass."""
    trunk = sum(one.weights * one.places(config.image_size) for one in convolutions(config))
    patches = config.grid**2 * config.channels * config.patch**2 * config.width
    return trunk + patches + vit.macs_behind_patches(config, classes)
