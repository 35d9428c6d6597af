"""Hybrids: a vision transformer whose patches are those of a convolutional trunk's map (Dosovitskiy et al. 2021,
section 3.1, "Hybrid Architecture"); the smaller ones are those of Steiner et al., "How to train your ViT?" (2022).
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from pipeline.architectures.vit import Vit, vit_b16, vit_l16, vit_s16, vit_ti16

ROOT = 64
"""Channels of the trunk's root."""


@dataclass(frozen=True)
class Hybrid(Vit):
    """A vision transformer behind a ResNet with GroupNorm and standardised weights; as it stands, R50+ViT-B/16."""

    patch: int = 1
    """Side of a patch in places of the trunk's map."""
    trunk: tuple[int, ...] = (3, 4, 9)
    """Units of each stage behind the root; for stride 16 the paper moves those of the fourth to the third."""
    standardisation: Literal["deviation", "variance"] = "deviation"
    """Where a small number keeps the divisor of a filter's weights from 0: 1e-5 beside their standard deviation, as in
    the paper's code, or 1e-8 beside their variance, as in timm."""
    trunk_epsilon: float = 1e-6
    """Added to the variance in the trunk's GroupNorms, as in the paper's code; timm has 1e-5."""

    @property
    def trunk_stride(self) -> int:
        """Pixels from one place of the trunk's map to the next: 4 behind the root, twice as many a stage but one."""
        return 4 * 2 ** max(0, len(self.trunk) - 1)

    @property
    def channels(self) -> int:
        """Channels of the trunk's map."""
        return ROOT * 4 * 2 ** (len(self.trunk) - 1) if self.trunk else ROOT

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next."""
        return self.trunk_stride * self.patch

    def rows(self, pixels: int) -> int:
        """Whole patches along a side of so many pixels; the trunk itself pads, and leaves out nothing."""
        return -(-pixels // self.trunk_stride) // self.patch

    def check(self) -> None:
        """Raise ValueError, with what would do, where there is no such model."""
        super().check()
        if any(units < 1 for units in self.trunk):
            raise ValueError(f"trunk is {self.trunk}; every stage needs at least 1 unit")


def _behind(vit: Vit, trunk: tuple[int, ...], patch: int = 1) -> Hybrid:
    values: dict[str, Any] = {field.name: getattr(vit, field.name) for field in fields(Vit)}
    return Hybrid(**{**values, "patch": patch, "trunk": trunk})


_R26, _R50, _R50_AT_16 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 9)

r_ti16 = _behind(vit_ti16, (), patch=8)
r26_s32 = _behind(vit_s16, _R26)
r26_b32 = _behind(vit_b16, _R26)
r50_b16 = _behind(vit_b16, _R50_AT_16)
r50_b32 = _behind(vit_b16, _R50)
r50_l16 = _behind(vit_l16, _R50_AT_16)
r50_l32 = _behind(vit_l16, _R50)
