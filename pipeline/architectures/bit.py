"""What a BiT model is: the convolutional baseline of the vision transformer's paper."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bit:
    """A pre-activation ResNet with GroupNorm and standardised weights (Kolesnikov et al. 2020, section 2.1)."""

    units: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Bottlenecks of each stage."""
    factor: int = 1
    """How many times as many channels as a ResNet has: the number after the x in the model's name."""
    image_size: int = 224
    """Side of a picture in pixels; any will do."""

    @property
    def stem(self) -> int:
        """Channels before the first stage."""
        return 64 * self.factor

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels that each stage puts out; its bottlenecks are a quarter as wide."""
        narrowest = 256 * self.factor
        return narrowest, 2 * narrowest, 4 * narrowest, 8 * narrowest

    def check(self) -> None:
        """Raise ValueError where there is no such model."""
        if min(self.units) < 1:
            raise ValueError(f"units is {self.units}; every stage needs at least 1")
        for what, value in (("factor", self.factor), ("image_size", self.image_size)):
            if value < 1:
                raise ValueError(f"{what} is {value}; at least 1 is needed")


_R50, _R101, _R152, _R200 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3)

bit_r50x1 = Bit(_R50)
bit_r50x2 = Bit(_R50, 2)
bit_r50x3 = Bit(_R50, 3)
bit_r50x4 = Bit(_R50, 4)
bit_r101x1 = Bit(_R101)
bit_r101x2 = Bit(_R101, 2)
bit_r101x3 = Bit(_R101, 3)
bit_r101x4 = Bit(_R101, 4)
bit_r152x1 = Bit(_R152)
bit_r152x2 = Bit(_R152, 2)
bit_r152x3 = Bit(_R152, 3)
bit_r152x4 = Bit(_R152, 4)
bit_r200x1 = Bit(_R200)
bit_r200x2 = Bit(_R200, 2)
bit_r200x3 = Bit(_R200, 3)
bit_r200x4 = Bit(_R200, 4)
