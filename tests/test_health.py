"""A sick step leaves a run as if its batch had not been there: a pure watch over losses, and real runs on gloo."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from torch import Tensor

from pipeline import config as configuration
from pipeline.config import Config, Optim
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Batch, order_of
from pipeline.data.plan import part_of_step
from pipeline.insight.batch import batch
from pipeline.models.weights.exported import find
from pipeline.optim.schedule import learning_rate
from pipeline.track import log
from pipeline.train import run
from pipeline.train.checkpoint import complete
from pipeline.train.folder import Job, changes_of, open_folder, optim_at, record_change
from pipeline.train.health import NOT_FINITE, SPIKE, Health, Sick, Window
from pipeline.train.meter import Stragglers
from pipeline.world import World
from shards.storage import Folder
from tests import tiny
from tests.gang import Gang

pytestmark = pytest.mark.timeout(300)
slow = pytest.mark.slow
STEPS = 20  # 32 pictures for 10 epochs in batches of 16
LOSSES = st.lists(st.floats(-1e6, 1e6), max_size=60)
NONE: dict[int, Sick] = {}


# The watch over losses


@given(LOSSES, st.floats(1, 20), st.integers(2, 20))
def test_a_window_knows_only_its_last_losses_whatever_came_before(
    losses: list[float], sigmas: float, size: int
) -> None:
    all_of_them, last = Window(sigmas, size), Window(sigmas, size, losses[-size:])
    for loss in losses:
        all_of_them.add(loss)
    assert all_of_them.limit == last.limit


@given(st.floats(-1e6, 1e6), st.integers(2, 20), st.integers(0, 40), st.floats(0.1, 20))
def test_every_loss_that_stays_as_it_is_is_no_spike(loss: float, size: int, count: int, sigmas: float) -> None:
    window = Window(sigmas, size, [loss] * count)
    assert window.limit is None or loss <= window.limit


@given(st.lists(st.floats(0, 10), min_size=4, max_size=8), st.floats(-5, 5), st.floats(0.5, 4))
def test_a_spike_is_one_whatever_the_unit_and_the_zero_of_the_loss(
    losses: list[float], shift: float, scale: float
) -> None:
    plain, other = Window(3, 8, losses), Window(3, 8, [scale * x + shift for x in losses])
    assert plain.limit is not None and other.limit is not None
    assert other.limit == pytest.approx(scale * plain.limit + shift, abs=1e-4)


@given(LOSSES, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_says_nothing_to_a_window(losses: list[float], odd: float) -> None:
    window = Window(4, 10, losses)
    before = window.limit
    window.add(odd)
    assert window.limit == before


def test_a_window_is_asked_nothing_before_half_of_it_is_there_and_never_without_sigmas() -> None:
    assert Window(4, 8, [1.0] * 3).limit is None and Window(4, 8, [1.0] * 4).limit is not None
    assert Window(0, 8, [1.0] * 8).limit is None


def health(chosen: configuration.Health, left_out: dict[int, Sick] = NONE, **state: Any) -> tuple[Health, list[Any]]:
    """With what it reports; the keys of a step are named by its number."""
    said: list[Any] = []
    report: Callable[[Sick, bool], None] = lambda sick, skipped: said.append((sick.step, sick.why, skipped))  # noqa: E731
    return Health(chosen, left_out, report=report, keys=lambda step: [f"key-{step}"], **state), said


def taken(one: Health, step: int, loss: float, norm: float = 1.0, *, skipped: bool = False, asked: float = 0.0) -> None:
    one.settle()
    one.took(step, torch.tensor([loss, norm, float(skipped), asked]))


STEP = st.tuples(st.sampled_from([1.0, 1.25, 0.75, 50.0, math.nan]), st.booleans())


@given(st.lists(STEP, max_size=30), st.integers(0, 30), st.sampled_from(["log", "skip"]))
def test_following_a_run_from_any_checkpoint_is_as_if_from_its_start(
    steps: list[tuple[float, bool]], at: int, spike: Any
) -> None:
    chosen = configuration.Health(skips=100, sigmas=3, window=6, spike=spike)
    whole, _ = health(chosen)
    for step, (loss, skipped) in enumerate(steps):
        taken(whole, step, loss, skipped=skipped or math.isnan(loss))
        if step == at:
            whole.settle()
            parts, _ = health(chosen, state=json.loads(json.dumps(whole.state())))
            whole = parts
    again, _ = health(chosen)
    for step, (loss, skipped) in enumerate(steps):
        taken(again, step, loss, skipped=skipped or math.isnan(loss))
    whole.settle()
    again.settle()
    assert whole.state() == again.state()


@given(st.lists(STEP, max_size=30))
def test_a_step_known_to_be_left_out_counts_as_if_it_had_been_taken_and_left_out(
    steps: list[tuple[float, bool]],
) -> None:
    chosen = configuration.Health(skips=100, sigmas=3, window=6, spike="skip")
    first, said = health(chosen)
    losses = [loss for loss, _ in steps]
    for step, (loss, skipped) in enumerate(steps):
        taken(first, step, loss, skipped=skipped or math.isnan(loss))
    first.settle()
    known = {step: Sick(step, why, losses[step]) for step, why, skipped in said if skipped}
    second, _ = health(chosen, known)
    for step, loss in enumerate(losses):
        if sick := second.to_leave_out(step):
            second.pass_over(Sick.from_json(sick.to_json([])))
        else:
            taken(second, step, loss)
    second.settle()
    assert second.state() == first.state()


@given(st.integers(0, 6), st.integers(1, 6))
def test_one_more_than_the_allowed_number_in_a_row_ends_the_run_naming_every_step(allowed: int, between: int) -> None:
    one, _ = health(configuration.Health(skips=allowed, sigmas=0))
    step = 0
    for _ in range(2):  # a finite step between two rows of the allowed length
        for _ in range(allowed):
            taken(one, step, math.nan, skipped=True)
            step += 1
        for _ in range(between):
            taken(one, step, 1.0)
            step += 1
    row = list(range(step, step + allowed + 1))
    with pytest.raises(ValueError, match=r"; ".join(f"step {each}: key-{each}" for each in row)):
        for each in row:
            taken(one, each, math.nan, skipped=True)
        one.settle()


def test_a_spike_is_reported_left_out_or_gone_back_from_as_is_chosen() -> None:
    steady = {"skipped": 0, "spikes": 0, "row": [], "losses": [1.0, 1.1, 0.9, 1.0]}
    chosen = configuration.Health(sigmas=5, window=4)
    for one_of, skipped in ((chosen, False), (replace(chosen, spike="skip"), True)):
        one, said = health(one_of, state=steady)
        assert (one.guard is not None) == skipped
        taken(one, 7, 9.0, math.inf if skipped else 3.0, skipped=skipped)
        one.settle()
        assert said == [(7, SPIKE, skipped)] and (one.spikes, one.skipped) == (1, int(skipped))
    one, said = health(replace(chosen, spike="rollback"), state=steady)
    taken(one, 7, 9.0)
    one.settle()
    assert one.to_undo and (one.to_undo.step, one.to_undo.why) == (7, SPIKE) and said == []
    taken(one, 8, math.nan, skipped=True)  # what comes after it is not judged: it will come again
    one.settle()
    assert one.to_undo.step == 7 and (one.spikes, one.skipped) == (0, 0)


def test_every_process_hears_of_the_one_that_asks_for_the_end() -> None:
    one, _ = health(configuration.Health())
    taken(one, 0, 1.0, asked=0.25)
    assert not one.asked_to_stop
    one.settle()
    assert one.asked_to_stop


def test_a_process_is_named_once_when_it_holds_up_the_others_and_not_for_a_single_time() -> None:
    stragglers = Stragglers()
    slow, even = [1.0, 5.0, 1.1], [1.0, 1.1, 1.0]
    assert [stragglers.look(each) != "" for each in (even, slow, even, slow, slow, slow)] == [False] * 4 + [True, False]
    assert stragglers.look([9.0, 5.0, 1.1]) == "" and stragglers.look([9.0, 1.0, 1.0]).startswith("process 0 holds up")


@pytest.mark.parametrize("field", ["skips", "sigmas", "hang_seconds", "window"])
def test_every_field_that_cannot_be_is_refused_naming_it(tmp_path: Path, field: str) -> None:
    config = tiny.config(tiny.shard_set(tmp_path / "set"), health=replace(configuration.Health(), **{field: -1}))
    with pytest.raises(ValueError, match=f"health.{field} is -1"):
        config.check(1)


# Changes in mid-run


def test_a_change_holds_from_its_step_on_whatever_comes_after(tmp_path: Path) -> None:
    config, folder = tiny.config(tiny.shard_set(tmp_path / "set")), Folder(str(tmp_path / "run"))
    assert record_change(folder, config, {"optim.lr": 0.5}) == 0
    (tmp_path / "run" / "checkpoints" / "step-00000007").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000007" / "complete.json").write_text("{}")
    assert record_change(folder, config, {"optim.lr": 0.25, "optim.clip": 0.0}) == 7
    changes = changes_of(folder)
    assert record_change(folder, config, {"optim.lr": 0.25}) == 7 and changes_of(folder) == changes
    for step in range(20):
        expected = {"lr": 0.5} if step < 7 else {"lr": 0.25, "clip": 0.0}
        assert optim_at(config, changes, step) == replace(config.optim, **expected)


@pytest.mark.parametrize(("field", "value"), [("optim.warmup", 3), ("batch", 3), ("optim.lr", -1.0), ("lr", 1.0)])
def test_a_change_that_cannot_be_is_refused_naming_it(tmp_path: Path, field: str, value: float) -> None:
    config = tiny.config(tiny.shard_set(tmp_path / "set"))
    with pytest.raises(ValueError, match=f"{field} cannot be changed"):
        record_change(Folder(str(tmp_path / "run")), config, {field: value})
    assert not (tmp_path / "run").exists()


# Whole runs


@dataclass
class Ended:
    """What a start of a run has said and left."""

    folder: Path
    uri: str
    mlflow_run: str
    said: list[str]
    wrong: str

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "export" / "model.safetensors")

    def metric(self, name: str) -> dict[int, float]:
        """By the number of steps done; each is there once."""
        held = MlflowClient(self.uri).get_metric_history(self.mlflow_run, name)
        assert len({metric.step for metric in held}) == len(held)
        return {metric.step: metric.value for metric in held}

    def note(self, step: int) -> dict[str, Any]:
        return json.loads((self.folder / "skipped" / f"{step}.json").read_text())


class Died(Exception):
    pass


@dataclass(frozen=True)
class Faults:
    """What befalls a start: losses that are multiplied, by step counted from 0, and what comes after so many steps."""

    spoilt: dict[int, float]
    die_at: int | None = None
    stop_at: int | None = None
    rival_at: int | None = None


def play(world: World, job: Job, faults: Faults) -> tuple[list[str], str]:
    """One process of a start: what it says, and what went wrong."""
    folder, said, wrong = Folder(job.folder), list[str](), ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Notes, "keep", lambda notes, account: notes._write(account()))
        patch.setattr(run.Objective, "__call__", spoilt_objective(job.config, faults.spoilt))
        told = run.Meter.log

        def listen(meter: run.Meter, done: int, values: dict[str, Any]) -> None:
            told(meter, done, values)
            if done == faults.rival_at:
                run.claim(folder, "rival")
            if done == faults.die_at:
                if meter.log_:
                    meter.log_.close(60)
                raise Died

        def stop(done: int) -> bool:
            return done == faults.stop_at and world.rank == world.size - 1

        patch.setattr(run.Meter, "log", listen)
        try:
            run.work(job, world, torch.device("cpu"), said.append, stop=stop)
        except (ValueError, RuntimeError) as error:
            wrong = str(error)
        except Died:
            while not complete(folder):  # the first checkpoint is due before
                time.sleep(0.01)
    return said, wrong


def spoilt_objective(config: Config, factors: dict[int, float]) -> Callable[[run.Objective, Batch], Tensor]:
    """Multiplies the loss of whichever pass has the last picture of a step, known by number and epoch."""
    corpus = Corpus.open(config.data.shards)
    order = order_of(corpus, config)
    picks = {step: part_of_step(order, step, config.batch, config.batch - 1, 1) for step in factors}
    marks = {
        (corpus.first.item(p.shard.item()) + p.place.item(), p.epoch.item()): factors[step] for step, p in picks.items()
    }
    judge = run.Objective.__call__

    def spoilt(objective: run.Objective, batch: Batch) -> Tensor:
        for pair in np.stack([batch.samples.numpy(), batch.epochs.numpy()], 1).tolist():
            if tuple(pair) in marks:
                return judge(objective, batch) * marks[tuple(pair)]
        return judge(objective, batch)

    return spoilt


class Clinic:
    """Runs on the same pictures, one after another on the same processes."""

    def __init__(self, place: Path, processes: int) -> None:
        self.place, self.shards = place, tiny.shard_set(place / "set")
        self.gang = Gang(processes)

    def config(self, **changes: Any) -> Config:
        made = tiny.config(self.shards, **{"zero": 1, **changes})
        return replace(made, data=replace(made.data, validation=""))

    def start(
        self,
        name: str,
        config: Config | None = None,
        *,
        spoilt: dict[int, float] | None = None,
        told: tuple[int, ...] = (),
        **at: int,
    ) -> Ended:
        """One start in the folder `name`, where a person has named the steps `told` as not to be taken."""
        folder, given = self.place / name, config or self.config()
        for step in told:
            Folder(str(folder / "skipped")).write(f"{step}.json", Sick(step, "told").to_json([]))
        uri = f"sqlite:///{self.place}/mlflow.db"
        open_folder(given, str(folder), {"training": self.shards.manifest.root})
        mlflow_run = log.begin(uri, name, {"vitscale.folder": str(folder)}, {}, same="vitscale.folder")
        job = Job(given, str(folder), uri, mlflow_run, "tiny")
        said, wrong = self.gang.run(play, job, Faults(spoilt or {}, **at))[0]
        return Ended(folder, uri, mlflow_run, said, wrong)


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    made = Clinic(tmp_path_factory.mktemp("clinic"), 2)
    yield made
    made.gang.close()


def same(ours: Ended, theirs: Ended) -> bool:
    assert not ours.wrong and not theirs.wrong
    a, b = ours.weights(), theirs.weights()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_nan_in_a_batch_leaves_the_weights_as_if_the_batch_had_been_left_out_whatever_the_stage(
    clinic: Clinic, zero: int
) -> None:
    config = clinic.config(zero=zero)
    sick = clinic.start(f"nan-{zero}", config, spoilt={9: math.nan})
    assert same(sick, clinic.start(f"told-{zero}", config, told=(9,)))
    note, shown = sick.note(9), [each.key for each in batch(str(sick.folder), 9)]
    assert (note["step"], note["why"], note["loss"], note["keys"]) == (9, NOT_FINITE, "nan", shown)
    losses, rates, skipped = (sick.metric(name) for name in ("loss", "lr", "skipped_steps"))
    assert [done for done, loss in losses.items() if math.isnan(loss)] == [10] and len(losses) == STEPS
    for done in range(1, STEPS + 1):
        before = done - 1 - (done > 10)
        assert rates[done] == learning_rate(config.optim, before, STEPS)
        assert skipped[done] == (done >= 10)
    assert any("step 9 is not finite" in said and shown[0] in said for said in sick.said)


@slow
def test_too_many_steps_in_a_row_end_the_run_naming_steps_and_pictures(clinic: Clinic) -> None:
    config = clinic.config(health=configuration.Health(skips=2))
    sick = {4: math.nan, 5: math.nan, 6: math.nan}
    ended = clinic.start("row", config, spoilt=sick)
    assert ended.wrong.startswith("3 steps in a row are not finite, more than health.skips 2")
    for step in sick:
        keys = [each.key for each in batch(str(ended.folder), step)]
        assert f"step {step}: {', '.join(keys[:3])}" in ended.wrong and ended.note(step)["keys"] == keys


@pytest.mark.slow
@slow
@pytest.mark.parametrize("die_at", [10, 12])
def test_a_run_killed_around_a_step_that_is_left_out_is_as_if_undisturbed(clinic: Clinic, die_at: int) -> None:
    sick = {9: math.nan}
    quiet = clinic.start(f"quiet-{die_at}", spoilt=sick)
    clinic.start(f"killed-{die_at}", spoilt=sick, die_at=die_at)
    killed = clinic.start(f"killed-{die_at}", spoilt=sick)
    assert same(quiet, killed)
    for name in ("loss", "lr", "gradient_norm", "skipped_steps"):
        assert {k: repr(v) for k, v in killed.metric(name).items()} == {
            k: repr(v) for k, v in quiet.metric(name).items()
        }


@pytest.mark.slow
@slow
@pytest.mark.parametrize("spike", ["log", "skip", "rollback"])
def test_a_spike_is_kept_left_out_or_gone_back_behind(clinic: Clinic, spike: Any) -> None:
    config = clinic.config(health=configuration.Health(sigmas=6, window=8, spike=spike))
    sick = clinic.start(f"spike-{spike}", config, spoilt={11: 40.0})
    assert [done for done, loss in sick.metric("loss").items() if loss > 5] == [12]
    assert sick.metric("spikes")[STEPS] == 1 and len(sick.metric("loss")) == STEPS
    if spike == "log":
        assert json.loads((sick.folder / "spikes" / "11.json").read_text())["why"] == SPIKE
        assert not (sick.folder / "skipped").exists() and sick.metric("skipped_steps")[STEPS] == 0
        return
    assert same(sick, clinic.start(f"without-{spike}", config, told=(11,)))
    assert sick.note(11)["why"] == SPIKE and sick.metric("skipped_steps")[STEPS] == 1
    replayed = sick.metric("ledger_replayed")[STEPS]
    assert (replayed > 0) == (spike == "rollback")
    if spike == "rollback":
        assert any("goes back to step 7" in said for said in sick.said)


@pytest.mark.slow
@slow
@pytest.mark.parametrize("log_every", [1, 20])  # with 20, the spike is seen in the middle of the step after it
def test_a_run_goes_back_to_its_start_where_a_spike_comes_before_every_checkpoint(
    clinic: Clinic, log_every: int
) -> None:
    config = clinic.config(log_every=log_every, health=configuration.Health(sigmas=6, window=8, spike="rollback"))
    sick = clinic.start(f"early-{log_every}", config, spoilt={5: 40.0})
    assert same(sick, clinic.start(f"early-told-{log_every}", config, told=(5,)))
    assert any("goes back to step 0" in said for said in sick.said)


@pytest.mark.slow
@slow
def test_a_changed_rate_applies_from_its_step_on_also_after_another_restart(clinic: Clinic) -> None:
    config = clinic.config(milestone_every=7)
    runs = []
    for name, deaths in (("changed", (10,)), ("changed-twice", (10, 16))):
        clinic.start(name, config, die_at=deaths[0])
        assert record_change(Folder(str(clinic.place / name)), config, {"optim.lr": 3e-3, "optim.clip": 0.1}) == 7
        for death in deaths[1:]:
            clinic.start(name, config, die_at=death)
        runs.append(clinic.start(name, config))
    assert same(*runs)
    changed = replace(config.optim, lr=3e-3, clip=0.1)
    # What was logged before the change was made stays.
    for done, rate in runs[0].metric("lr").items():
        held: Optim = config.optim if done <= 10 else changed
        assert rate == learning_rate(held, done - 1, STEPS)
    tags = MlflowClient(runs[0].uri).get_run(runs[0].mlflow_run).data.tags
    assert json.loads(tags["vitscale.changes"]) == [{"step": 7, "optim.lr": 3e-3, "optim.clip": 0.1}]
    for step in (7, 14):
        assert find(str(runs[0].folder / "milestones" / f"step-{step:08}")).weights().keys() == runs[0].weights().keys()


@pytest.mark.slow
@slow
def test_a_ledger_counts_every_replayed_step_and_none_of_a_quiet_run(clinic: Clinic) -> None:
    quiet = clinic.start("sound")
    assert quiet.metric("ledger_replayed")[STEPS] == 0.0
    assert any(said.startswith("tiny: goodput") and "0.0 % replayed" in said for said in quiet.said)
    clinic.start("dies", die_at=10)
    clinic.start("dies", die_at=13)
    again = clinic.start("dies")
    assert again.metric("ledger_replayed")[STEPS] > 0.0
    each = quiet.metric("ledger_exaflops")[STEPS] / STEPS
    assert again.metric("ledger_exaflops")[STEPS] == pytest.approx((STEPS + 3 + 6) * each)
    assert sum(again.metric(f"ledger_{kind}")[STEPS] for kind in ("goodput", "waiting")) < 1
    assert same(quiet, again)


@pytest.mark.slow
@slow
@pytest.mark.parametrize(("log_every", "end"), [(1, 9), (20, 10)])
def test_a_run_that_was_asked_to_stop_goes_on_as_if_it_had_not_been(clinic: Clinic, log_every: int, end: int) -> None:
    config = clinic.config(log_every=log_every)
    asked = clinic.start(f"asked-{log_every}", config, stop_at=9)
    assert not (asked.folder / "export").exists()
    assert any(f"stops after step {end} of 20" in said for said in asked.said)
    assert complete(Folder(str(asked.folder)))[-1] == end
    after = clinic.start(f"asked-{log_every}", config)
    quiet = clinic.start(f"unasked-{log_every}", config)
    assert same(quiet, after) and any(f"goes on after step {end} of 20" in said for said in after.said)
    assert after.metric("ledger_exaflops")[STEPS] == pytest.approx(quiet.metric("ledger_exaflops")[STEPS])
    if log_every == 1:
        assert after.metric("loss") == quiet.metric("loss")


@pytest.mark.slow
@slow
def test_a_start_whose_run_another_has_taken_over_completes_nothing_any_more(tmp_path: Path) -> None:
    alone = Clinic(tmp_path, 1)  # of several processes, whoever started them has to end the others
    ended = alone.start("rivals", rival_at=12)
    alone.gang.close()
    assert ended.wrong == "another start of this run has taken over"
    assert complete(Folder(str(ended.folder))) == [7] and not (ended.folder / "export").exists()
