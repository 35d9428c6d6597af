"""The one door to DeepSpeed: a model and its optimizer, spread over the processes by ZeRO.

Only the parts that every stage has in common show outside: forward, backward, step, and the state as fragments of
parameters, which know nothing of how many processes there are.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.world import World

STATES = ("master", "exp_avg", "exp_avg_sq")
"""What there is of each parameter: the fp32 weights and AdamW's two moments."""


@dataclass(frozen=True)
class Fragment:
    """A stretch of a parameter, laid flat, that this process keeps: where it starts, and a view of each state."""

    parameter: str
    start: int
    states: dict[str, Tensor]

    @property
    def length(self) -> int:
        """Numbers in the stretch."""
        return self.states["master"].numel()


class Engine:
    """A model under DeepSpeed; needs torch.distributed to be initialised."""

    def __init__(self, config: Config, model: nn.Module, world: World, device: torch.device) -> None:
        deepspeed = library(device)
        self.config, self.world, self.device = config, world, device
        self.model = model.to(device)
        self._plain = config.zero == 0 and config.precision == "fp32"
        self._norm = torch.zeros(())
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=0.0,  # the loop sets it at each step
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        self._engine: Any = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings(config, world.size), dist_init_required=False
        )[0]

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) in [-1, 1] to logits."""
        return self._engine(images.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that compute."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a pass; at the last pass of a step it is averaged over processes."""
        self._engine.backward(loss)

    def step(self) -> None:
        """After each pass; acts at the last one of a step."""
        if self._plain and self._engine.is_gradient_accumulation_boundary():
            # Without ZeRO and in fp32 DeepSpeed clips but keeps no norm.
            self._norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self._engine.step()

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the step under way."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def seed(self, seed: int) -> None:
        """What the model draws from now on follows from `seed`.

        The two generators that can matter; `torch.manual_seed` looks at every kind of device there is, each time.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @property
    def gradient_norm(self) -> Tensor:
        """Global norm of the last step's gradient, before clipping."""
        norm = self._norm if self._plain else self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of each value over the processes; every process has to ask."""
        return self.sum(values) / self.world.size

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each value over the processes; every process has to ask."""
        total = values.clone()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total

    def agree(self, value: Any) -> Any:
        """What process 0 holds; every process has to ask."""
        box = [value]
        if self.world.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def buffers(self) -> dict[str, Tensor]:
        """What the model keeps beside its weights, such as running means, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._kept.items()}

    @property
    def _kept(self) -> dict[str, Tensor]:
        """The buffers that belong to the state of the model, by name."""
        state = self.model.state_dict().keys()
        return {name: value for name, value in self.model.named_buffers() if name in state}

    def load_buffers(self, values: dict[str, Tensor]) -> None:
        """Take what `buffers` gave; ValueError where it is another model's."""
        kept = self._kept
        if values.keys() != kept.keys():
            raise ValueError(f"the checkpoint has other buffers than the model: {sorted(values.keys() ^ kept.keys())}")
        for name, value in kept.items():
            value.copy_(values[name])

    def average_buffers(self) -> None:
        """Give every process the mean of all processes' running means and variances; every process has to call.

        Each normalises by its own pictures in between.
        """
        for value in self._kept.values() if self.world.size > 1 else ():
            if value.is_floating_point():
                value.copy_(self.mean(value.float()))

    def weights(self) -> dict[str, Tensor]:
        """The fp32 weights and the buffers on the CPU, whole; every process has to ask."""
        from deepspeed.utils import safe_get_full_fp32_param

        def whole(parameter: nn.Parameter) -> Tensor:
            if parameter.dtype == torch.float32:
                return parameter
            return safe_get_full_fp32_param(parameter).view_as(parameter)  # type: ignore[union-attr]

        weights = {name: whole(p).detach().float().cpu().clone() for name, p in self.model.named_parameters()}
        return weights | {
            name: value.float() if value.is_floating_point() else value for name, value in self.buffers().items()
        }

    def fragments(self) -> list[Fragment]:
        """What this process has to save: with the other processes' fragments, every number of the state once."""
        if self._partitioned:
            return self._own()
        # Without ZeRO everybody has everything: each saves a share.
        own = self._own()
        return [own[i] for i in self.world.share(len(own))]

    def optimizer_steps(self) -> int:
        """Updates that the optimizer has made, by its own count."""
        return max((int(state["step"]) for state in self._base.state.values()), default=0)

    def prepare_restore(self, optimizer_steps: int) -> list[Fragment]:
        """The fragments to fill with what was saved; call `restored` when that is done."""
        for group in self._base.param_groups:
            for flat in group["params"]:
                count = torch.tensor(float(optimizer_steps), dtype=torch.float32, device=flat.device)
                zeros = {name: torch.zeros_like(flat) for name in STATES[1:]}
                self._base.state[flat] = {"step": count, **zeros}
        return self._own()

    def restored(self) -> None:
        """Make the weights that compute follow the master weights; every process has to call."""
        if hasattr(self._engine.optimizer, "update_lp_params"):
            self._engine.optimizer.update_lp_params()

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The optimizer that ZeRO has wrapped."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    @property
    def _partitioned(self) -> bool:
        """Whether ZeRO has given this process a part of the parameters' state rather than all of it."""
        return any(hasattr(p, "_hp_mapping") for p in self.model.parameters())

    def _own(self) -> list[Fragment]:
        """All that this process keeps."""
        if self._partitioned:
            mapped = ((name, p._hp_mapping) for name, p in self.model.named_parameters())  # type: ignore[attr-defined]
            return [self._of_partition(name, mapping) for name, mapping in mapped if mapping is not None]
        return [self._whole(name, p) for name, p in self.model.named_parameters()]

    def _whole(self, name: str, parameter: nn.Parameter) -> Fragment:
        state = self._base.state[parameter]
        return Fragment(name, 0, {"master": parameter.data.view(-1), **{k: state[k].view(-1) for k in STATES[1:]}})

    def _of_partition(self, name: str, mapping: Any) -> Fragment:
        flat = self._base.param_groups[mapping.param_group_index]["params"][0]
        where = mapping.get_hp_fragment_address()
        state = self._base.state[flat]
        moments = {k: state[k].view(-1).narrow(0, where.start, where.numel) for k in STATES[1:]}
        return Fragment(name, mapping.lp_fragment_address.start, {"master": mapping.hp_fragment.data, **moments})


def settings(config: Config, processes: int) -> dict[str, Any]:
    """DeepSpeed's configuration. The learning rate is not in it: it has one home, `optim/schedule.py`."""
    micro, passes = config.micro(processes), config.passes(processes)
    return {
        "train_batch_size": micro * passes * processes,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {"stage": config.zero},
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # the default follows the weights, and bf16 loses small gradients
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def library(device: torch.device) -> Any:
    """DeepSpeed, imported as it has to be for this device."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        # An operator for inference that is compiled under a lock file: a process killed there leaves the lock, and
        # every later start waits for it for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
