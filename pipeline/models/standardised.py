"""Convolutions whose weights are standardised (Qiao et al. 2019, "Weight Standardization", equation 5).

Legend: o filters, i channels of a filter, k side of a filter.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import layer_norm


def standardise(weight: Tensor, epsilon: float) -> Tensor:
    """Every filter of (o, i, k, k) less its mean, divided by the root of its biased variance plus `epsilon`.

    One pass forward and one backward, in the weights' own memory format; statistics in fp32 also for half precision.
    """
    return by_filter(weight, lambda filters: layer_norm(filters, filters.shape[1:], eps=epsilon))


def by_filter(weight: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """What `work` makes of filters (o, ...), in the memory format of (o, i, k, k).

    A filter's statistics do not know the order of its weights: channels-last ones are read as they lie.
    """
    if weight.is_contiguous():
        return work(weight)
    return work(weight.movedim(1, -1)).movedim(-1, 1)  # o k k i, and back


class StandardisedConv2d(nn.Conv2d):
    """A convolution without bias that standardises its weights each time; padded by half a filter on all sides.

    `epsilon` is 1e-10 in the code of BiT.
    """

    def __init__(self, channels: int, filters: int, kernel: int, stride: int = 1, *, epsilon: float = 1e-10) -> None:
        super().__init__(channels, filters, kernel, stride, kernel // 2, bias=False)
        self.epsilon = epsilon

    def forward(self, input: Tensor) -> Tensor:
        """(b, i, h, w) to (b, o, h / stride, w / stride), rounded up."""
        return self._conv_forward(input, standardise(self.weight, self.epsilon), None)
