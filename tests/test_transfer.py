"""Many fine-tunings are a reconciler: what is missing follows from what is there, and no kill loses or doubles it."""

import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.cluster_utils import Cluster

from jobs import finetune as job
from pipeline.track.runs import read
from pipeline.train.run import build, export
from pipeline.transfer import protocols, sweep, tasks
from pipeline.transfer.finetune import Trial
from pipeline.transfer.results import Result, Results
from pipeline.transfer.tasks import DEV, TEST, Part, Task
from pipeline.transfer.wanted import Wanted, best_rate
from pipeline.transfer.workers import Group, Outcome, Queue, Resources
from shards import progress
from shards.storage import Folder
from tests import tiny
from tests.chores import Chores
from tests.gang import JobProcess

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(600)
DIGITS, MNIST, _ = DEMO = tasks.named("demo")

# --- which trials there are -----------------------------------------------------------------------------------------


def wanted(**changes: Any) -> Wanted:
    architecture = tiny_model()
    chosen: Sequence[Task] = changes.pop("tasks", DEMO)
    tried: tuple[float, ...] = changes.pop("rates", (0.01, 0.1))
    made = Wanted(
        tasks=tuple(chosen),
        data={task.name: data_of(task) for task in chosen},
        recipes={task.name: protocols.named("demo").recipe(task, 1000, architecture, 784.0) for task in chosen},
        rates={task.name: tried for task in chosen},
        starts=("pretrained", "scratch"),
        protocol="demo-1",
        seeds=(0, 1),
        pretrained="p" * 64,
        architecture="a" * 64,
    )
    return replace(made, **changes)


def tiny_model() -> Any:
    from pipeline.config import Vit

    return Vit(width=16, depth=2, heads=2, hidden=32, patch=4, image_size=12)


def data_of(task: Task) -> tuple[tuple[str, str], ...]:
    parts = (*task.learning, *task.choosing, *task.testing)
    return tuple((where, f"root of {where}") for where in dict.fromkeys(task.where(part) for part in parts))


def judged(trials: Iterable[Trial], accuracy: Callable[[Trial], float]) -> dict[str, Result]:
    return {trial.name: result_of(trial, accuracy(trial)) for trial in trials}


def result_of(trial: Trial, accuracy: float) -> Result:
    said = {"accuracy": accuracy, "correct": round(1000 * accuracy), "count": 1000, "classes": 10, "seconds": 1.0}
    return json.loads(json.dumps({"trial": asdict(trial), **said}))


def whole(asked: Wanted, accuracy: Callable[[Trial], float]) -> dict[str, Trial]:
    """All trials, when those that choose a rate have turned out like this."""
    return asked.trials(judged(asked.trials({}).values(), accuracy))


rates = st.lists(st.floats(1e-5, 10), min_size=1, max_size=4, unique=True).map(tuple)
seeds = st.integers(1, 4).map(lambda count: tuple(range(count)))
some_tasks = st.lists(st.sampled_from(DEMO), min_size=1, unique=True).map(tuple)


@settings(deadline=None, max_examples=30)
@given(some_tasks, rates, seeds, st.randoms(use_true_random=False))
def test_every_trial_is_wanted_once(some: tuple, tried: tuple, repeated: tuple, chance: Any) -> None:
    asked = wanted(tasks=some, rates=tried, seeds=repeated)
    trials = whole(asked, lambda trial: chance.random())
    assert len(trials) == asked.count == sum(asked.count_of(task) for task in some)
    tested = {(t.task.name, t.start): t.rate for t in trials.values() if t.split == TEST}
    assert len(tested) == 2 * len(some)  # and one rate for all seeds
    assert sum(t.split == TEST for t in trials.values()) == 2 * len(some) * len(repeated)
    assert sum(t.split == DEV for t in trials.values()) == (2 * len(some) * len(tried) if len(tried) > 1 else 0)


