"""Masked patch prediction: a picture's hidden patches, by their mean colour (Dosovitskiy et al. 2021, B.1.2).

Half of the patches are corrupted: 80 % of them hidden behind a learnt [mask], 10 % shown as another patch, 10 % left
as they are. Of each the model tells the mean colour in 3 bits a channel. What is drawn is drawn on the CPU, from
(seed, epoch, sample), and does not depend on the batch.

Legend: b batch, n patches, k corrupted ones, d width, h w rows and columns of pixels.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.seed import keys, mixed, uniform

COLOURS = 512
CORRUPTED = 0.5
MASKED = 0.8
EXCHANGED = 0.1

_BITS = 3
_PLACE = 0
_KIND = 1 << 32
_SOURCE = 2 << 32
"""Where the numbers of a picture for each purpose begin; there is one for each patch."""


class Corruption(NamedTuple):
    """Which patches are corrupted, in rising order, and how."""

    place: Tensor
    """(b, k) int64."""
    masked: Tensor
    """(b, k) bool: hidden behind [mask]."""
    source: Tensor
    """(b, k) int64: whose embedding stands at the place of one that is not hidden."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Corruption":
        """The same on a device."""
        return Corruption(*(each.to(device, non_blocking=non_blocking) for each in self))


def draw(
    sample: NDArray[np.int64], epoch: NDArray[np.int64], patches: int, *, seed: int, share: float = CORRUPTED
) -> Corruption:
    """How pictures of so many patches, of the numbers `sample` (b) in their epochs `epoch` (b), are corrupted.

    The same number of each picture's patches, `share` rounded down; which ones and how, chance decides for each. The
    other patch that is shown is of the same picture. ValueError where none or all would be corrupted.
    """
    count = int(patches * share)
    if not 0 < count < patches:
        raise ValueError(f"{share:g} of {patches} patches are {count}: some have to be corrupted and some to be left")
    key = keys("mask", seed, epoch, sample)[:, None]  # b 1
    order = np.argsort(mixed(key, _PLACE + np.arange(patches)), axis=1, kind="stable")
    place = np.sort(order[:, :count], axis=1)
    kind = uniform(key, _KIND + place)
    other = (uniform(key, _SOURCE + place) * (patches - 1)).astype(np.int64)
    other += other >= place
    exchanged = (kind >= MASKED) & (kind < MASKED + EXCHANGED)
    source = np.where(exchanged, other, place)
    return Corruption(torch.from_numpy(place), torch.from_numpy(kind < MASKED), torch.from_numpy(source))


def mean_colours(images: Tensor, patch: int) -> Tensor:
    """The mean colour of each patch of pictures (b, h, w, 3), bytes, as a number below 512: (b, n) int64, row by row.

    The upper 3 bits of each channel's mean, red first; in whole numbers, so that every device says the same. Pixels
    that do not fill a patch are left out, as in the ViT.
    """
    rows, columns = images.shape[1] // patch, images.shape[2] // patch
    whole = images[:, : rows * patch, : columns * patch]
    cells = whole.unflatten(2, (columns, patch)).unflatten(1, (rows, patch))  # b rows patch columns patch 3
    total = cells.sum((2, 4), dtype=torch.int64).flatten(1, 2)  # b n 3
    red, green, blue = (total // (patch**2 * 2 ** (8 - _BITS))).unbind(-1)
    return (red << 2 * _BITS) + (green << _BITS) + blue


class MaskedPatches(nn.Module):
    """What masked patch prediction adds to a model of patches: [mask], and a head for colours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, COLOURS)

    def corrupted(self, embedded: Tensor, corruption: Corruption) -> Tensor:
        """Patch embeddings (b, n, d), before positions are added, as the model shall see them."""
        source = corruption.source[:, :, None].expand(-1, -1, embedded.shape[2])
        shown = torch.where(corruption.masked[:, :, None], self.mask.to(embedded.dtype), embedded.gather(1, source))
        place = corruption.place[:, :, None].expand_as(source)
        return embedded.scatter(1, place, shown)

    def forward(self, embedded: Tensor, encode: Callable[[Tensor], Tensor], corruption: Corruption) -> Tensor:
        """Logits of the colours (b, k, 512) of the corrupted patches.

        All that is asked of a model: its patch embeddings (b, n, d), and `encode`, which takes such, adds positions
        and what else the model adds, and gives the patches' tokens (b, n, d) after the last norm.
        """
        return self.predicted(encode(self.corrupted(embedded, corruption)), corruption)

    def predicted(self, tokens: Tensor, corruption: Corruption) -> Tensor:
        """Logits of the colours (b, k, 512) of the corrupted patches, of the last tokens of all patches (b, n, d)."""
        place = corruption.place[:, :, None].expand(-1, -1, tokens.shape[2])
        return self.head(tokens.gather(1, place))

    def undecayed(self) -> set[str]:
        """Names of the parameters that must not decay."""
        return {"mask", "head.bias"}


@torch.no_grad()
def initialise(module: MaskedPatches, generator: torch.Generator) -> None:
    """A normal of 0.02 for [mask], as for positions, and zeros for the head, as for classes; the paper is silent."""
    nn.init.normal_(module.mask, std=0.02, generator=generator)
    nn.init.zeros_(module.head.weight)
    nn.init.zeros_(module.head.bias)


def loss(logits: Tensor, colours: Tensor, corruption: Corruption, weights: Tensor | None = None) -> Tensor:
    """The mean cross-entropy of `logits` (b, k, 512) with the colours (b, n) of the corrupted patches.

    `weights` (b) multiply each picture's loss; the sum is divided by b all the same.
    """
    target = colours.gather(1, corruption.place)  # b k
    each = cross_entropy(logits.float().transpose(1, 2), target, reduction="none").mean(1)
    return (each if weights is None else each * weights).mean()
