"""Linear heads on frozen features: those of all learning rates and seeds in one pass.

The gradient of a linear softmax classifier is known in closed form, so that heads with the same pictures are one matrix
beside the other, and a step of all of them is two products.

Legend: n pictures, b of a batch, d features, c classes, s seeds, r rates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.transfer.batches import turn
from pipeline.transfer.protocols import Recipe

EPSILON = 1e-5


class Heads:
    """A head for each of s seeds and r rates."""

    def __init__(self, weights: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> None:
        self.weights, self.bias = weights, bias  # s r c d, s r c
        self._mean, self._scale = mean, scale  # d, d

    def logits(self, features: Tensor, seed: int, rate: int) -> Tensor:
        """(n, d) to (n, c), of the head with the seed and the rate at these places."""
        x = (features.to(self._mean) - self._mean) * self._scale
        return x @ self.weights[seed, rate].T + self.bias[seed, rate]


@torch.no_grad()
def train_heads(
    features: Tensor, labels: Tensor, classes: int, recipe: Recipe, rates: Sequence[float], seeds: Sequence[int]
) -> Heads:
    """Heads that have learnt features (n, d) and labels (n), by softmax and SGD with momentum, from zeros.

    Features are standardised by those that are learnt from, as for few-shot learning. Each head is the one that it
    would be alone, to rounding; which pictures a step sees is decided by its seed, as in every training.
    """
    assert recipe.optimizer == "sgd" and not recipe.clip and not recipe.weight_decay, "of these the closed form is"
    mean, scale = features.mean(0), 1 / (features.std(0, correction=0) + EPSILON)
    x = (features - mean) * scale
    shape, device = (len(seeds), len(rates), classes), x.device
    heads = Heads(torch.zeros(*shape, x.shape[1], device=device), torch.zeros(shape, device=device), mean, scale)
    moving = torch.zeros_like(heads.weights), torch.zeros_like(heads.bias)
    for step in range(recipe.steps):
        chosen = torch.stack([torch.from_numpy(turn(len(x), step, recipe.batch, seed)[0]) for seed in seeds]).to(device)
        rate = torch.tensor([recipe.rate_at(rate, step) for rate in rates], device=device)
        _step(heads, moving, x[chosen], labels[chosen], rate, recipe.momentum)
    return heads


def _step(
    heads: Heads, moving: tuple[Tensor, Tensor], x: Tensor, labels: Tensor, rate: Tensor, momentum: float
) -> None:
    """One step on features (s, b, d) with labels (s, b), at rates (r)."""
    shape = heads.bias.shape[1:]
    logits = (heads.weights.flatten(1, 2) @ x.mT).unflatten(1, shape) + heads.bias[..., None]  # s r c b
    off = torch.softmax(logits, 2)  # with pictures last, a processor takes many at once
    which = labels[:, None, None, :].expand(-1, shape[0], 1, -1)  # s r 1 b
    off.scatter_add_(2, which, off.new_full((), -1.0).expand(which.shape))  # now by how much each share is too high
    off /= x.shape[1]
    for value, moved, gradient in (
        (heads.weights, moving[0], (off.flatten(1, 2) @ x).unflatten(1, shape)),
        (heads.bias, moving[1], off.sum(3)),
    ):
        moved.mul_(momentum).add_(gradient)
        value.sub_(rate.view(-1, *[1] * (value.ndim - 2)) * moved)