@settings(deadline=None, max_examples=30)
@given(rates, seeds, st.floats(1e-5, 10), st.sampled_from(DEMO))
def test_no_rate_seed_or_task_that_is_added_renames_another_trial(
    tried: tuple, repeated: tuple, rate: float, task: Task
) -> None:
    fewer = wanted(tasks=[t for t in DEMO if t != task], rates=tried, seeds=repeated)
    more = wanted(tasks=DEMO, rates=(rate, *tried), seeds=(*repeated, 99))
    assert fewer.trials({}).keys() <= more.trials({}).keys() or len(tried) == 1
    best = tried[0]  # with which both go on to the test
    ours, theirs = (
        {name for name, t in whole(asked, lambda t: float(t.rate == best)).items() if t.split == TEST}
        for asked in (fewer, more)
    )
    assert ours < theirs


def test_everything_that_decides_a_result_is_in_the_name() -> None:
    trial = next(iter(wanted().trials({}).values()))
    others = [
        replace(trial, task=replace(trial.task, flip=True)),
        replace(trial, data=((trial.data[0][0], "others"), *trial.data[1:])),
        replace(trial, split=TEST),
        replace(trial, start="scratch"),
        replace(trial, model="q" * 64),
        replace(trial, recipe=replace(trial.recipe, steps=7)),
        replace(trial, protocol="demo-2"),
        replace(trial, rate=0.02),
        replace(trial, seed=1),
    ]
    assert len({each.name for each in [trial, *others]}) == len(others) + 1
    assert replace(trial).name == trial.name


# --- nothing is chosen by the test ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(rates, st.randoms(use_true_random=False))
def test_every_rate_is_chosen_by_the_pictures_to_choose_by_whatever_the_test_says(tried: tuple, chance: Any) -> None:
    asked = wanted(rates=tried)
    chosen = judged(asked.trials({}).values(), lambda trial: chance.random())
    planted = judged((replace(t, split=TEST) for t in asked.trials({}).values()), lambda trial: chance.random())
    assert asked.trials({**planted, **chosen}) == asked.trials(chosen)


def test_every_leak_that_is_planted_is_refused() -> None:
    asked = wanted()
    choosing = asked.choosing["digits", "pretrained"]
    done = judged(asked.trials({}).values(), lambda trial: 0.5)
    name, trial = next(iter(choosing.items()))
    # A trial that is judged by the test, among those to choose by.
    leak = replace(trial, split=TEST)
    with pytest.raises(ValueError, match=r"chosen on dev alone, and digits pretrained .* has seen the test"):
        best_rate({**choosing, leak.name: leak}, {**done, **judged([leak], lambda trial: 1.0)})
    # Its result, put in the place of another's.
    with pytest.raises(ValueError, match="chosen on dev alone"):
        asked.trials({**done, name: result_of(leak, 1.0)})
    # The result of a trial that has learnt from other pictures.
    other = replace(trial, data=((trial.data[0][0], "the test set"), *trial.data[1:]))
    with pytest.raises(ValueError, match=rf"results/{name}.json is not of digits pretrained"):
        asked.trials({**done, name: result_of(other, 1.0)})


@pytest.mark.parametrize("role", ["learning", "choosing"])
def test_every_task_with_test_pictures_among_those_to_learn_from_or_choose_by_is_refused(role: str) -> None:
    leaks = replace(DIGITS, **{role: (Part("test", 90, 100),)})
    with pytest.raises(ValueError, match=r"task digits: digits/test .* are the same pictures"):
        wanted(tasks=[leaks])
    data = tuple((where, "one root for all") for where, _ in data_of(MNIST))
    with pytest.raises(ValueError, match=r"task mnist: mnist/\w+ to .* are the same pictures"):
        wanted(tasks=[MNIST], data={"mnist": data})
    apart = replace(DIGITS, choosing=(Part("test", 90, 100),), testing=(Part("test", 0, 90),))
    assert wanted(tasks=[apart]).count


def test_of_equal_rates_the_smallest_is_taken_whatever_their_order() -> None:
    for tried in ((0.1, 0.01, 0.03), (0.03, 0.1, 0.01)):
        trials = wanted(rates=tried).choosing["digits", "pretrained"]
        assert best_rate(trials, judged(trials.values(), lambda trial: 0.5 + (trial.rate < 0.05))) == 0.01


