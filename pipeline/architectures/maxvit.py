"""MaxViT, the multi-axis vision transformer of Tu et al. (ECCV 2022), as numbers.

Sizes: the paper's table 1, and `maxvit/models/hp/vision.py` of google-research/maxvit at 70a4707.
"""

from dataclasses import dataclass, replace
from math import gcd

HEAD_WIDTH = 32
"""Width of an attention head, in every size (table 1)."""
EXPANSION = 4
"""How much wider than its block the inside of an MBConv and of an MLP is (table 1)."""
SQUEEZE = 4
"""How much narrower than its block the inside of a squeeze-and-excitation is (table 1: a shrinkage rate of 0.25)."""


@dataclass(frozen=True)
class Maxvit:
    """A multi-axis vision transformer: a stem and stages of blocks, each stage at half the side of the one before."""

    stem: int = 64
    """Width of the two convolutions before the first stage."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Width of each stage."""
    depths: tuple[int, ...] = (2, 2, 5, 2)
    """Blocks of each stage."""
    window: int = 7
    """Side of the square of tokens that attend to each other, in windows as in grids."""
    bias_window: int | None = None
    """Window that the tables of relative biases were made for, where it is not `window`: they stay parameters of that
    size, resized in every forward pass, as the authors' code fine-tunes on larger pictures (`scale_ratio`)."""
    image_size: int = 224
    """Side of a picture in pixels."""
    stochastic_depth: float = 0.0
    """Share of pictures that would skip a branch of a block after the last in training; rises from 0 in the first. The
    paper's table 12 has it by size and corpus."""

    @property
    def stride(self) -> int:
        """Pixels along one side for one token of the last stage."""
        return 2 ** (1 + len(self.widths))

    @property
    def unit(self) -> int:
        """Pixels along one side for one window of the last stage: each side of a picture is a multiple of it."""
        return self.stride * self.window

    @property
    def table(self) -> int:
        """Side of the tables of relative biases: a row for each vertical offset, a column for each horizontal one."""
        return 2 * (self.bias_window or self.window) - 1

    def check(self) -> None:
        """Raise ValueError, with values that would do, where no model has these numbers."""
        if not self.widths or len(self.widths) != len(self.depths):
            raise ValueError(f"{len(self.widths)} widths and {len(self.depths)} depths: each stage has one of both")
        for width in self.widths:
            if width < 1 or width % HEAD_WIDTH:
                near = " or ".join(map(str, _multiples_near(width, HEAD_WIDTH)))
                raise ValueError(f"width {width} does not divide over heads of {HEAD_WIDTH}: {near} would")
        tables = self.window if self.bias_window is None else self.bias_window
        least = {"stem": self.stem, "window": self.window, "depths": min(self.depths), "bias_window": tables}
        for what, value in least.items():
            if value < 1:
                raise ValueError(f"{what} is {getattr(self, what)}; at least 1 is needed")
        if not 0 <= self.stochastic_depth < 1:
            raise ValueError(f"stochastic_depth is {self.stochastic_depth}; it is a share, at least 0 and below 1")
        self.check_size(self.image_size, self.image_size)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, with sizes that would do, where windows do not tile pictures of so many pixels."""
        unfit = [side for side in (height, width) if side < 1 or side % self.unit]
        if not unfit:
            return
        sides = sorted({near for side in unfit for near in _multiples_near(side, self.unit)})
        fitting, rest = divmod(gcd(height, width), self.stride)
        other = f"; a window of {fitting} takes this size" if fitting and not rest else ""
        raise ValueError(
            f"windows of {self.window} do not tile a picture of {height} x {width} pixels: each side has to be a "
            f"multiple of {self.unit}, and {' or '.join(map(str, sides))} would be the nearest{other}"
        )


def _multiples_near(number: int, unit: int) -> list[int]:
    """The multiples of `unit` next to `number`, below and above; none below 1."""
    below = number // unit * unit
    return sorted({max(below, unit), max(below, 0) + unit}) if number % unit else [max(number, unit)]


maxvit_t = Maxvit()
maxvit_s = replace(maxvit_t, widths=(96, 192, 384, 768))
maxvit_b = replace(maxvit_s, depths=(2, 6, 14, 2))
maxvit_l = replace(maxvit_b, stem=128, widths=(128, 256, 512, 1024))
maxvit_xl = replace(maxvit_b, stem=192, widths=(192, 384, 768, 1536))

maxvit_t_384 = replace(maxvit_t, window=12, image_size=384)
maxvit_s_384 = replace(maxvit_s, window=12, image_size=384)
maxvit_b_384 = replace(maxvit_b, window=12, image_size=384)
maxvit_l_384 = replace(maxvit_l, window=12, image_size=384)
maxvit_xl_384 = replace(maxvit_xl, window=12, image_size=384)

maxvit_t_512 = replace(maxvit_t, window=16, image_size=512)
maxvit_s_512 = replace(maxvit_s, window=16, image_size=512)
maxvit_b_512 = replace(maxvit_b, window=16, image_size=512)
maxvit_l_512 = replace(maxvit_l, window=16, image_size=512)
maxvit_xl_512 = replace(maxvit_xl, window=16, image_size=512)
