"""CMT, convolutions inside a pyramid of transformers: Guo et al., "CMT: Convolutional Neural Networks Meet Vision
Transformers" (CVPR 2022), table 1.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

Four = tuple[int, int, int, int]


class Stage(NamedTuple):
    """What the blocks of one resolution have in common."""

    width: int
    depth: int
    """Blocks."""
    heads: int
    reduction: int
    """Side of the square of places that share one key and one value."""
    hidden: int
    """Width inside the feed-forward network."""
    stride: int
    """Pixels along the side of one place."""


@dataclass(frozen=True)
class Cmt:
    """Four stages, at strides of 4, 8, 16 and 32 pixels, behind a stem of convolutions (section 3.1)."""

    widths: Four = (64, 128, 256, 512)
    depths: Four = (3, 3, 16, 3)
    """Blocks of each stage."""
    heads: Four = (1, 2, 4, 8)
    reductions: Four = (8, 4, 2, 1)
    """Along each side, how many places share one key and one value (the paper's k)."""
    expansion: float = 4.0
    """Width inside the feed-forward network over that of the stage, rounded down (the paper's R)."""
    stem: int = 32
    """Channels of the stem."""
    features: int = 1280
    """Channels that the last stage is projected to before it is pooled."""
    image_size: int = 224
    """Side of a picture in pixels; decides the size of the bias tables. Others have them interpolated."""
    dropout: float = 0.1
    """Before the classifier."""
    stochastic_depth: float = 0.0
    """Share of pictures that skip a branch of the last block in training; rises from 0 in the first."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """From the finest to the coarsest."""
        hidden = (int(width * self.expansion) for width in self.widths)
        strides = (4, 8, 16, 32)
        parts = zip(self.widths, self.depths, self.heads, self.reductions, hidden, strides, strict=True)
        return tuple(Stage(*part) for part in parts)

    @property
    def multiple(self) -> int:
        """What both sides of a picture have to be multiples of."""
        return math.lcm(*(stage.stride * stage.reduction for stage in self.stages))

    def check(self) -> None:
        """Raise ValueError, with values that would do, where there is no such model."""
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"width {width} does not divide over {heads} heads")
        for what, share in (("dropout", self.dropout), ("stochastic_depth", self.stochastic_depth)):
            if not 0 <= share < 1:
                raise ValueError(f"{what} is {share}; it is a share, at least 0 and below 1")
        self.check_size(self.image_size, self.image_size)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, naming the nearest sizes that would do, where a picture of so many pixels cannot be taken.

        All that it needs is that each stage's grid divides into squares that share a key.
        """
        unit = self.multiple
        for what, side in (("height", height), ("width", width)):
            if side < unit or side % unit:
                near = sorted({max(unit, side // unit * unit), (side // unit + 1) * unit})
                raise ValueError(
                    f"a picture of {height} x {width} pixels: its {what} has to be a multiple of {unit}, "
                    f"such as {' or '.join(map(str, near))}"
                )


cmt_ti = Cmt(widths=(46, 92, 184, 368), depths=(2, 2, 10, 2), expansion=3.6, stem=16, image_size=160)
# The paper's table has an expansion of 3.8; its authors trained, and publish, 3.77.
cmt_xs = Cmt(widths=(52, 104, 208, 416), depths=(3, 3, 12, 3), expansion=3.77, stem=16, image_size=192)
cmt_s = Cmt()
cmt_b = Cmt(widths=(76, 152, 304, 608), depths=(4, 4, 20, 4), stem=38, image_size=256, dropout=0.3)