def test_every_penalty_is_chosen_by_all_other_tasks_where_the_protocol_says_so() -> None:
    asked = wanted(rates=(1.0, 2.0, 4.0), chosen_by="others", starts=("pretrained",))
    best = {"digits": 1.0, "mnist": 4.0, "fashion_offset": 4.0}
    tested = {t.task.name: t.rate for t in whole(asked, lambda t: -abs(t.rate - best[t.task.name])).values()
              if t.split == TEST}  # fmt: skip
    assert tested == {"digits": 4.0, "mnist": 1.0, "fashion_offset": 1.0}  # for the others all rates rank alike
    with pytest.raises(ValueError, match="there is digits alone: name two"):
        wanted(tasks=[DIGITS], chosen_by="others")


# --- a sweep, with actors that are functions ------------------------------------------------------------------------


class Killed(BaseException):
    """What a sweep dies of."""


class Here:
    """In place of a pool: two actors in this process, which do what they have when they are waited for."""

    size = 2

    def __init__(self, folder: Folder, work: Callable[[Trial], Result]) -> None:
        self.results, self.work = Results(folder), work
        self.hands: dict[int, Group] = {}
        self.had = ["", ""]

    @property
    def at_work(self) -> list[Group]:
        return list(self.hands.values())

    def grow(self, groups: int) -> None:
        """There are two."""

    def hand_out(self, choose: Callable[[str, set[str]], Group | None]) -> None:
        for actor in {0, 1} - self.hands.keys():
            if group := choose(self.had[actor], set(self.had)):
                self.hands[actor] = group
                self.had[actor] = next(iter(group.values())).task.name

    def wait(self, seconds: float) -> Iterator[Outcome]:
        for actor, group in list(self.hands.items()):
            done: dict[str, Result] = {}
            error, died = "", False
            for name, trial in group.items():
                try:
                    done[name] = self.results.store(name, self.work(trial))
                except (ValueError, RayDied) as why:
                    error, died = str(why), isinstance(why, RayDied)
                    break
            del self.hands[actor]
            yield Outcome(group, done, error, died=died)

    def close(self) -> list[Group]:
        left, self.hands = self.at_work, {}
        return left


class RayDied(Exception):
    """What an actor dies of."""


def reconcile(
    asked: Wanted, folder: Path, work: Callable[[Trial], Result], *, retries: int = 0, seconds: float = 60.0
) -> tuple[dict[str, str], list[str]]:
    """A sweep on such actors: what failed, and what was told of."""
    told: list[str] = []
    place = Folder(str(folder))
    claims = sweep.Claims(place / "claims", seconds, 0.0)
    heard = sweep.Told(finished=lambda name, result: told.append(name))
    try:
        run: Any = sweep._Sweep(asked, Results(place), claims, Here(place, work), retries, heard, lambda: False)  # type: ignore[arg-type]
        return run.run(work), told
    finally:
        claims.close()


def quality(trial: Trial) -> float:
    return int(trial.name[:6], 16) / 2**24


def table(folder: Path) -> dict[str, Result]:
    """Every result without the time it took."""
    return {name: {**result, "seconds": 0} for name, result in Results(Folder(str(folder))).load().items()}


class Counted:
    """Work that counts how often each trial is done, and dies, as its driver does, after `life` of them."""

    def __init__(self, life: int = 10**9) -> None:
        self.life, self.done = life, Counter[str]()

    def __call__(self, trial: Trial) -> Result:
        if sum(self.done.values()) >= self.life:
            raise Killed
        self.done[trial.name] += 1
        return {**result_of(trial, quality(trial)), "trial": asdict(trial)}  # before it has been written and read


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 40), st.integers(0, 40))
def test_a_sweep_that_is_killed_anywhere_goes_on_as_if_nothing_had_happened(
    tmp_path_factory: pytest.TempPathFactory, first: int, second: int
) -> None:
    folder, quiet = (tmp_path_factory.mktemp(name) for name in ("killed", "quiet"))
    asked, work = wanted(), Counted()
    for life in (first, first + second):
        work.life = life
        with suppress(Killed):
            reconcile(asked, folder, work)
    work.life = 10**9
    errors, told = reconcile(asked, folder, work)
    assert not errors and sorted(told) == sorted(set(told)) and len(told) == asked.count
    assert set(work.done.values()) == {1} and len(work.done) == asked.count
    reconcile(asked, quiet, Counted())
    assert table(folder) == table(quiet)


