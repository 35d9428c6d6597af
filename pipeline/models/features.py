"""What a model sees in pictures, before its head reads anything off.

Legend: b batch, t tokens, d width, h w rows and columns of the grid.
"""

from typing import NamedTuple

from torch import Tensor, nn

# By family, the layer that reads the classes off.
_HEADS = ("head.fc", "classifier", "head")


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


def before_head(model: nn.Module, images: Tensor) -> Tensor:
    """(b, 3, p, q) to (b, d): what the head of a model of any family reads its classes off, with or without a head.

    Of a model with a tanh layer before its head, what that gives; of one with two heads, what the first one reads.
    """
    head = _head_of(model)
    if head is None:
        return model(images)
    seen: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])

    watch = head.register_forward_pre_hook(keep)
    try:
        model(images)
    finally:
        watch.remove()
    return seen[0].flatten(1)


def _head_of(model: nn.Module) -> nn.Module | None:
    for name in _HEADS:
        try:
            found = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.Linear | nn.Conv2d):
            return found
    return None
