"""Losses against over-smoothing: the patches of a picture shall not grow alike with depth (Gong et al. 2021).

arXiv 2104.12753 has two versions with different formulas, its code (github.com/ChengyueGongR/PatchVisionTransformer)
does something else again, and so does Diverse-ViT (Chen et al. 2022, github.com/VITA-Group/Diverse-ViT); what differs
is a choice here. All losses take tokens of patches alone, without class token, of whatever model has them; of a
pyramid, those of the last stage.

Legend: b batch, p pairs of pictures, n patches of a picture, h w rows and columns of their grid (n = h w), k patches
or regions, d width, m labels a picture at the most, c classes.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize

from pipeline.config import Suppression
from pipeline.objectives import classify

_NEIGHBOURS = 7

FIRST_VERSION = Suppression(signed=True, negative="all")
"""arXiv v1. Whether the first layer is detached is the code's word, not the paper's."""
THIRD_VERSION = Suppression()
"""arXiv v3, likewise: absolute similarity, and a patch is told from the others alone."""
RELEASED = Suppression(cosine=0.0, first="embedding", negative="neighbourhood", head="own", dropout=0.2, unit="regions")
"""What the authors' code does (deit/models.py)."""
DIVERSE_VIT = Suppression(
    cosine=0.5, contrastive=0.5, signed=True, diagonal=True, detached=False, normalised=True, head="shared",
    averaged=True,
)  # fmt: skip
"""What the code of Diverse-ViT makes of it (reg.py, mix.py)."""


class Tokens(NamedTuple):
    """What the losses look at, in a model of one width."""

    first: Tensor
    """(b, n, d): of the layer that `Suppression.first` names."""
    last: Tensor
    """(b, n, d): after the last block and its norm."""
    grid: tuple[int, int]
    """(h, w), of the last layer."""


class Mixed(NamedTuple):
    """What the mixing loss compares."""

    logits: Tensor
    """(b, k, c)."""
    targets: Tensor
    """(b, k, c): the share that each class has in the patch or region."""
    area: Tensor
    """(b, k): the share that the patch or region has in the picture."""


class PatchHead(nn.Linear):
    """A classifier of patches, the same one for all places."""

    def __init__(self, width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__(width, classes)
        self.drop = nn.Dropout(dropout)

    def forward(self, input: Tensor) -> Tensor:
        """(b, k, d) to (b, k, c)."""
        return super().forward(self.drop(input))

    def undecayed(self) -> set[str]:
        """Names of the parameters that must not decay."""
        return {"bias"}


@torch.no_grad()
def initialise(head: PatchHead, generator: torch.Generator) -> None:
    """A normal of 0.02 and no bias, as the authors' code has it, drawn from `generator`."""
    nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)


def loss(
    choices: Suppression, classified: Tensor, tokens: Tokens, mixing: Tensor | None, weights: Tensor | None = None
) -> Tensor:
    """The class token's loss with the three others, as chosen.

    `classified` and `mixing` are means over the batch, as `classify.loss` and `mixing_loss` give them; `mixing` is
    only looked at where its coefficient is not 0. `weights` (b) mean what they mean to `classify.loss`.
    """
    total = classified
    if choices.mixing:
        assert mixing is not None, "the choices ask for the mixing loss"
        total = _joined(choices, classified, mixing, tokens.last.shape[1])
    if choices.cosine:
        total = total + choices.cosine * cosine_loss(choices, tokens.last, weights)
    if choices.contrastive:
        total = total + choices.contrastive * contrastive_loss(choices, tokens, weights)
    return total


def _joined(choices: Suppression, classified: Tensor, mixing: Tensor, patches: int) -> Tensor:
    if not choices.averaged:
        return classified + choices.mixing * mixing
    counted = choices.mixing * patches
    return (classified + counted * mixing) / (1 + counted)


# --- cosine ---------------------------------------------------------------------------------------------------------