def test_of_all_who_have_a_result_of_one_trial_the_first_counts_for_each(tmp_path: Path) -> None:
    first, second, third = (Results(Folder(str(tmp_path))) for _ in range(3))
    assert first.store("trial", {"accuracy": 0.5}) == {"accuracy": 0.5}
    assert second.store("trial", {"accuracy": 0.25}) == second.known["trial"] == {"accuracy": 0.5}
    assert third.load() == {"trial": {"accuracy": 0.5}}


def test_a_task_or_a_rate_that_is_added_has_nothing_done_again(tmp_path: Path) -> None:
    work = Counted()
    reconcile(wanted(tasks=[DIGITS], rates=(0.01,)), tmp_path, work)
    reconcile(wanted(tasks=DEMO, rates=(0.01, 0.1)), tmp_path, work)
    reconcile(wanted(tasks=DEMO, rates=(0.01, 0.1, 0.3), seeds=(0, 1, 2)), tmp_path, work)
    assert set(work.done.values()) == {1}


def test_no_trial_is_done_twice_by_sweeps_at_once(tmp_path: Path) -> None:
    asked, work, told = wanted(), Counted(), dict[int, list[str]]()
    both = threading.Barrier(2)

    def one(number: int) -> None:
        both.wait()
        told[number] = reconcile(asked, tmp_path, work)[1]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(work.done.values()) == {1} and len(work.done) == asked.count
    assert [len(set(told[number])) for number in range(2)] == [asked.count] * 2  # both end with all


def test_a_trial_that_fails_is_tried_again_then_listed_while_all_others_are_done(tmp_path: Path) -> None:
    tries, asked = Counter[str](), wanted()
    sick = list(asked.choosing["mnist", "scratch"])
    first, second = sick[:2]

    def work(trial: Trial) -> Result:
        tries[trial.name] += 1
        if trial.name == first or (trial.name == second and tries[second] < 3):
            raise ValueError("the disk is full")
        return result_of(trial, 0.5)

    errors, told = reconcile(asked, tmp_path, work, retries=2)
    assert list(errors) == [first] and re.match(r"mnist scratch .*: the disk is full", errors[first])
    assert tries[first] == tries[second] == 3
    assert len(told) == asked.count - 1 - len(asked.seeds)  # without its tests, whose rate nobody knows


def test_a_trial_that_kills_its_actor_is_given_up_after_a_while(tmp_path: Path) -> None:
    asked = wanted(tasks=[DIGITS])
    deadly = next(iter(asked.choosing["digits", "pretrained"]))
    tries = Counter[str]()

    def work(trial: Trial) -> Result:
        tries[trial.name] += 1
        if trial.name == deadly:
            raise RayDied("out of memory")
        return result_of(trial, 0.5)

    errors, _ = reconcile(asked, tmp_path, work)
    assert list(errors) == [deadly] and tries[deadly] == sweep.RETRIES + 1
    assert set((tries - Counter({deadly: tries[deadly]})).values()) == {1}


def test_what_another_sweep_has_in_hand_is_waited_for_and_done_when_that_has_died(tmp_path: Path) -> None:
    asked, work = wanted(tasks=[DIGITS], starts=("pretrained",)), Counted()
    dead, alive = asked.choosing["digits", "pretrained"]
    other = sweep.Claims(Folder(str(tmp_path)) / "claims", 3600.0, 0.0)
    assert other.take(dead) and other.take(alive)
    waits = threading.Thread(target=lambda: reconcile(asked, tmp_path, work))
    waits.start()
    trial = asked.choosing["digits", "pretrained"][alive]
    Results(Folder(str(tmp_path))).store(alive, result_of(trial, 0.9))
    assert not work.done  # and could not be: all there is to do is claimed
    other.release(dead)
    waits.join()
    other.close()
    assert alive not in work.done and work.done[dead] == 1 and len(table(tmp_path)) == asked.count


