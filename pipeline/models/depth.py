"""Stochastic depth, which every family with residual branches has (Huang et al. 2016)."""

from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """In training, zeros for a share of the pictures; the others are scaled up, so that the mean does not change."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(b, ...) to (b, ...); which pictures are left out is drawn as a dropout's mask is."""
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1))
        return x * kept.bernoulli_(1 - self.rate).div_(1 - self.rate)
