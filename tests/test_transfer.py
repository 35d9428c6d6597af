"""One fine-tuning is a function; many are a reconciler, which real Ray runs and SIGKILL stops."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs import finetune as job
from pipeline.models.weights.exported import Exported
from pipeline.models.weights.exported import find as find_model
from pipeline.track.runs import read
from pipeline.train.run import build, export
from pipeline.transfer import protocols, tasks
from pipeline.transfer.finetune import Trial, _training_crops, _turn, perform
from pipeline.transfer.sweep import Result, Results, Wanted, best_rate
from pipeline.transfer.tasks import CHOOSE, TEST, Pictures, Task, find
from shards.storage import Folder
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(600)
SPLITS = {"train800": (40, 24), "val200": (21,), "test": (30,)}

# --- which trials there are -----------------------------------------------------------------------------------------


def wanted(**changes: Any) -> Wanted:
    data = {task.name: tuple((split, f"root of {task.name}/{split}") for split in SPLITS) for task in tasks.ALL}
    made = Wanted(
        tasks=tasks.ALL,
        data=data,
        starts=("pretrained", "scratch"),
        protocol=protocols.demo,
        rates=(0.01, 0.1),
        seeds=(0, 1),
        pretrained="p" * 64,
        architecture="a" * 64,
    )
    return replace(made, **changes)


def judged(trials: list[Trial], accuracy: Callable[[Trial], float]) -> dict[str, Result]:
    return {trial.name: {"accuracy": accuracy(trial)} for trial in trials}


def whole(sweep: Wanted, accuracy: Callable[[Trial], float]) -> list[Trial]:
    """All trials, when those that choose a rate have turned out like this."""
    return sweep.trials(judged(sweep.trials({}), accuracy))


rates = st.lists(st.floats(1e-5, 10), min_size=1, max_size=4, unique=True).map(tuple)
seeds = st.integers(1, 4).map(lambda count: tuple(range(count)))
some_tasks = st.lists(st.sampled_from(tasks.ALL), min_size=1, unique=True).map(tuple)


@given(some_tasks, rates, seeds, st.randoms(use_true_random=False))
def test_every_trial_is_wanted_once(some: tuple, tried: tuple, repeated: tuple, chance: Any) -> None:
    sweep = wanted(tasks=some, rates=tried, seeds=repeated)
    trials = whole(sweep, lambda trial: chance.random())
    assert len({trial.name for trial in trials}) == len(trials) == sweep.count
    tested = {(t.task.name, t.start): t.rate for t in trials if t.split == TEST}
    assert len(tested) == 2 * len(some)  # and one rate for all seeds
    assert sum(t.split == TEST for t in trials) == 2 * len(some) * len(repeated)


@given(rates, seeds, st.floats(1e-5, 10), st.sampled_from(tasks.ALL))
def test_no_rate_seed_or_task_that_is_added_renames_another_trial(
    tried: tuple, repeated: tuple, rate: float, task: Task
) -> None:
    fewer = wanted(tasks=tuple(t for t in tasks.ALL if t != task), rates=tried, seeds=repeated)
    more = replace(
        fewer,
        tasks=tasks.ALL,
        rates=(rate, *tried),
        seeds=(*repeated, 99),
        protocol=replace(fewer.protocol, rates=(*tried, rate)),
    )
    assert {t.name for t in fewer.trials({})} <= {t.name for t in more.trials({})}
    best = tried[0]  # with which both go on to the test
    ours, theirs = (
        {t.name for t in whole(sweep, lambda t: float(t.rate == best)) if t.split == TEST} for sweep in (fewer, more)
    )
    assert ours < theirs


def test_everything_that_decides_a_result_is_in_the_name() -> None:
    trial = wanted().trials({})[0]
    others = [
        replace(trial, task=replace(trial.task, flip=True)),
        replace(trial, data=(("train800", "others"), *trial.data[1:])),
        replace(trial, split=TEST),
        replace(trial, start="scratch"),
        replace(trial, model="q" * 64),
        replace(trial, protocol=replace(trial.protocol, steps=7)),
        replace(trial, protocol=replace(trial.protocol, version=2)),
        replace(trial, rate=0.02),
        replace(trial, seed=1),
    ]
    assert len({each.name for each in [trial, *others]}) == len(others) + 1
    assert replace(trial).name == trial.name


@given(rates, st.randoms(use_true_random=False))
def test_every_rate_is_chosen_by_the_pictures_to_choose_by_whatever_the_test_says(tried: tuple, chance: Any) -> None:
    sweep = wanted(rates=tried)
    chosen = judged(sweep.trials({}), lambda trial: chance.random())
    expected = sweep.trials(chosen)
    planted = [replace(trial, split=TEST) for trial in sweep.trials({})]
    assert sweep.trials({**chosen, **judged(planted, lambda trial: chance.random())}) == expected
    with pytest.raises(ValueError, match=f"chosen on {CHOOSE} alone"):
        best_rate([*sweep.trials({})[: len(tried)], planted[0]], {**chosen, **judged(planted, lambda trial: 1.0)})


def test_of_equal_rates_the_smallest_is_taken_whatever_their_order() -> None:
    for tried in ((0.1, 0.01, 0.03), (0.03, 0.1, 0.01)):
        trials = wanted(rates=tried).trials({})[:3]
        assert best_rate(trials, judged(trials, lambda trial: 0.5 + (trial.rate < 0.05))) == 0.01


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 3))
def test_every_picture_is_trained_on_once_an_epoch(count: int, batch: int, seed: int) -> None:
    turns = [_turn(count, step, batch, seed) for step in range(-(-3 * count // batch))]
    chosen, epoch = (np.concatenate(column) for column in zip(*turns, strict=True))
    for one in range(3):
        assert sorted(chosen[epoch == one]) == list(range(count))


def test_every_task_is_turned_and_cut_only_as_its_classes_allow() -> None:
    pictures = Pictures([np.zeros((28, 21, 3), np.uint8)] * 200, np.zeros(200, np.int64))
    chosen = np.arange(200)
    assert [(task.name, task.flip, task.crop) for task in tasks.ALL] == [
        ("digits", False, True),
        ("mnist", False, True),
        ("fashion_offset", False, False),
    ]
    for task in (*tasks.ALL, Task("photographs", flip=True, crop=True)):
        trial = replace(wanted().trials({})[0], task=task)
        crops = _training_crops(pictures, chosen, np.zeros(200, np.int64), trial)
        assert crops.mirrored.any() == task.flip and not crops.mirrored.all()
        sizes = {(w, h) for w, h in zip(crops.width.tolist(), crops.height.tolist(), strict=True)}
        assert sizes == ({(18, 24)} if task.crop else {(21, 28)})
        assert len(set(crops.left.tolist())) == (4 if task.crop else 1)


# --- one fine-tuning ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and two tasks: `run`, `sets/digits`, `sets/mnist`."""
    folder = tmp_path_factory.mktemp("transfer")
    for classes, task in ((3, "digits"), (4, "mnist")):
        for split, sizes in SPLITS.items():
            tiny.shard_set(folder / "sets" / task / split, sizes=sizes, classes=classes)
    config = tiny.config(find(str(folder / "sets"), tasks.digits)["test"])
    model = build(replace(config, model=replace(config.model, representation=True)))
    config = replace(config, model=model.config)
    export(Folder(str(folder / "run")), config, {k: v.detach() for k, v in model.named_parameters()}, {"steps": 0})
    return folder


