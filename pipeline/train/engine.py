"""The one door to DeepSpeed: a model and its optimizer, spread over the processes by ZeRO.

Only the parts that every stage has in common show outside: forward, backward, step, and the state as fragments of
parameters, which know nothing of how many processes there are.
"""

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.models.memory import BUCKET
from pipeline.optim.optimizers import AVERAGE, MASTER, factored_of, follow, optimizer_of, state_after, states_of
from pipeline.train import blocks, norms
from pipeline.train.partitions import Layout, Stretch, layout_of
from pipeline.world import World


@dataclass(frozen=True)
class Fragment:
    """A stretch of a parameter, laid flat, that this process keeps: where it starts, and a view of each state.

    "master" is the fp32 weights; the others are the optimizer's, by its names for them, and "average".
    """

    parameter: str
    start: int
    states: dict[str, Tensor]

    @property
    def length(self) -> int:
        """Numbers in the stretch."""
        return self.states[MASTER].numel()


class Engine:
    """A model under DeepSpeed; needs torch.distributed to be initialised."""

    def __init__(self, config: Config, model: nn.Module, world: World, device: torch.device) -> None:
        deepspeed = library(device)
        self.config, self.world, self.device = config, world, device
        self.model = model.to(device)
        self.skipped = False
        """Whether the update of the last step was left out, on all processes alike."""
        norms.exact(model, everywhere=config.batch_norm == "global")
        blocks.wrap(model, compiled=config.compiled, recompute=config.recompute)
        self._base = optimizer_of(config.optim, model.named_parameters(), undecayed_of(model))
        exact = {name: value.clone() for name, value in model.named_buffers()}
        self._engine: Any = deepspeed.initialize(
            model=model, optimizer=self._base, config=settings(config, world.size), dist_init_required=False
        )[0]
        self._keep_exact(exact)
        state = model.state_dict().keys()
        self._kept = {name: value for name, value in model.named_buffers() if name in state}
        self._layout: Layout = layout_of(model, self._engine.optimizer, world)
        self._plain = not self._layout.shared
        self._clip, self._norm = config.optim.clip, torch.zeros(())
        self._limit: Tensor | None = None
        self._losses: list[Tensor] = []
        self._averages: list[Tensor] = []
        self._begin(0)
        if config.optim.average:
            self._averages = [tensor.detach().clone() for tensor in self._layout.tensors]
        self._settled = self._taken()

    def forward(self, images: Tensor) -> Any:
        """(b, 3, s, s) in [-1, 1] to what the model says of them."""
        return self._engine(images.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that compute."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def loss_guard(self, limit: Tensor | float | None) -> None:
        """Leave out the updates of steps whose loss, the mean over passes and processes, is above the limit.

        Holds until it is set again; None takes it back. The same on every process.
        """
        # Filled in on the device: a copy to it would be waited for.
        self._limit = None if limit is None else torch.full((), float(limit), device=self.device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a pass; at the last pass of a step it is averaged over processes.

        A loss that is not finite, or too high, makes the gradient NaN. So the one look that ZeRO takes at the norm of
        the gradient, on all processes alike, decides on the update, and there is nothing more to wait for.
        """
        found = loss.detach().float()
        good = found.isfinite()
        self._losses.append(found)
        if self._limit is not None and self._engine.is_gradient_accumulation_boundary():
            good &= self.mean(torch.stack(self._losses).mean()) <= self._limit
        self._engine.backward(loss * torch.where(good, 1.0, math.nan).to(loss.dtype))

    def step(self) -> None:
        """After each pass; acts at the last one of a step.

        Where the loss or a gradient of any process is not finite, weights, state and buffers stay as they were before
        the step, and `skipped` says so.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        left_out = self._plain and not self._clipped()
        self._engine.step()
        self.skipped = bool(left_out or getattr(self._engine.optimizer, "overflow", False))
        self._losses.clear()
        if self.skipped:
            self._put_back(self._settled)
            return
        self._updates += 1
        if self._averages:
            follow(self._averages, [t.detach() for t in self._layout.tensors], self.config.optim.average)
        self._settled = self._taken()

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the step under way."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def set_clip(self, clip: float) -> None:
        """Set the largest global norm of the gradient for the step under way; 0 clips nothing."""
        self._clip = clip
        if not self._plain:
            self._engine.optimizer.clip_grad = clip

    def seed(self, seed: int) -> None:
        """What the model draws from now on follows from `seed`.

        The two generators that can matter; `torch.manual_seed` looks at every kind of device there is, each time.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @property
    def gradient_norm(self) -> Tensor:
        """Global norm of the last step's gradient, before clipping; infinite where the update was left out."""
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

    def gather(self, value: Any) -> list[Any]:
        """What each process holds, by rank; every process has to ask."""
        box = [value] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(box, value)
        return box

    def buffers(self) -> dict[str, Tensor]:
        """What the model keeps beside its weights, such as running means, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._kept.items()}

    def load_buffers(self, values: dict[str, Tensor]) -> None:
        """Take what `buffers` gave; ValueError where it is another model's."""
        kept = self._kept
        if values.keys() != kept.keys():
            raise ValueError(f"the checkpoint has other buffers than the model: {sorted(values.keys() ^ kept.keys())}")
        for name, value in kept.items():
            value.copy_(values[name])
        self._settled = self._taken()

    def average_buffers(self) -> None:
        """Give every process the mean of all processes' running means and variances; every process has to call.

        Each normalises by its own pictures in between.
        """
        for value in self._kept.values() if self.world.size > 1 else ():
            if value.is_floating_point():
                value.copy_(self.mean(value.float()))
        self._settled = self._taken()

    def weights(self) -> dict[str, Tensor]:
        """The fp32 weights, or where there is one their moving average, and the buffers, on the CPU, whole.

        Every process has to ask.
        """
        with self.averaged():
            return self.raw_weights()

    def raw_weights(self) -> dict[str, Tensor]:
        """The fp32 weights that are trained, and the buffers, on the CPU, whole; every process has to ask."""
        weights = {name: self._layout.whole(p).float().cpu().clone() for name, p in self.model.named_parameters()}
        return weights | {
            name: value.float() if value.is_floating_point() else value for name, value in self.buffers().items()
        }

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In here the model computes with the moving average of its weights, if it has one; no step is taken.

        Running statistics are those of the weights that are trained. Every process has to come.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if not self._averages:
            return
        for weights, average in zip(self._layout.tensors, self._averages, strict=True):
            aside = weights.detach().clone()
            weights.copy_(average)
            average.copy_(aside)
        self._layout.refresh()

    def fragments(self) -> list[Fragment]:
        """What this process has to save: with the other processes' fragments, every number of the state once."""
        own = self._own()
        # Without ZeRO everybody has everything: each saves a share.
        return own if self._layout.shared else [own[i] for i in self.world.share(len(own))]

    def extra(self) -> dict[str, Tensor]:
        """What the optimizer keeps of a parameter in fewer numbers than it has, on the CPU; alike on every process."""
        return {name: value.detach().cpu().clone() for name, value in self._factored().items()}

    def load_extra(self, values: dict[str, Tensor]) -> None:
        """Take what `extra` gave, after `prepare_restore`; ValueError where it is another optimizer's or model's."""
        wanted = self._factored()
        if values.keys() != wanted.keys():
            odd = sorted(values.keys() ^ wanted.keys())
            raise ValueError(f"the checkpoint has other states of the optimizer than the run: {', '.join(odd[:3])}")
        for name, value in wanted.items():
            value.copy_(values[name])

    def _factored(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for stretch in self._layout.stretches:
            for name in factored_of(self.config.optim, stretch.tensor.shape):
                found[f"optimizer/{name}/{stretch.parameter}"] = self._base.state[stretch.tensor][name]
        return found

    def optimizer_steps(self) -> int:
        """Updates that the optimizer has made: steps less those whose update was left out."""
        return self._updates

    def prepare_restore(self, optimizer_steps: int) -> list[Fragment]:
        """The fragments to fill with what was saved; call `restored` when that is done."""
        self._begin(optimizer_steps)
        return self._own()

    def restored(self) -> None:
        """Make the weights that compute follow the master weights; every process has to call."""
        self._layout.refresh()

    def _begin(self, updates: int) -> None:
        """Give the optimizer the state that it has after so many updates, of zeros."""
        self._updates = updates
        for tensor in self._layout.tensors:
            if state := state_after(self.config.optim, tensor.detach(), updates):
                self._base.state[tensor] = state

    def _own(self) -> list[Fragment]:
        """All that this process keeps."""
        averages = {id(t): a for t, a in zip(self._layout.tensors, self._averages, strict=False)}
        return [self._fragment(stretch, averages) for stretch in self._layout.stretches]

    def _fragment(self, stretch: Stretch, averages: dict[int, Tensor]) -> Fragment:
        state = self._base.state[stretch.tensor]
        states = {MASTER: stretch.tensor, **{name: state[name] for name in states_of(self.config.optim)}}
        if averages:
            states[AVERAGE] = averages[id(stretch.tensor)]
        return Fragment(stretch.parameter, stretch.start, {name: stretch.of(v) for name, v in states.items()})

    @torch.no_grad()
    def _clipped(self) -> bool:
        """Without ZeRO: clip the gradients, which all processes have alike; False where they are not finite.

        Those are taken away, so that the optimizer has nothing to do.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if bool(self._norm.isfinite()):
            if self._clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, self._norm)
            return True
        self._norm = torch.full_like(self._norm, math.inf)
        for parameter in parameters:
            parameter.grad = None
        return False

    def _keep_exact(self, buffers: dict[str, Tensor]) -> None:
        """DeepSpeed makes running statistics half precision, too, which loses small changes to them."""
        for name, value in buffers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, value)

    def _taken(self) -> list[Tensor]:
        """A copy of the buffers, which a forward pass changes and a step that is left out must not have changed."""
        return [value.clone() for value in self._kept.values()]

    def _put_back(self, values: list[Tensor]) -> None:
        for now, before in zip(self._kept.values(), values, strict=True):
            now.copy_(before)


def undecayed_of(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay should spare, by the model and by each of its parts that says."""
    found: set[str] = set()
    for name, module in model.named_modules():
        if (say := getattr(module, "undecayed", None)) is not None:
            found |= {f"{name}.{each}" if name else each for each in say()}
    return found


def settings(config: Config, processes: int) -> dict[str, Any]:
    """DeepSpeed's configuration. The learning rate is not in it: it has one home, `optim/schedule.py`."""
    micro, passes = config.micro(processes), config.passes(processes)
    zero: dict[str, Any] = {"stage": config.zero, "reduce_bucket_size": BUCKET}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": micro * passes * processes,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": config.optim.clip if config.zero else 0.0,  # without ZeRO the engine clips
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # the default follows the weights, and bf16 loses small gradients
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on a CPU, too, and nothing has to be compiled
        "steps_per_print": None,
    }


@contextmanager
def without(module: str) -> Iterator[None]:
    """Let imports find that there is no such module, unless it is imported already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


@contextmanager
def eager() -> Iterator[None]:
    """Let `torch.compile` leave the functions as they are that are decorated by it."""
    compiling, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiling


def library(device: torch.device) -> Any:
    """DeepSpeed, imported as it has to be for this device."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with without("mlflow"):  # which its tuner, of no use here, imports if there is one; that takes a second
        import deepspeed
    with eager():  # its Muon, of no use here either, is compiled where it is defined; that imports all of the compiler
        import deepspeed.runtime.zero.muon.original_muon

    if device.type == "cpu":
        # An operator for inference that is compiled under a lock file: a process killed there leaves the lock, and
        # every later start waits for it for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Torch's new names for what stage 3 calls by the old ones, at each call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed
