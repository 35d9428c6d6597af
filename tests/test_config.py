"""What a run is, and which runs are refused before a machine is asked for."""

from dataclasses import asdict, replace
from importlib import import_module

import pytest

from pipeline import experiments
from pipeline.architectures.vit import vit_b16, vit_h14, vit_l16
from pipeline.config import Config, Data, differences, from_dict, to_dict
from pipeline.models import flops


@pytest.mark.parametrize("name", experiments.known())
def test_every_experiment_can_be_written_down_and_read_back(name: str) -> None:
    config = experiments.load(name)
    assert config.name == name
    assert from_dict(to_dict(config)) == config
    assert differences(config, from_dict(to_dict(config))) == []


@pytest.mark.parametrize("name", experiments.known())
def test_every_experiment_fits_on_its_processes_and_says_what_it_costs(name: str) -> None:
    config = experiments.load(name)
    for processes in (1, 2, 8):
        config.check(processes)
    compute = flops.training_exaflops(config.model, config.classes, config.steps(config.data.samples) * config.batch)
    told = import_module(f"pipeline.experiments.{name}").__doc__ or ""
    cost = [line for line in told.splitlines() if "exaFLOPs" in line]
    if cost:
        said = float(cost[0].split("about ")[1].split(" ")[0].replace(",", ""))
        assert compute == pytest.approx(said, rel=0.01)


@pytest.mark.parametrize(("model", "count"), [(vit_b16, 86_567_656), (vit_l16, 304_326_632), (vit_h14, 632_045_800)])
def test_every_model_of_the_paper_has_the_published_number_of_parameters(model: object, count: int) -> None:
    assert flops.parameters(model, 1000) == count  # type: ignore[arg-type]


def test_a_picture_through_every_model_of_the_paper_costs_the_published_multiply_accumulates() -> None:
    # As torch counts them at 224 pixels, the head included: 17.563, 61.554 and 167.294 GMAC.
    costs = [flops.macs(model, 1000) / 1e9 for model in (vit_b16, vit_l16, vit_h14)]
    assert costs == pytest.approx([17.563, 61.554, 167.294], rel=1e-4)


def tiny(**changes: object) -> Config:
    return replace(Config(name="x", classes=2, data=Data(lanes=16), batch=64, precision="fp32"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "processes", "said"),
    [
        (tiny(batch=100), 1, "batch 100 does not divide over 16 lanes: a batch of 96 or 112 would, or data.lanes of"),
        (tiny(), 3, "16 lanes do not divide over 3 processes: 2 or 4 processes would do"),
        (tiny(), 0, "processes is 0"),
        (tiny(batch=0), 1, "batch is 0"),
        (tiny(zero=0, precision="bf16"), 1, "zero 0 keeps no fp32 gradients"),
        (tiny(data=Data(lanes=16, crop_area=0.0)), 1, "data.crop_area is 0.0"),
    ],
)  # fmt: skip
def test_every_misfit_is_refused_with_what_would_do(config: Config, processes: int, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        config.check(processes)


def test_numbers_that_are_said_to_do_do() -> None:
    tiny(batch=96).check(1)
    tiny(batch=100, data=Data(lanes=20)).check(1)


def test_every_difference_of_two_runs_is_named() -> None:
    ours, theirs = tiny(), tiny(seed=3, data=Data(lanes=32))
    assert differences(ours, theirs) == ["data.lanes: 16 != 32", "seed: 0 != 3"]


def test_a_written_run_with_an_unknown_field_is_refused() -> None:
    values = asdict(tiny())
    values["optim"]["lrr"] = 1.0
    with pytest.raises(ValueError, match=r"no field 'optim.lrr' in Optim; it has: optimizer, lr, warmup"):
        from_dict(values)


def test_micro_batches_times_passes_times_processes_are_the_batch_whatever_the_processes() -> None:
    for most in (1, 7, 8, 24, 1000):
        config = tiny(micro_batch=most)
        for processes in (1, 2, 4, 8, 16):
            assert config.micro(processes) <= most
            assert config.micro(processes) * config.passes(processes) * processes == config.batch