def test_every_run_of_its_own_comes_last_and_fails_alone(tmp_path: Path) -> None:
    large = replace(MNIST, kind="run")
    asked = wanted(tasks=[large, DIGITS], rates=(0.1,), seeds=(0, 1))
    order: list[str] = []

    def work(trial: Trial) -> Result:
        order.append(trial.task.name)
        if trial.task == large and trial.seed == 1:
            raise ValueError("no room\nfor it")
        return result_of(trial, 0.5)

    errors, _ = reconcile(asked, tmp_path, work)
    assert order == ["digits"] * 4 + ["mnist"] * 4
    assert len(errors) == 2 and all(error.endswith("no room for it") for error in errors.values())


# --- who does what --------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcde"), max_size=30), st.integers(1, 4))
def test_every_group_is_taken_once_and_of_a_task_that_is_there_before_another(row: str, actors: int) -> None:
    queue, had = Queue(), [""] * actors
    queue.add({str(number): wanted_trial(name)} for number, name in enumerate(row))
    taken: list[str] = []
    while len(queue):
        actor = len(taken) % actors
        waiting = set(queue.waiting)
        group = queue.take(had[actor], set(had))
        assert group
        ((number, trial),) = group.items()
        assert trial.task.name == had[actor] or had[actor] not in waiting
        if had[actor] not in waiting and waiting - set(had):
            assert trial.task.name not in had
        had[actor] = trial.task.name
        taken.append(number)
    assert sorted(taken, key=int) == [str(number) for number in range(len(row))]
    assert queue.take("a", set()) is None


def wanted_trial(task: str) -> Trial:
    return replace(FIRST, task=replace(DIGITS, name=task))


FIRST = next(iter(wanted().trials({}).values()))


# --- what is told ---------------------------------------------------------------------------------------------------


def test_a_sweep_in_a_line_says_how_far_it_is_and_when_it_ends() -> None:
    state = sweep.State(total=120, done=34, running=4, failed=0, waiting=0, left=750.0)
    noon = time.mktime((2026, 1, 5, 12, 0, 0, 0, 0, -1))
    said = "fine-tuning: 34 of 120 trials (28 %), 4 running"
    assert job.line(state, noon) == f"{said}, 12:30 min left, to Mon 12:12"
    assert job.line(replace(state, failed=2, waiting=3, left=float("inf")), noon) == (
        f"{said}, 2 failed, 3 in another sweep's hands"
    )
    assert job.line(replace(state, paused=True), noon).endswith("nothing runs while others need the cluster")
    assert progress.read(job.line(state, noon)) == progress.ProgressReading("fine-tuning", 34, 120, "trials")


def test_a_sweep_says_nothing_while_nothing_but_its_expected_end_changes() -> None:
    said: list[str] = []
    lines = job.Lines(said.append, every=0.0)
    for done, running, left in ((12, 2, 60.0), (12, 2, 59.0), (12, 2, 58.0), (12, 1, 57.0), (13, 1, 50.0)):
        lines(sweep.State(total=36, done=done, running=running, failed=0, waiting=0, left=left))
    assert [line.partition(", to ")[0] for line in said] == [
        "fine-tuning: 12 of 36 trials (33 %), 2 running, 1:00 min left",
        "fine-tuning: 12 of 36 trials (33 %), 1 running, 57 s left",
        "fine-tuning: 13 of 36 trials (36 %), 1 running, 50 s left",
    ]


