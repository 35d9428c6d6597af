"""Vision transformers: ViT of Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), and DeiT of Touvron et
al., "Training data-efficient image transformers & distillation through attention" (ICML 2021).
"""

from dataclasses import dataclass, replace
from itertools import count
from typing import Literal


@dataclass(frozen=True)
class Vit:
    """A vision transformer (Dosovitskiy et al. 2021, section 3.1 and table 1); as it stands, ViT-B/16."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    """Width of the layer inside each MLP."""
    patch: int = 16
    """Side of a patch in pixels."""
    image_size: int = 224
    """Side of a picture in pixels; decides how many positions are learned. Others have them interpolated."""
    representation: bool = False
    """A tanh layer as wide as the model before the head, as the paper has in pretraining."""
    dropout: float = 0.0
    """After every dense layer but those of query, key and value, and after the positions are added (appendix B.1)."""
    stochastic_depth: float = 0.0
    """Share of pictures that skip a branch of the last block in training; rises from 0 in the first."""
    pooling: Literal["token", "gap", "map"] = "token"
    """What the head reads: the class token, the mean of the patches, or what one learned query attends to (Zhai et al.,
    "Scaling Vision Transformers", 2022, section 3.4). There is a class token only for the first."""
    positions: Literal["learned", "sincos2d"] = "learned"
    """A table of weights, or sines and cosines of row and column (Beyer et al., "Better plain ViT baselines", 2022)."""
    prefix_positions: bool = True
    """Whether the tokens before the patches have learned positions too, as in the paper's code; else only patches."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How learned positions become those of another grid: corner to corner as in the paper's code, or as timm does."""
    registers: int = 0
    """Learned tokens that nothing is read off (Darcet et al., "Vision Transformers Need Registers", 2024)."""
    distillation: bool = False
    """A second token with a head of its own, which learns from a teacher (Touvron et al. 2021, section 4)."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """The approximation of the paper's code, or the exact function."""
    epsilon: float = 1e-6
    """Added to the variance in every LayerNorm."""
    qkv_bias: bool = True
    initialisation: Literal["paper", "deit"] = "paper"
    """Whose code the first weights are as in: Dosovitskiy et al.'s or Touvron et al.'s."""

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next."""
        return self.patch

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches: class, distillation, registers, in this order."""
        return (self.pooling == "token") + self.distillation + self.registers

    @property
    def grid(self) -> int:
        """Patches along one side; pixels that do not fill a patch are left out, as in the paper's code."""
        return self.rows(self.image_size)

    @property
    def tokens(self) -> int:
        """Tokens of a picture of the configured size."""
        return self.prefix + self.grid**2

    def rows(self, pixels: int) -> int:
        """Whole patches along a side of so many pixels."""
        return pixels // self.patch

    def left_out(self, pixels: int) -> int:
        """How many of the last pixels along a side fill no patch."""
        return max(0, pixels - self.rows(pixels) * self.stride)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in a picture of so many pixels; ValueError where there are none."""
        rows, columns = self.rows(height), self.rows(width)
        if rows < 1 or columns < 1:
            least = next(side for side in count(1) if self.rows(side))
            raise ValueError(
                f"a picture of {_size(height, width)} pixels holds no patch of {self.patch}: "
                f"both sides have to be at least {least} pixels"
            )
        return rows, columns

    def check(self) -> None:
        """Raise ValueError, with what would do, where there is no such model."""
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide over {self.heads} heads")
        self.grid_of(self.image_size, self.image_size)
        for what, share in (("dropout", self.dropout), ("stochastic_depth", self.stochastic_depth)):
            if not 0 <= share < 1:
                raise ValueError(f"{what} is {share}; it is a share, at least 0 and below 1")
        if self.registers < 0:
            raise ValueError(f"registers is {self.registers}; at least 0 are needed")
        if self.positions == "sincos2d" and (self.width % 4 or self.width < 8):
            above = max(8, -(-self.width // 4) * 4)
            raise ValueError(f"width {self.width} does not divide into sines and cosines of two axes: {above} would")
        if self.distillation and (self.pooling != "token" or self.representation):
            raise ValueError("a distillation token stands beside a class token (pooling token), without representation")


def _size(height: int, width: int) -> str:
    return str(height) if height == width else f"{height} x {width}"


# Table 1 of the paper; Ti and S as DeiT has them (table 1 there); g and G of Zhai et al. 2022, table 2.
vit_b16 = Vit()
vit_b8, vit_b32 = replace(vit_b16, patch=8), replace(vit_b16, patch=32)
vit_ti16 = Vit(width=192, depth=12, heads=3, hidden=768)
vit_s16 = Vit(width=384, depth=12, heads=6, hidden=1536)
vit_s32 = replace(vit_s16, patch=32)
vit_l16 = Vit(width=1024, depth=24, heads=16, hidden=4096)
vit_l32 = replace(vit_l16, patch=32)
vit_h14 = Vit(width=1280, depth=32, heads=16, hidden=5120, patch=14)
vit_giant14 = Vit(width=1408, depth=40, heads=16, hidden=6144, patch=14)
vit_gigantic14 = Vit(width=1664, depth=48, heads=16, hidden=8192, patch=14)


def _deit(vit: Vit) -> Vit:
    # Table 9 of the paper for its stochastic depth.
    return replace(vit, gelu="erf", initialisation="deit", interpolation="bicubic", stochastic_depth=0.1)


deit_ti16, deit_s16, deit_b16 = _deit(vit_ti16), _deit(vit_s16), _deit(vit_b16)
deit_ti16_distilled = replace(deit_ti16, distillation=True)
deit_s16_distilled = replace(deit_s16, distillation=True)
deit_b16_distilled = replace(deit_b16, distillation=True)
# Twice as deep, for what Gong et al., "Vision Transformers with Patch Diversification" (2021), do against
# over-smoothing; the stochastic depth of their released code's first 300 epochs.
deit_s24 = replace(deit_s16, depth=24, stochastic_depth=0.5)
deit_b24 = replace(deit_b16, depth=24, stochastic_depth=0.5)
