"""What a model sees in pictures, before its head reads anything off.

Legend: b batch, t tokens, d width, h w rows and columns of the grid.
"""

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """The last layer's output as tokens: `prefix` tokens that belong to no place, then the grid, row by row."""

    tokens: Tensor
    """(b, t, d), t = prefix + h w."""
    grid: tuple[int, int]
    """(h, w)."""
    prefix: int

    @property
    def patches(self) -> Tensor:
        """(b, h w, d): the tokens that belong to places."""
        return self.tokens[:, self.prefix :]
