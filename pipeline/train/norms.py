"""Batch norms as a distributed run needs them: exact in half precision, over any processes, counted once.

Legend: b batch, d channels, y x rows and columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import batch_norm


class BatchNorm(nn.BatchNorm2d):
    """A batch norm whose statistics and arithmetic are fp32, whatever the weights are (Ioffe and Szegedy 2015).

    With `everywhere` it normalises in training by the pictures of all processes, which have to have equally many, as
    one process with all of them would. While `counted` is off, its running statistics stay.
    """

    everywhere = False
    counted = True

    def forward(self, input: Tensor) -> Tensor:
        """(b, d, y, x) to (b, d, y, x)."""
        weight, bias = self.weight.float(), self.bias.float()
        if not self.training:
            return batch_norm(input, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        if self.counted and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        if self.everywhere and dist.is_initialized() and dist.get_world_size() > 1:
            return self._over_all(input, weight, bias)  # type: ignore[call-arg]
        running_mean, running_var = self.running_mean, self.running_var
        assert self.momentum is not None and running_mean is not None and running_var is not None
        if not self.counted:  # a second computation has to save the same tensors as the first
            running_mean, running_var = running_mean.clone(), running_var.clone()
        return batch_norm(input, running_mean, running_var, weight, bias, True, self.momentum, self.eps)

    def leave_uncompiled(self) -> None:
        """Let torch's compiler, which is not imported before it is wanted, leave the exchange with the others out."""
        self._over_all = torch.compiler.disable(self._over_all)  # type: ignore[method-assign]

    def _over_all(self, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        exact = input.float()
        mean = _Mean.apply(exact.mean((0, 2, 3)))  # d
        centred = exact - mean[:, None, None]
        variance = _Mean.apply(centred.square().mean((0, 2, 3)))  # d
        if self.counted:
            self._count(mean.detach(), variance.detach(), input.numel() // input.shape[1] * dist.get_world_size())
        scale = weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + bias[:, None, None]).to(input.dtype)

    def _count(self, mean: Tensor, variance: Tensor, places: int) -> None:
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (places / max(1, places - 1)), self.momentum)


class _Mean(torch.autograd.Function):
    """The mean over the processes; what flows back into it is the mean of what flows back into all of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _mean(values)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return _mean(slope)


def _mean(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def exact(model: nn.Module, *, everywhere: bool) -> None:
    """Put a `BatchNorm` in the place of each of torch's; parameters, buffers and their names stay."""
    for name, module in list(model.named_modules()):
        if type(module) is not nn.BatchNorm2d:
            continue
        made = BatchNorm(module.num_features, module.eps, module.momentum)
        made.weight, made.bias = module.weight, module.bias
        made.running_mean, made.running_var = module.running_mean, module.running_var
        made.num_batches_tracked = module.num_batches_tracked
        made.everywhere = everywhere
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.train(module.training))


def norms_of(model: nn.Module) -> list[BatchNorm]:
    """The batch norms of a model that `exact` has been through."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """What is computed in here is seen by no running statistics: it has been before."""
    norms = norms_of(module)
    for norm in norms:
        norm.counted = False
    try:
        yield
    finally:
        for norm in norms:
            norm.counted = True
