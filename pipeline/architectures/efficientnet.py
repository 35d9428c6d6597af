"""What an EfficientNet is: seven stages of mobile bottlenecks, and three numbers that scale them together."""

import math
from dataclasses import dataclass
from typing import Literal

SQUEEZE = 4
"""How many times narrower than a block's input the inside of its squeeze and excitation is."""


@dataclass(frozen=True)
class Stage:
    """Mobile bottlenecks of one resolution (Tan and Le 2019, table 1)."""

    kernel: int
    """Side of the depthwise convolution."""
    stride: int
    """Of the first block; the others have 1."""
    expansion: int
    """How many times wider the depthwise convolution is than what comes in."""
    channels: int
    """Channels that come out."""
    blocks: int


_B0 = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)


@dataclass(frozen=True)
class Efficientnet:
    """An EfficientNet (Tan and Le 2019, sections 3.3 and 4); B0 unless scaled."""

    width: float = 1.0
    """Channels, as a multiple of B0's."""
    depth: float = 1.0
    """Blocks of each stage, as a multiple of B0's."""
    image_size: int = 224
    """Side of a picture in pixels; any will do."""
    dropout: float = 0.2
    """Share of the features that the head does not see in training."""
    stochastic_depth: float = 0.2
    """Share of the pictures that skip a block in training, the drop connect of the paper's code: it rises from 0 in
    the first block, and would be this in one after the last."""
    padding: Literal["same", "symmetric"] = "same"
    """Where a stride leaves an odd pixel: TensorFlow's way, as in the paper's code, or PyTorch's."""
    epsilon: float = 1e-3
    """Added to the variance in BatchNorm; 1e-5 in models trained first by PyTorch."""

    @property
    def stem(self) -> int:
        """Channels before the first stage."""
        return self._scaled(32)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, scaled."""
        return tuple(
            Stage(each.kernel, each.stride, each.expansion, self._scaled(each.channels), self._repeated(each.blocks))
            for each in _B0
        )

    @property
    def head(self) -> int:
        """Channels after the last convolution."""
        return self._scaled(1280)

    def check(self) -> None:
        """Raise ValueError where there is no such model."""
        for what, value in (("width", self.width), ("depth", self.depth), ("epsilon", self.epsilon)):
            if not 0 < value < math.inf:
                raise ValueError(f"{what} is {value}; more than 0 is needed")
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; at least 1 is needed")
        for what, share in (("dropout", self.dropout), ("stochastic_depth", self.stochastic_depth)):
            if not 0 <= share < 1:
                raise ValueError(f"{what} is {share}; it is a share, at least 0 and below 1")

    def _repeated(self, blocks: int) -> int:
        return math.ceil(self.depth * blocks)

    def _scaled(self, channels: int) -> int:
        """The nearest multiple of 8, at least 8, and never a tenth less than asked for."""
        wanted = channels * self.width
        rounded = max(8, int(wanted + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * wanted else rounded


efficientnet_b0 = Efficientnet()
efficientnet_b1 = Efficientnet(1.0, 1.1, 240)
efficientnet_b2 = Efficientnet(1.1, 1.2, 260, 0.3)
efficientnet_b3 = Efficientnet(1.2, 1.4, 300, 0.3)
efficientnet_b4 = Efficientnet(1.4, 1.8, 380, 0.4)
efficientnet_b5 = Efficientnet(1.6, 2.2, 456, 0.4)
efficientnet_b6 = Efficientnet(1.8, 2.6, 528, 0.5)
efficientnet_b7 = Efficientnet(2.0, 3.1, 600, 0.5)