def test_the_expected_end_is_that_of_trials_as_long_as_those_of_their_task(tmp_path: Path) -> None:
    large = replace(MNIST, kind="run")
    asked = wanted(tasks=[DIGITS, large], rates=(0.1,), seeds=(0, 1, 2))
    states: list[sweep.State] = []
    claims = sweep.Claims(Folder(str(tmp_path)) / "claims", 60.0, 0.0)

    def work(trial: Trial) -> Result:
        return {**result_of(trial, 0.5), "seconds": 100.0 if trial.task == large else 10.0}

    place = Folder(str(tmp_path))
    told = sweep.Told(progress=states.append)
    run: Any = sweep._Sweep(asked, Results(place), claims, Here(place, work), 0, told, lambda: False)  # type: ignore[arg-type]
    run.run(work)
    claims.close()
    assert [state.left for state in states[:4]] == [float("inf"), 4 * 10 / 2 + 6 * 10, 2 * 10 / 2 + 6 * 10, 6 * 10]
    assert [state.left for state in states[-6:]] == [100.0 * left for left in range(5, -1, -1)]


def test_everything_that_decides_a_trial_is_a_parameter_of_its_run() -> None:
    said = sweep.params(result_of(FIRST, 0.5))
    assert len({json.dumps(sweep.params(result_of(other, 0.5))) for other in [FIRST, *wanted().trials({}).values()]}) \
        == len(wanted().trials({}))  # fmt: skip
    for field, value in asdict(FIRST.recipe).items():
        assert said[f"recipe.{field}"] == json.loads(json.dumps(value))
    assert said["checkpoint"] == FIRST.model and said["protocol"] == "demo-1" and said["lr"] == FIRST.rate
    also = {"also": {"real": {"accuracy": 0.75}}}
    assert sweep.metrics({**result_of(FIRST, 0.5), **also})["accuracy_real"] == 0.75


# --- real actors ----------------------------------------------------------------------------------------------------


@pytest.fixture
def chores(tmp_path: Path, local_ray: None) -> Chores:
    return Chores(str(tmp_path / "chores"))


def swept(asked: Wanted, folder: Path, chores: Chores, *, retries: int = 0) -> dict[str, str]:
    """A sweep on two actors that have nothing to do but chores."""
    told, place, resources = sweep.Told(), Results(Folder(str(folder))), Resources(0.5)
    return sweep.sweep(
        asked, "source", "data", place, resources=resources, retries=retries, told=told, most=2, work=chores
    )


@pytest.mark.slow
def test_every_result_exists_once_whenever_an_actor_is_killed(chores: Chores, tmp_path: Path) -> None:
    asked = wanted(tasks=[DIGITS, MNIST], starts=("pretrained",))
    chores.hold()
    ended = Aside(lambda: swept(asked, tmp_path, chores))
    wait_for(lambda: len(chores.at_work()) == 2)
    first, second = chores.at_work()
    os.kill(chores.at_work()[first], signal.SIGKILL)
    wait_for(lambda: len(chores.performed()) == 3)  # of which another actor does one
    chores.let_go()
    assert ended.result() == {}
    assert chores.performed() == {**dict.fromkeys(table(tmp_path), 1), first: 2}
    assert len(table(tmp_path)) == asked.count and second in table(tmp_path)


@pytest.mark.slow
def test_two_sweeps_at_once_do_every_trial_once(chores: Chores, tmp_path: Path) -> None:
    asked = wanted(starts=("pretrained",))
    chores.hold()
    both = [Aside(lambda: swept(asked, tmp_path, chores)) for _ in range(2)]
    wait_for(lambda: len(chores.at_work()) == 4)
    chores.let_go()
    assert [one.result() for one in both] == [{}, {}]
    assert chores.performed() == dict.fromkeys(table(tmp_path), 1) and len(table(tmp_path)) == asked.count


@pytest.mark.slow
def test_a_share_of_a_gpu_that_is_too_small_is_named_for_that_trial_alone(chores: Chores, tmp_path: Path) -> None:
    asked = wanted(tasks=[DIGITS], starts=("pretrained",), rates=(0.1,), seeds=(0, 1, 2))
    large, sick = [trial.name for trial in asked.trials({}).values()][:2]
    chores.spoil(large, "memory")
    chores.spoil(sick, "value")
    errors = swept(asked, tmp_path, chores, retries=1)
    assert "more with --gpus-each (a GPU's memory is full" in errors[large] and errors[sick].endswith(": spoilt")
    assert chores.performed()[large] == 1 and chores.performed()[sick] == 2  # what does not fit never will
    assert len(table(tmp_path)) == 1


