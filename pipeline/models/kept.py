"""What a model keeps of a picture for its backward pass, counted by a forward pass without numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.architectures import Architecture
from pipeline.models.build import blocks_of, build


@lru_cache(maxsize=256)
def kept_bytes(config: Architecture, pictures: int = 2, *, half: bool = False, recompute: bool = False) -> float:
    """Bytes for each of so many pictures that a forward pass keeps, in bf16 or fp32, beside the weights.

    With `recompute`, where blocks keep what they are given and no more: also what the block that has most keeps when it
    is computed again. Beside them stands one gradient, as large as the largest tensor that is kept. Torch only pretends
    to compute, so that a model of any size is counted in a moment.
    """
    pictures = max(2, pictures)  # a batch norm of one place needs two
    with FakeTensorMode():
        model, dtype = build(config, 0).train(), torch.bfloat16 if half else torch.float32
        _cast(model, dtype)
        images = torch.empty(pictures, 3, config.image_size, config.image_size, dtype=dtype)
        kept = _Kept(model)
        with kept.watching():
            model(images)
        return (kept.with_recompute() if recompute else kept.whole()) / pictures


class _Kept:
    """The storages that are saved for a backward pass, by the block in which they were."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._held: list[Tensor] = []  # so that no other storage gets the number of one that was counted
        self._sizes: dict[int, int] = {}
        self._outside: set[int] = set()
        self._entering: list[set[int]] = []
        self._inside: list[set[int]] = []
        self._block: set[int] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What is computed in here counts."""
        hooks = [hook for block in blocks_of(self.model) for hook in self._hooks(block)]
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield
        for hook in hooks:
            hook.remove()

    def whole(self) -> int:
        """Bytes of all that is kept by a model whose blocks keep everything."""
        kept = self._outside.union(*self._inside)
        return self._bytes(kept) + self._largest(kept)

    def with_recompute(self) -> int:
        """Bytes that there are at most where blocks keep only what enters them.

        The backward pass comes to the blocks from the last, and frees what entered those behind.
        """
        always, most = set(self._outside), 0
        for entering, inside in zip(self._entering, self._inside, strict=True):
            always |= entering
            most = max(most, self._bytes(always | inside) + self._largest(inside))
        return most

    def _hooks(self, block: nn.Module) -> list[Any]:
        def enter(_: nn.Module, given: tuple[Any, ...]) -> None:
            self._block = set()
            self._inside.append(self._block)
            self._entering.append({self._number(tensor) for tensor in given if isinstance(tensor, Tensor)})

        def leave(*_: object) -> None:
            self._block = None

        return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]

    def _keep(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in self._weights and tensor.numel() > 1:
            number = self._number(tensor)
            (self._outside if self._block is None else self._block).add(number)
        return tensor

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._held.append(tensor)
        self._sizes[storage._cdata] = storage.nbytes()
        return storage._cdata

    def _largest(self, numbers: set[int]) -> int:
        return max((self._sizes[number] for number in numbers), default=0)

    def _bytes(self, numbers: set[int]) -> int:
        return sum(self._sizes[number] for number in numbers)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """As `model.to(dtype)`, which cannot be done to what torch only pretends to have."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))
