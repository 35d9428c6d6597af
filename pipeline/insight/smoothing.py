"""How alike a picture's patches become from layer to layer (Gong et al. 2021, arXiv 2104.12753).

Legend: l layers, b batch, t tokens (prefix tokens first), d width, h heads.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.objectives.patches import similarity


@torch.no_grad()
def similarities(layers: Iterable[Tensor], *, signed: bool, prefix: int = 0) -> Tensor:
    """The mean cosine between two different patches of a picture, after each layer: (l, b).

    `layers` (b, t, d) may differ in their patches and width; the first `prefix` tokens of each are left out. Signed
    as in arXiv v1, or absolute as in v3, which gives other numbers. ValueError where a layer has a single patch.
    """
    return torch.stack([similarity(layer[:, prefix:], signed=signed) for layer in layers])


@torch.no_grad()
def spreads(maps: Iterable[Tensor], *, prefix: int = 0) -> Tensor:
    """How unevenly patches attend, layer by layer: (l, b); the smoother, the smaller (arXiv v1).

    The standard deviation of a patch's softmax weights over the patches, its mean over patches and heads. `maps` are
    (b, h, t, t); rows and columns of the first `prefix` tokens are left out, without making up for their weight.
    """
    return torch.stack([_spread(weights[:, :, prefix:, prefix:]) for weights in maps])


def _spread(weights: Tensor) -> Tensor:
    return weights.float().std(-1, correction=0).mean((1, 2))