class Aside:
    """Something that is done meanwhile; its result is what it returns or raises."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self._found: list[Any] = []
        self._wrong: list[BaseException] = []

        def run() -> None:
            try:
                self._found.append(do())
            except BaseException as error:
                self._wrong.append(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self) -> Any:
        self._thread.join(200)
        for error in self._wrong:
            raise error
        return self._found[0]


def wait_for(true: Callable[[], object]) -> None:
    limit = time.monotonic() + 120
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


# --- real fine-tunings ----------------------------------------------------------------------------------------------

# Two at a time, with one thread each: every worker costs the seconds that torch takes to load.
SWEEP = ("--tasks", "digits,mnist", "--protocol", "demo-short", "--rates", "0.003", "0.1", "--seeds", "1", "--scratch")
SWEEP = (*SWEEP, "--cpus-each", "1.5", "--claim-seconds", "5")
COUNT = 2 * 2 * (2 + 1)
SPLITS = {"train800": (40, 24), "val200": (21,), "test": (30,)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and two tasks: `run`, `sets/digits`, `sets/mnist`."""
    folder = tmp_path_factory.mktemp("transfer")
    for classes, task in ((3, "digits"), (4, "mnist")):
        for side, (split, sizes) in enumerate(SPLITS.items(), 12):
            tiny.shard_set(folder / "sets" / task / split, sizes=sizes, classes=classes, side=side)
    config = tiny.config(tasks.find(str(folder / "sets"), DIGITS)["digits/test"])
    model = build(replace(config, model=replace(config.model, representation=True)))
    config = replace(config, model=model.config)
    weights, told = {k: v.detach() for k, v in model.named_parameters()}, {"steps": 0, "exaflops": 0.25}
    export(Folder(str(folder / "run")), config, weights, told)
    return folder


def copied(source: Path, target: Path) -> Path:
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target


def test_every_mistake_is_told_before_a_machine_is_asked_for(place: Path, tmp_path: Path) -> None:
    given = {"checkpoint": str(place / "run"), "data": str(place / "sets"), "to": str(tmp_path / "to")}
    prepare = rf"make it with: python jobs/prepare.py fashion_offset --to {place}/sets$"
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "model.json").write_bytes((place / "run" / "export" / "model.json").read_bytes())
    leaks = copied(place / "sets", tmp_path / "leaks")
    for path in (leaks / "digits" / "train800").iterdir():
        (leaks / "digits" / "test" / path.name).write_bytes(path.read_bytes())
    (leaks / "digits" / "test" / "000001.tar").touch()
    mistakes: list[tuple[dict[str, str], str]] = [
        ({"tasks": "digits,cats"}, "no task 'cats'; there are: digits, mnist, fashion_offset"),
        ({"protocol": "vtab"}, "no protocol 'vtab'; there are: demo"),
        ({"tasks": "digits,fashion_offset"}, f"task fashion_offset is not prepared .*{prepare}"),
        ({"checkpoint": str(tmp_path / "unfinished")}, "has not finished"),
        ({"checkpoint": str(tmp_path / "partial")}, "is not complete"),
        ({"protocol": "vit-vtab", "data": str(leaks)}, "there both to learn from and to test on"),
        ({"protocol": "fewshot-ranked"}, "there is digits alone: name two"),
        ({"seeds": "0"}, "seeds is 0; at least 1 is needed"),
        ({"rates": "-1"}, "-1 is no learning rate"),
        ({"gpus_each": "2"}, "a trial uses one GPU at most"),
        ({"cpus_each": "0"}, "more than 0 CPUs"),
        ({"processes": "8:2"}, "the smaller number goes first, 2:8"),
        ({"tracking_uri": "http://127.0.0.1:9"}, "no MLflow server at http://127.0.0.1:9"),
    ]
    for changes, said in mistakes:
        words = {"tasks": "digits", **given, **changes}
        with pytest.raises(ValueError, match=said):
            job.main([f"--{name.replace('_', '-')}={value}" for name, value in words.items()])


