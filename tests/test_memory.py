"""What a run is said to need of memory is what torch and DeepSpeed allocate, by the books of torch's own allocator.

Whatever the number of processes, process 0 of them is real and the others are not: collectives do nothing, all else is
done. A bucket of a little more than the weights, rather than DeepSpeed's 500 million, lets the states be seen.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from pipeline.architectures import Vit, presets
from pipeline.config import Config, Data
from pipeline.models.build import build
from pipeline.models.flops import parameters
from pipeline.models.kept import blocks_of
from pipeline.models.memory import activation_bytes, checkpoint_bytes, memory

pytestmark = pytest.mark.timeout(300)
BUCKET = 2_000_000
MARK = "from here"
CASES: dict[str, dict[str, Any]] = {
    "zero-0": {"zero": 0, "precision": "fp32"},
    "zero-1": {"zero": 1, "precision": "fp32"},
    "zero-2": {"zero": 2, "precision": "fp32"},
    "zero-1-bf16": {"zero": 1, "precision": "bf16"},
    "zero-2-bf16": {"zero": 2, "precision": "bf16"},
    "zero-3-bf16": {"zero": 3, "precision": "bf16"},
    "recompute": {"zero": 2, "precision": "bf16", "recompute": True},
    "sgd": {"zero": 2, "precision": "bf16", "optimizer": "sgd"},
    "average": {"zero": 2, "precision": "bf16", "average": 0.9},
    "adafactor": {"zero": 0, "precision": "fp32", "optimizer": "adafactor"},
    "offload-1": {"zero": 1, "precision": "bf16", "offload": True},
    "offload-2": {"zero": 2, "precision": "bf16", "offload": True},
}


def config(name: str, processes: int) -> Config:
    """A run of steps of two passes."""
    case = dict(CASES[name])
    optim = {field: case.pop(field) for field in ("optimizer", "average") if field in case}
    model = Vit(width=192, depth=4, heads=3, hidden=768, patch=16, image_size=128)
    made = Config("x", 100, model=model, data=Data(lanes=1), objective="softmax", batch=16 * processes, micro_batch=8)
    return replace(made, optim=replace(made.optim, **optim), **case)


def peak(found: profile) -> int:
    """The most bytes at a time after the mark, of all that was allocated."""
    assert found.profiler and found.profiler.kineto_results
    events = found.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == MARK)
    held = most = 0
    for when, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):  # type: ignore[attr-defined]
        held += size
        most = max(most, held) if when > begin else most
    return most


def recorded() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def allocated(one: Config, processes: int) -> int:
    """Bytes that a step of process 0 of so many allocates at most, states and all."""
    from pipeline.train.engine import Engine
    from pipeline.world import World

    gc.collect()
    with recorded() as found:
        engine = Engine(one, build(one.model, one.classes), World(0, processes), torch.device("cpu"))
        engine.set_rate(0.0)
        with record_function(MARK):
            pass
        for _ in range(one.passes(processes)):
            images = torch.zeros(one.micro(processes), 3, one.model.image_size, one.model.image_size)
            loss = torch.nn.functional.cross_entropy(engine.forward(images).float(), torch.zeros(8, dtype=torch.long))
            engine.backward(loss)
            del loss
            engine.step()
    engine._engine.destroy()
    return peak(found)


def main(processes: int, names: list[str]) -> None:
    """Print what each case allocates."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pipeline.train import engine

    def settings(*given: Any) -> dict[str, Any]:
        made = ours(*given)
        made["zero_optimization"]["reduce_bucket_size"] = BUCKET
        return made

    ours, engine.settings = engine.settings, settings
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    print(json.dumps({name: allocated(config(name, processes), processes) for name in names}))


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_every_state_and_buffer_of_every_stage_is_counted(processes: int) -> None:
    names = [*CASES] if processes == 8 else ["zero-0", "zero-1", "zero-2", "zero-2-bf16", "zero-3-bf16"]
    said = subprocess.run(
        [sys.executable, "-m", "tests.test_memory", str(processes), *names],
        # Without the packed copies of bf16 tensors that some processors' own instructions need.
        env={**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    for name, found in json.loads(said.splitlines()[-1]).items():
        need = memory(config(name, processes), processes, bucket=BUCKET)
        assert need.total + need.host == pytest.approx(found, rel=0.1), name


def test_the_bucket_is_more_than_the_weights() -> None:
    one = config("zero-2", 1)
    assert 0.9 * BUCKET < parameters(one.model, one.classes) < BUCKET


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "name", ["vit_s16", "deit_ti16", "r26_s32", "bit_r50x1", "cmt_ti", pytest.param("maxvit_t", marks=pytest.mark.slow)]
)
def test_all_that_a_model_of_any_family_keeps_for_its_backward_pass_is_counted(name: str, recompute: bool) -> None:
    architecture = presets()[name]
    torch.manual_seed(0)
    model, pictures = build(architecture, 0).train(), 4
    for block in blocks_of(model) if recompute else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    images = torch.zeros(pictures, 3, architecture.image_size, architecture.image_size)
    with recorded() as found:
        with record_function(MARK):
            pass
        model(images).sum().backward()
    one = Config("x", 0, model=architecture, precision="fp32", recompute=recompute)
    assert pictures * activation_bytes(one, pictures) == pytest.approx(peak(found), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_s16", "deit_b16", "vit_h14"])
def test_what_is_reckoned_of_a_transformer_is_what_torch_counts(name: str) -> None:
    from pipeline.models.kept import kept_bytes

    for half in (False, True):
        for recompute in (False, True):
            one = Config("x", 0, model=presets()[name], precision="bf16" if half else "fp32", recompute=recompute)
            counted = kept_bytes(one.model, 8, half=half, recompute=recompute)
            assert activation_bytes(one, 8) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_more_processes_never_need_more_memory_each(zero: int) -> None:
    made = Config("x", 1000, precision="fp32", zero=zero, batch=4096)  # type: ignore[arg-type]
    needs = [memory(made, processes).total for processes in (2, 4, 8, 64, 512)]
    assert needs == sorted(needs, reverse=True)


def test_a_checkpoint_has_every_number_of_the_state_once() -> None:
    one = config("average", 1)
    assert checkpoint_bytes(one) == 4 * 4 * parameters(one.model, one.classes)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