def trial_of(place: Path, start: str, split: str, **changes: Any) -> Trial:
    sets = find(str(place / "sets"), tasks.digits)
    source = find_model(str(place / "run"))
    model = source.digest if start == "pretrained" else source.architecture
    protocol = replace(protocols.demo, steps=60, batch=32)
    data = tuple((name, s.manifest.root) for name, s in sets.items())
    return replace(Trial(tasks.digits, data, split, start, model, protocol, 0.03, 0), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["pretrained", "scratch"])
def test_every_trial_has_one_result_and_learns_what_can_be_learnt(place: Path, start: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trial = trial_of(place, start, TEST)
        torch.manual_seed(1)
        first = perform(trial, str(place / "run"), str(place / "sets"))
        torch.manual_seed(2)
        again = perform(trial, str(place / "run"), str(place / "sets"))
    finally:
        torch.set_num_threads(threads)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert (first["count"], first["classes"]) == (30, 3) and first["accuracy"] == first["correct"] / 30
    assert first["accuracy"] >= 0.9


def test_every_choosing_trial_is_judged_by_the_pictures_to_choose_by(place: Path) -> None:
    trial = trial_of(place, "scratch", CHOOSE)
    trial = replace(trial, protocol=replace(trial.protocol, steps=1))
    assert perform(trial, str(place / "run"), str(place / "sets"))["count"] == 21


def test_a_trial_on_sets_that_have_changed_is_refused(place: Path) -> None:
    trial = trial_of(place, "scratch", TEST)
    other = replace(trial, data=(*trial.data[:-1], ("test", "0" * 64)))
    with pytest.raises(ValueError, match="the shard sets of digits have changed"):
        perform(other, str(place / "run"), str(place / "sets"))


def test_a_damaged_checkpoint_is_named(place: Path, tmp_path: Path) -> None:
    copied(place / "run" / "export", tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    source = find_model(str(tmp_path))
    assert isinstance(source, Exported)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        source.weights()


def copied(source: Path, target: Path) -> Path:
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_every_mistake_is_told_before_a_machine_is_asked_for(place: Path, tmp_path: Path) -> None:
    given = {"checkpoint": str(place / "run"), "data": str(place / "sets"), "to": str(tmp_path / "to")}
    prepare = rf"make it with: python jobs/prepare.py fashion_offset --to {place}/sets$"
    (tmp_path / "unfinished").mkdir()
    mistakes: list[tuple[dict[str, str], str]] = [
        ({"tasks": "digits,cats"}, "no task 'cats'; there are: digits, mnist, fashion_offset"),
        ({"tasks": "digits", "protocol": "vtab"}, "no protocol 'vtab'; there are: demo"),
        ({"tasks": "digits,fashion_offset"}, f"task fashion_offset is not prepared .*{prepare}"),
        ({"tasks": "digits", "checkpoint": str(tmp_path / "unfinished")}, "has not finished"),
        ({"tasks": "digits", "seeds": "0"}, "seeds is 0; at least 1 is needed"),
        ({"tasks": "digits", "tracking_uri": "http://127.0.0.1:9"}, "no MLflow server at http://127.0.0.1:9"),
    ]
    for changes, said in mistakes:
        words = [f"--{name.replace('_', '-')}={value}" for name, value in {**given, **changes}.items()]
        with pytest.raises(ValueError, match=said):
            job.main(words)


# --- sweeps ---------------------------------------------------------------------------------------------------------

# Two at a time, with one thread each: every worker costs the seconds that torch takes to load.
SWEEP = ("--tasks", "digits,mnist", "--rates", "0.003", "0.1", "--seeds", "1", "--cpus-each", "1.5")
COUNT = 2 * 2 * (2 + 1)


@pytest.fixture(scope="module")
def address(local_ray: None) -> Iterator[str]:
    yield ray.get_runtime_context().gcs_address


class Driver:
    """`python jobs/finetune.py`, on the cluster at `address`."""

    def __init__(self, place: Path, to: Path, address: str, *words: str, data: Path | None = None) -> None:
        command = [sys.executable, str(ROOT / "jobs" / "finetune.py"), "--checkpoint", str(place / "run")]
        command += ["--data", str(data or place / "sets"), "--to", str(to), *(words or SWEEP)]
        env = {**os.environ, "RAY_ADDRESS": address, "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db"}
        self._process = subprocess.Popen(
            command, env=env, cwd=to.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def end(self, code: int = 0) -> str:
        said, wrong = self._process.communicate(timeout=200)
        assert self._process.returncode == code, said + wrong
        return wrong if code else said


def table(to: Path) -> dict[str, Result]:
    """Every result without the time it took."""
    return {name: {**result, "seconds": 0} for name, result in Results(Folder(str(to))).load().items()}


def files(to: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (to / "results").glob("*.json")}


def wait_for(true: Callable[[], object]) -> None:
    limit = time.monotonic() + 120
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(place: Path, address: str) -> dict[str, Result]:
    assert f"{COUNT} of {COUNT} trials have results" in Driver(place, place / "quiet", address).end()
    return table(place / "quiet")


@pytest.mark.slow
def test_a_sweep_says_what_every_task_is_worth(undisturbed: dict[str, Result], place: Path) -> None:
    assert len(undisturbed) == COUNT
    tested = [result for result in undisturbed.values() if result["trial"]["split"] == TEST]
    assert len(tested) == 4 and min(result["accuracy"] for result in tested) > 0.8
    told = [run for run in read(f"sqlite:///{place}/mlflow.db") if run.tags["vitscale.kind"] == "trial"]
    assert {run.tags["vitscale.trial"]: run.metrics["accuracy"][0].value for run in told} == {
        name: result["accuracy"] for name, result in undisturbed.items()
    }


@pytest.mark.slow
def test_a_sweep_whose_driver_is_killed_goes_on_as_if_nothing_had_happened(
    undisturbed: dict[str, Result], place: Path, address: str
) -> None:
    to = place / "killed"
    driver = Driver(place, to, address)
    wait_for(lambda: len(list((to / "results").glob("*.json"))) >= 3)
    driver.kill()
    before = files(to)
    assert 3 <= len(before) < COUNT
    Driver(place, to, address).end()
    after = files(to)
    assert {name: after[name] for name in before} == before
    assert table(to) == undisturbed


@pytest.mark.slow
def test_two_sweeps_at_once_have_every_result_once(undisturbed: dict[str, Result], place: Path, address: str) -> None:
    to = place / "both"
    both = [Driver(place, to, address) for _ in range(2)]
    for driver in both:
        assert f"{COUNT} of {COUNT} trials have results" in driver.end()
    assert table(to) == undisturbed
    told = [run.tags.get("vitscale.trial") for run in read(f"sqlite:///{place}/mlflow.db")]
    assert sorted(filter(None, told)) == sorted(undisturbed)


@pytest.mark.slow
def test_what_has_a_result_is_not_run_again_and_what_fails_keeps_nothing_else_from_running(
    undisturbed: dict[str, Result], place: Path, address: str
) -> None:
    sets, to = copied(place / "sets", place / "damaged sets"), place / "failed"
    Driver(place, to, address, "--tasks", "mnist", *SWEEP[2:], data=sets).end()
    before = files(to)
    for path in [*(sets / "mnist").rglob("*.tar"), sets / "digits" / "test" / "000000.tar"]:
        path.write_bytes(path.read_bytes().replace(b"picture-0000", b"picture-OOOO"))
    said = Driver(place, to, address, data=sets).end(2)
    assert re.fullmatch(r"error: 2 trials failed: (digits \w+ lr \S+ seed 0 on test: .*?damaged.*?){2}\n", said), said
    assert {name: held for name, held in files(to).items() if name in before} == before
    failed = {name for name, r in undisturbed.items() if (r["trial"]["task"]["name"], r["count"]) == ("digits", 30)}
    assert table(to) == {name: result for name, result in undisturbed.items() if name not in failed}


@pytest.mark.slow
def test_every_trial_that_fails_is_tried_again(undisturbed: dict[str, Result], place: Path, address: str) -> None:
    sets, to = copied(place / "sets", place / "mended sets"), place / "mended"
    broken = sets / "digits" / "val200" / "000000.tar"
    whole = broken.read_bytes()
    broken.write_bytes(whole.replace(b"picture-0000", b"picture-OOOO"))
    driver = Driver(place, to, address, *SWEEP, "--retries", "100000", data=sets)
    wait_for(lambda: len(list((to / "results").glob("*.json"))) == COUNT // 2)  # all of mnist
    broken.write_bytes(whole)
    driver.end()
    assert table(to) == undisturbed