class Driver:
    """`python jobs/finetune.py`, on the cluster at `address`."""

    def __init__(self, place: Path, to: Path, address: str, *words: str, data: Path | None = None) -> None:
        given = ["--checkpoint", place / "run", "--data", data or place / "sets", "--to", to, *(words or SWEEP)]
        env = {**os.environ, "RAY_ADDRESS": address, "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db"}
        self._process = JobProcess("finetune.py", *given, env=env, cwd=to.parent)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self, code: int = 0) -> str:
        said, wrong = self._process.communicate(timeout=300)
        assert self._process.returncode == code, said + wrong
        return wrong if code else said


def files(to: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (to / "results").glob("*.json")}


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
    assert {point.value for run in told for point in run.metrics.get("exaflops", ())} == {0.25}
    assert all(("exaflops" in run.metrics) == (run.params["start"] == "pretrained") for run in told)
    assert {run.tags["vitscale.trial"]: run.metrics["accuracy"][0].value for run in told} == {
        name: result["accuracy"] for name, result in undisturbed.items()
    }
    for run in told:
        said = sweep.params(undisturbed[run.tags["vitscale.trial"]])
        if said["start"] == "pretrained":
            said |= {"checkpoint.folder": f"{place}/run/export", "checkpoint.steps": 0}
        assert run.params == {name: str(value) for name, value in said.items()}


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
def test_a_sweep_that_loses_a_node_goes_on_as_if_nothing_had_happened(
    undisturbed: dict[str, Result], place: Path, cluster: Cluster
) -> None:
    to = place / "lost"
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    driver = Driver(place, to, str(cluster.address))
    wait_for(lambda: len(list((to / "results").glob("*.json"))) >= 3)
    cluster.remove_node(nodes[0], allow_graceful=False)
    driver.end()
    assert table(to) == undisturbed


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
    assert re.fullmatch(r"error: 2 trials failed: (digits \w+ .*? seed 0 on test: .*?damaged.*?){2}\n", said), said
    assert {name: held for name, held in files(to).items() if name in before} == before
    failed = {
        name for name, r in undisturbed.items() if (r["trial"]["task"]["name"], r["trial"]["split"]) == ("digits", TEST)
    }
    assert table(to) == {name: result for name, result in undisturbed.items() if name not in failed}


@pytest.mark.slow
def test_every_trial_that_fails_is_tried_again(undisturbed: dict[str, Result], place: Path, address: str) -> None:
    sets, to = copied(place / "sets", place / "mended sets"), place / "mended"
    broken = sets / "digits" / "val200" / "000000.tar"
    right = broken.read_bytes()
    broken.write_bytes(right.replace(b"picture-0000", b"picture-OOOO"))
    driver = Driver(place, to, address, *SWEEP, "--retries", "100000", data=sets)
    wait_for(lambda: len(list((to / "results").glob("*.json"))) == COUNT // 2)  # all of mnist
    broken.write_bytes(right)
    driver.end()
    assert table(to) == undisturbed


@pytest.mark.slow
def test_a_sweep_says_what_a_task_is_worth_that_is_a_run_of_its_own(place: Path, address: str) -> None:
    sets, to = place / "large sets", place / "large"
    for side, (split, sizes) in enumerate((("train", (60, 60)), ("val", (30,))), 12):
        tiny.shard_set(sets / "imagenet1k" / split, sizes=sizes, side=side)
        tiny.shard_set(sets / "digits" / {"train": "train800", "val": "test"}[split], sizes=sizes, side=side)
    tiny.shard_set(sets / "digits" / "val200", sizes=(20,), side=14)
    words = ("--tasks", "imagenet,digits", "--rates", "0.1", "--seeds", "1")
    assert "2 of 2 trials have results" in Driver(place, to, address, *words, data=sets).end()
    found = {result["trial"]["task"]["name"]: result for result in table(to).values()}
    assert found["imagenet"]["count"] == found["digits"]["count"] == 30
    assert min(result["accuracy"] for result in found.values()) > 0.8
