"""`jobs/plan.py`: what a run needs is reckoned before a machine is asked for, and the numbers hang together."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import plan as job
from pipeline import experiments
from pipeline.cli import run
from pipeline.insight.plan import Machines, plan, row, saving
from pipeline.models import flops
from pipeline.models.memory import memory

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parents[1]
H14 = experiments.load("vit_h14_in21k")


def test_the_work_is_the_same_on_every_number_of_gpus() -> None:
    found = plan(H14, [1, 8, 64, 512], Machines())
    work = [row.hours * row.gpus for row in found.rows]
    assert work == pytest.approx([work[0]] * 4) and [row.cost for row in found.rows] == pytest.approx(
        [2.5 * work[0]] * 4
    )
    assert 3600 * work[0] * 989e12 * 0.4 == pytest.approx(1e18 * found.exaflops)
    assert found.parameters == flops.parameters(H14.model, H14.classes)


@pytest.mark.parametrize("gpus", [1, 8, 64, 512])
def test_every_row_has_the_batch_and_the_memory_of_its_run(gpus: int) -> None:
    found = row(H14, gpus, Machines())
    assert found.passes * found.micro * gpus == H14.batch and found.lanes * gpus == H14.data.lanes
    assert found.pictures_per_second * found.step_seconds == pytest.approx(H14.batch)
    for state in found.states:
        need = memory(replace(H14, zero=state.zero, recompute=state.recompute), gpus)  # type: ignore[arg-type]
        assert state.total == need.total and state.fits == (need.total <= 80e9)
    kept, again = ([s.total for s in found.states if s.recompute == recompute] for recompute in (False, True))
    assert len(kept) == len(again) == 3, "without ZeRO there is no bf16"
    assert all(less < more for less, more in zip(again, kept, strict=True))


def test_what_does_not_fit_and_what_does_not_divide_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    job.main(["vit_h14_in21k", "--gpus", "3", "8", "--gpu-memory", "24"])
    said = capsys.readouterr().out
    assert "3 GPUs: 512 lanes do not divide over 3 processes" in said
    cells = next(line for line in said.split("GB of a GPU")[1].splitlines() if line.startswith("│    8"))
    assert re.fullmatch(r"│ +8 │ +- │( +[\d.]+! │){3} +- │( +[\d.]+ │){3}", cells.strip())


def test_recompute_takes_a_third_more_time_whatever_the_machine() -> None:
    assert row(replace(H14, recompute=True), 8, Machines(peak=1e14)).hours == pytest.approx(
        4 / 3 * row(H14, 8, Machines(peak=1e14)).hours
    )


def test_saving_costs_its_copy_and_whatever_the_next_checkpoint_waits_for() -> None:
    assert saving(1, 50, 99) == pytest.approx(0.01)
    assert saving(0, 100, 50) == pytest.approx(0.5)


def test_json_has_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    job.main(["demo", "--gpus", "1", "2", "--json", "--model.depth", "2"])
    found = json.loads(capsys.readouterr().out)
    assert [row["gpus"] for row in found["rows"]] == [1, 2]
    assert found["parameters"] < flops.parameters(experiments.load("demo").model, 10)
    assert {state["zero"] for state in found["rows"][1]["states"]} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "no experiment 'nothing'"),
        (["demo", "--gpus", "0"], "--gpus is"),
        (["demo", "--gpu", "abacus"], "the peak of a GPU 'abacus' is not known"),
        (["demo", "--data.samples", "0"], "give --data.samples"),
        (["demo", "--mfu", "0"], "--mfu is 0.0; it has to be above 0"),
    ],
)
def test_every_mistake_is_answered_by_a_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(lambda: job.main(words))
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_plan_of_a_transformer_needs_no_torch() -> None:
    script = "import sys; from jobs.plan import main; main(['vit_l16_in21k']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_every_machine_needs_a_cache_for_the_shards_of_its_lanes_and_never_more_than_the_corpus() -> None:
    config, given = experiments.load("vit_h14_in21k"), Machines(shard_pictures=10_000, picture=1e5)
    one, eight, all_of_them = (row(config, gpus, given) for gpus in (1, 8, 512))
    assert one.cache_bytes == eight.cache_bytes == pytest.approx(512 * (10_000 + config.data.window) * 1e5)
    assert all_of_them.cache_bytes == pytest.approx(8 * (10_000 + config.data.window) * 1e5)
    few = replace(config, data=replace(config.data, samples=1_000_000))
    assert row(few, 1, given).cache_bytes == pytest.approx(1_000_000 * 1e5)
    unknown = replace(config, unit="steps", duration=1000.0, data=replace(config.data, samples=0))
    assert row(unknown, 1, given).cache_bytes == one.cache_bytes
