"""What a BiT ResNet (Kolesnikov et al. 2020) costs, from its configuration alone: needs no torch.

Legend: i channels that come into a unit, m channels inside it, o channels that come out, n side of its output.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.architectures.bit import Bit


class _Unit(NamedTuple):
    i: int
    o: int
    before: int
    """Side of its input."""
    n: int
    first: bool

    @property
    def m(self) -> int:
        return self.o // 4

    @property
    def projection(self) -> int:
        """Weights of its shortcut."""
        return self.i * self.o if self.first else 0


def parameters(config: Bit, classes: int) -> int:
    """Parameters of the model with a head of so many classes."""
    last = config.channels[-1]
    stem = 3 * 49 * config.stem
    units = sum(2 * u.i + u.i * u.m + 2 * u.m + 9 * u.m**2 + 2 * u.m + u.m * u.o + u.projection for u in _units(config))
    return stem + units + 2 * last + classes * (last + 1)


def macs(config: Bit, classes: int) -> int:
    """Multiply-accumulates of one picture's forward pass; only convolutions count, and the head."""
    stem = 3 * 49 * config.stem * _halved(config.image_size) ** 2
    units = sum(u.before**2 * u.i * u.m + u.n**2 * (9 * u.m**2 + u.m * u.o + u.projection) for u in _units(config))
    return stem + units + classes * config.channels[-1]


def _units(config: Bit) -> Iterator[_Unit]:
    channels, side = config.stem, _halved(_halved(config.image_size))
    for stage, (out, units) in enumerate(zip(config.channels, config.units, strict=True)):
        for number in range(units):
            after = _halved(side) if stage and number == 0 else side
            yield _Unit(channels, out, side, after, number == 0)
            channels, side = out, after


def _halved(side: int) -> int:
    return (side + 1) // 2