def similarity(tokens: Tensor, *, signed: bool, diagonal: bool = False) -> Tensor:
    """The mean cosine of the angle between two patches of each picture: (b, n, d) to (b), in fp32 or fp64.

    Of all pairs of different patches, or with `diagonal` of all pairs; of its absolute value unless `signed`: arXiv
    v1 has the signed one, v3 the absolute one. ValueError where there is one patch alone and no pair.
    """
    count = tokens.shape[1]
    pairs = count**2 if diagonal else count * (count - 1)
    if not pairs:
        raise ValueError("a picture of one patch has no two patches to compare: smaller patches are needed")
    unit = normalize(_exact(tokens), dim=-1)
    itself = 0.0 if diagonal else unit.square().sum((1, 2))
    if signed:
        return (unit.sum(1).square().sum(1) - itself) / pairs
    with torch.autocast(unit.device.type, enabled=False):
        gram = unit @ unit.mT  # b n n
    return (gram.abs().sum((1, 2)) - itself) / pairs


def cosine_loss(choices: Suppression, last: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over the batch of the similarity of the last layer's patches (b, n, d)."""
    return _mean(similarity(last, signed=choices.signed, diagonal=choices.diagonal), weights)


# --- contrast -------------------------------------------------------------------------------------------------------


def contrastive_loss(choices: Suppression, tokens: Tokens, weights: Tensor | None = None) -> Tensor:
    """The mean loss of telling, for a patch of the first layer, its own place in the last from a mean of places.

    Cross-entropy over inner products, without a temperature. Its negative is one mean vector, not a sum over places;
    `neighbourhood` has a second one, of the 48 places around (places beyond the edge are zeros), and does without the
    1e-8 that the authors' code adds to the probability. ValueError where the layers differ in shape, as in pyramids.
    """
    if tokens.first.shape != tokens.last.shape:
        first, last = (" x ".join(map(str, layer.shape[1:])) for layer in (tokens.first, tokens.last))
        raise ValueError(
            f"first and last layer are {first} and {last} (patches x width); the contrastive loss compares layers of "
            "one shape: set its coefficient to 0 for a pyramid"
        )
    first, last = _exact(tokens.first.detach() if choices.detached else tokens.first), _exact(tokens.last)
    if choices.normalised:
        first, last = normalize(first, dim=-1), normalize(last, dim=-1)
    places = [last, *_negatives(choices.negative, last, tokens.grid)]
    logits = torch.stack([(first * place).sum(-1) for place in places])  # 2 or 3, b n
    return _mean((logits.logsumexp(0) - logits[0]).mean(1), weights)


def _negatives(
    negative: Literal["others", "all", "neighbourhood"], last: Tensor, grid: tuple[int, int]
) -> list[Tensor]:
    """What each patch is told from: (b, n, d), or for all patches the same (b, 1, d)."""
    count = last.shape[1]
    if negative == "all":
        return [last.mean(1, keepdim=True)]
    if count == 1:
        raise ValueError("a picture of one patch has no others to tell it from: smaller patches are needed")
    others = (last.sum(1, keepdim=True) - last) / (count - 1)
    return [others] if negative == "others" else [others, _around(last, grid)]


def _around(last: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean of the places around each, itself left out, of a square that reaches over the edge: (b, n, d)."""
    area = _NEIGHBOURS**2
    places = last.transpose(1, 2).unflatten(2, grid)  # b d h w
    square = avg_pool2d(places, _NEIGHBOURS, stride=1, padding=_NEIGHBOURS // 2)
    return ((square * area - places) / (area - 1)).flatten(2).transpose(1, 2)


# --- mixing ---------------------------------------------------------------------------------------------------------


def own_shares(weight: Tensor, box: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """How much of each patch is the picture's own, the rest its partner's: (2p, n), exact wherever the boxes lie.

    Pictures 2k and 2k + 1 are mixed with each other: `weight` (p) of a picture's own pixels outside of `box` (p, 4),
    none inside; boxes are (top, bottom, left, right) in pixels, as in `pipeline.data.mix.Mixing`. `patch` is the side
    of a place of the grid in pixels, for a pyramid the last stage's stride. A grid of one place as large as the
    picture gives the share of the picture itself.
    """
    top, bottom, left, right = box.unbind(1)
    rows, columns = _covered(top, bottom, grid[0], patch), _covered(left, right, grid[1], patch)
    inside = (rows[:, :, None] * columns[:, None, :]).flatten(1)  # p n
    return (weight[:, None] * (1 - inside)).repeat_interleave(2, 0)


def _covered(first: Tensor, beyond: Tensor, count: int, patch: int) -> Tensor:
    """The share of each of `count` rows of patches that lies from `first` (p) to `beyond` (p): (p, count)."""
    start = torch.arange(count, device=first.device) * patch
    pixels = torch.minimum(beyond[:, None], start + patch) - torch.maximum(first[:, None], start)
    return pixels.clamp(min=0) / patch


def aligned(box: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Boxes (p, 4) whose edges are moved to the nearest edges of patches, so that each patch has one picture.

    None reaches beyond the grid. A box may lose all its pixels. What it leaves of a picture is another share than
    that which was drawn: see `own_shares`.
    """
    rows, columns = grid
    last = torch.tensor([rows, rows, columns, columns], device=box.device)
    return ((box + patch // 2) // patch).minimum(last) * patch


def patch_targets(labels: Tensor, own: Tensor, classes: int) -> Tensor:
    """The share (b, n, c) of each class in each patch, of `labels` (b, m) with -1 where a picture has fewer.

    A patch has its picture's labels for the share `own` (b, n), and its partner's for the rest.
    """
    hot = classify.multi_hot(labels, classes)
    return torch.lerp(_partners(hot)[:, None], hot[:, None], own[:, :, None])


def _partners(each: Tensor) -> Tensor:
    """(b, ...) of pairs, the two of a pair exchanged."""
    return each.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mixed(
    choices: Suppression, last: Tensor, labels: Tensor, own: Tensor, head: Callable[[Tensor], Tensor], classes: int
) -> Mixed:
    """What `head` makes of the last layer's patches (b, n, d), or of the two regions', and what it should.

    `head` takes (b, k, d) to (b, k, c): a `PatchHead`, or the class token's. `labels` (b, m) are of the pictures
    before they were mixed, `own` (b, n) as `own_shares` gives it.
    """
    if choices.unit == "patches":
        area = torch.full_like(own, 1 / own.shape[1])
        return Mixed(head(last), patch_targets(labels, own, classes), area)
    pooled, area = _regions(last, own)
    whole = 1.0 - torch.arange(2, device=own.device).expand(len(own), -1)  # b 2
    return Mixed(head(pooled), patch_targets(labels, whole, classes), area)


def _regions(last: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The mean patch (b, 2, d) of the picture's own region and of its partner's, and their areas (b, 2)."""
    shares = torch.stack([own, 1 - own], 1)  # b 2 n
    total = shares.sum(2, keepdim=True)
    each = shares / total.where(total > 0, 1)  # a region without patches is zeros, and weighs nothing
    return each.to(last.dtype) @ last, total[:, :, 0] / own.shape[1]


def mixing_loss(
    mixed: Mixed, objective: Literal["sigmoid", "softmax"], smoothing: float, weights: Tensor | None = None
) -> Tensor:
    """The mean over the batch of the classification loss of patches or regions, weighed by area.

    The loss of each is that of `classify.loss`, against the share of each class in it.
    """
    units = mixed.area.shape[1]
    weighed = mixed.area * units if weights is None else mixed.area * units * weights[:, None]
    return classify.loss(
        mixed.logits.flatten(0, 1), mixed.targets.flatten(0, 1), objective, smoothing, weighed.flatten()
    )


def _exact(tokens: Tensor) -> Tensor:
    """In fp32 at least: in bf16 the differences that these losses are about are lost."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def _mean(each: Tensor, weights: Tensor | None) -> Tensor:
    return (each if weights is None else each * weights).mean()
