"""Where the fp32 state of a model lies under each stage of ZeRO, as stretches of parameters.

All that is known here of DeepSpeed's insides (0.19) is known nowhere else: stages 1 and 2 lay each group of parameters
flat and give every process an equal part of the whole; stage 3 gives every process an equal part of each parameter,
laid flat, with padding at the end of the last.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.world import World


@dataclass(frozen=True)
class Stretch:
    """A part of a parameter, laid flat: where it begins in it, and where in the tensor that the optimizer updates."""

    parameter: str
    start: int
    tensor: Tensor
    offset: int
    length: int

    def of(self, values: Tensor) -> Tensor:
        """The view of the stretch in something as long as the tensor."""
        return values.detach().view(-1).narrow(0, self.offset, self.length)


class Whole:
    """Without ZeRO: the optimizer updates the parameters themselves, and every process has them all."""

    shared = False

    def __init__(self, model: nn.Module, optimizer: Any, world: World) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.tensors: list[Tensor] = [p for _, p in named]
        self.stretches = [Stretch(name, 0, p, 0, p.numel()) for name, p in named]

    def refresh(self) -> None:
        """Make the weights that compute follow those that the optimizer updates; every process has to call."""

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 weight of a parameter, in its shape; every process has to ask."""
        return parameter.detach()


class Grouped:
    """Stages 1 and 2, and stage 1's own optimizer for bf16 weights."""

    shared = True

    def __init__(self, model: nn.Module, optimizer: Any, world: World) -> None:
        self._optimizer = optimizer
        self.tensors: list[Tensor] = [group["params"][0] for group in optimizer.optimizer.param_groups]
        self.stretches: list[Stretch] = []
        for name, parameter in model.named_parameters():
            if (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
                of_parameter, of_tensor = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                tensor = self.tensors[mapping.param_group_index]
                self.stretches.append(Stretch(name, of_parameter.start, tensor, of_tensor.start, of_tensor.numel))

    def refresh(self) -> None:
        """Make the weights that compute follow those that the optimizer updates; every process has to call."""
        self._optimizer.update_lp_params()

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 weight of a parameter, in its shape; every process has to ask."""
        if parameter.dtype == torch.float32:
            return parameter.detach()
        return parameter.get_full_hp_param().view_as(parameter)  # type: ignore[attr-defined]


class Parted:
    """Stage 3."""

    shared = True

    def __init__(self, model: nn.Module, optimizer: Any, world: World) -> None:
        self._optimizer = optimizer
        self.tensors: list[Tensor] = list(optimizer.fp32_partitioned_groups_flat)
        self.stretches: list[Stretch] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                group, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = world.rank * part
                length = min(part, parameter.ds_numel - start)  # type: ignore[attr-defined]
                if length > 0:  # the rest is padding
                    self.stretches.append(Stretch(name, start, self.tensors[group], offset, length))

    def refresh(self) -> None:
        """Make the weights that compute follow those that the optimizer updates; every process has to call."""
        zero = self._optimizer
        zero._partition_all_parameters()
        for group in range(len(self.tensors)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if small := zero.persistent_parameters:  # which DeepSpeed leaves whole from step to step
            small[0].all_gather(small)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 weight of a parameter, in its shape; every process has to ask."""
        return self._optimizer.get_full_hp_param(parameter)


Layout = Whole | Grouped | Parted


def layout_of(model: nn.Module, optimizer: Any, world: World) -> Layout:
    """Where the state lies that this optimizer of DeepSpeed's updates."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return Parted(model, optimizer, world)
    if hasattr(optimizer, "update_lp_params"):
        return Grouped(model, optimizer, world)
    return Whole(model, optimizer, world)
