"""A learning rate that is searched by successive halving: what gets to the end is what it would be without.

`python tests/test_search.py FOLDER TO` is one driver of a search, on the Ray of `RAY_ADDRESS`.
"""

import json
import logging
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.cluster_utils import Cluster

from jobs import finetune as job
from pipeline import large
from pipeline.models.weights.exported import find
from pipeline.search import REDUCTION, Rungs, Search, restorable, rungs, search, settled
from pipeline.track.log import begin
from pipeline.train.folder import Job, open_folder, refuse_misfits, roots_of
from pipeline.train.run import work
from pipeline.transfer import tasks
from pipeline.transfer.finetune import Trial
from pipeline.transfer.results import Results
from pipeline.transfer.tasks import Part
from pipeline.transfer.wanted import Wanted, best_rate
from pipeline.world import World
from shards.storage import Folder
from tests import tiny
from tests.gang import Gang
from tests.test_large import MODEL, RECIPE, TASK, Told, exported

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parents[1]
HALVES = replace(TASK, learning=(Part("train", 0, 50),), choosing=(Part("train", 50, 100),), also=())
RATES = (30.0, 0.1)
STEPS = 9


def place_in(folder: Path) -> Path:
    """Data, and a model to start from."""
    tiny.shard_set(folder / "data/tiny/train", sizes=(30, 41, 29))
    tiny.shard_set(folder / "data/tiny/test", sizes=(20, 17))
    exported(folder / "start", MODEL)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place_in(tmp_path_factory.mktemp("search"))


def trial(place: Path, rate: float, **changes: Any) -> Trial:
    data = tasks.roots(tasks.find(str(place / "data"), HALVES))
    start = find(str(place / "start")).digest
    recipe = replace(RECIPE, steps=STEPS, warmup=0)
    return replace(Trial(HALVES, data, "dev", "pretrained", start, "demo-1", recipe, rate, 0), **changes)


def wanted(place: Path, to: str, rates: tuple[float, ...] = RATES) -> Search:
    trials = [trial(place, rate) for rate in rates]
    named = {each.name: each for each in trials}
    return Search(named, f"{place}/start", f"{place}/data", Folder(str(place / to)), (1,))


# --- who goes on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [*range(1, 200), 500, 10_000, 20_000, 1_000_003])
def test_rates_are_compared_after_a_ninth_and_a_third_of_the_steps_and_ray_compares_them_there(steps: int) -> None:
    found = rungs(steps)
    theirs = sorted(rung for rung, _ in Rungs(steps)._brackets[0]._rungs if rung < steps)
    assert list(found) == theirs and len(found) == sum(steps // 9 + 1 < steps / 3**k for k in range(2))
    assert all(steps / 9 < rung / 3**k <= steps / 9 + 1 for k, rung in enumerate(found))


class Trials:
    """Rates that go up the rungs one after the other, whoever came first first, as `pipeline.search` has them do."""

    def __init__(self, accuracies: np.ndarray, steps: int = 90) -> None:
        """(rates, rungs + 1): how good each is at each rung and at the end."""
        self.steps, self.accuracies = (*rungs(steps), steps), accuracies
        self.all = [SimpleNamespace(trial_id=str(n), last_result={}, status="PENDING") for n in range(len(accuracies))]
        self.stopped: dict[int, int] = {}
        """By rate, the rung at which it was."""
        self.known = Rungs(steps)
        self.queue = list(range(len(self.all)))
        for each in self.all:
            self.known.on_trial_add(None, each)  # type: ignore[arg-type]

    def restart(self) -> None:
        """As after a kill: what is left is what the trials have reported."""
        self.known = Rungs(self.steps[-1])
        for each in self.all:
            self.known.on_trial_add(None, each)  # type: ignore[arg-type]

    def step(self) -> None:
        """The next rate takes its turn, unless it is not good enough any more."""
        number = self.queue.pop(0)
        told = self.all[number].last_result.get("rungs", [])
        if told and self.tell(number, told) == "STOP":
            self.stop(number, len(told) - 1)
            return
        told = [*told, [self.steps[len(told)], float(self.accuracies[number, len(told)])]]
        if self.tell(number, told) == "CONTINUE":
            self.queue.append(number)
        elif len(told) < len(self.steps):
            self.stop(number, len(told) - 1)

    def stop(self, number: int, rung: int) -> None:
        self.stopped[number], self.all[number].status = rung, "TERMINATED"

    def tell(self, number: int, told: list[list[float]]) -> str:
        result = {"steps": told[-1][0], "accuracy": told[-1][1], "rungs": told}
        self.all[number].last_result = result
        return self.known.on_trial_result(None, self.all[number], result)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_whoever_reports_first_the_best_third_goes_on_and_the_best_of_a_rung_always(seed: int) -> None:
    draw = np.random.default_rng(seed)
    accuracies = draw.permuted(np.tile(np.linspace(0.1, 0.9, int(draw.integers(2, 9))), (3, 1)), axis=1).T
    trials = Trials(accuracies)
    while trials.queue:
        trials.step()
    left = set(range(len(accuracies)))
    for rung in range(2):
        here = {number for number in left if trials.stopped.get(number) != rung}
        best = max(left, key=lambda number: accuracies[number, rung])
        beaten = [sum(accuracies[other, rung] > accuracies[number, rung] for other in left) for number in here]
        assert best in here and max(beaten) <= (len(left) - 1) / REDUCTION
        left = here
    assert left and left.isdisjoint(trials.stopped)


@pytest.mark.parametrize("seed", range(10))
def test_a_search_that_is_killed_anywhere_stops_whom_it_would_have_stopped(seed: int) -> None:
    draw = np.random.default_rng(seed)
    accuracies = draw.uniform(size=(5, 3))
    quiet, killed = Trials(accuracies), Trials(accuracies)
    while quiet.queue:
        quiet.step()
        killed.step()
        if draw.uniform() < 0.5:
            killed.restart()
    assert killed.stopped == quiet.stopped and not killed.queue


@pytest.mark.parametrize("seed", range(20))
def test_in_whatever_order_rates_come_one_gets_to_the_end_and_none_that_was_beaten_when_it_was_asked(seed: int) -> None:
    draw = np.random.default_rng(seed)
    trials = Trials(draw.uniform(size=(int(draw.integers(2, 7)), 3)))
    while trials.queue:
        draw.shuffle(trials.queue)
        trials.step()
        if draw.uniform() < 0.3:
            trials.restart()
    assert len(trials.stopped) < len(trials.all)


def test_half_of_what_ray_tune_has_written_is_begun_anew(tmp_path: Path) -> None:
    own = Folder(str(tmp_path))
    assert not restorable(own)
    whole = pickle.dumps({"state": list(range(1000))})
    own.write("tuner.pkl", whole)
    assert not restorable(own)
    own.write("experiment_state-1.json", b'{"trial_data": [')
    assert not restorable(own)
    own.write("experiment_state-2.json", b'{"trial_data": []}')
    assert restorable(own)
    for name in ("tuner.pkl", "search_gen_state-2.json", "basic-variant-state-2.json"):
        for half in (b"", whole[:100], whole[:-1]):
            own.write(name, half)
            assert not restorable(own)
        own.write(name, whole)
        assert restorable(own)


# --- what is chosen --------------------------------------------------------------------------------------------------


def choice_of(place: Path, accuracies: Sequence[float | None], **changes: Any) -> tuple[dict[str, Any], Any, Any]:
    """A choice, its trials and results, in which rates without an accuracy were stopped."""
    trials = [trial(place, 10.0**-n, **changes) for n in range(len(accuracies))]
    done = {
        each.name: {"trial": json.loads(json.dumps(asdict(each))), "accuracy": accuracy}
        for each, accuracy in zip(trials, accuracies, strict=True)
        if accuracy is not None
    }
    stopped = [each.name for each in trials if each.name not in done]
    return {"name": "x", "whole": list(done), "stopped": stopped}, {each.name: each for each in trials}, done


def test_the_best_of_those_that_got_to_the_end_is_chosen_whatever_the_record_says_is_best(place: Path) -> None:
    choice, trials, done = choice_of(place, [None, 0.5, 0.7, 0.7])
    assert settled({**choice, "rate": 0.1}, trials, done) == 1e-3  # the smaller of equals


def test_where_all_results_are_there_the_whole_grid_s_rate_is_taken_and_nothing_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, (_, _, done) = wanted(place, "grid", (1.0, 0.1, 0.01)), choice_of(place, [0.5, 0.7, 0.7])
    results = Results(chosen.folder)
    for name, result in done.items():
        results.store(name, result)
    monkeypatch.setattr("pipeline.search._run", None)
    assert search(chosen, results) == best_rate(chosen.trials, done) == 0.01
    assert search(chosen, Results(chosen.folder)) == 0.01


def test_no_rate_is_ever_chosen_on_the_test_or_by_half_a_result(place: Path) -> None:
    choice, trials, done = choice_of(place, [None, 0.5, 0.7])
    with pytest.raises(ValueError, match=r"results/.*\.json is gone"):
        settled(choice, trials, {name: done[name] for name in list(done)[:1]})
    with pytest.raises(ValueError, match="among other rates"):
        settled(choice, dict(list(trials.items())[1:]), done)
    with pytest.raises(ValueError, match="among other rates"):
        settled({**choice, "whole": [], "stopped": list(trials)}, trials, done)
    leaked = {name: {**result, "trial": {**result["trial"], "split": "test"}} for name, result in done.items()}
    with pytest.raises(ValueError, match="has seen the test"):
        settled(choice, trials, leaked)
    with pytest.raises(ValueError, match="has seen the test"):
        settled(*choice_of(place, [None, 0.5], split="test"))
    with pytest.raises(ValueError, match="only on dev"):
        large.judge_early(trial(place, 0.1, split="test"), "", "", Folder(str(place)), 2, processes=[1])


def test_trials_that_do_not_fit_are_refused_before_anything_runs(place: Path) -> None:
    odd = [trial(place, rate, model="0" * 64) for rate in RATES]
    with pytest.raises(ValueError, match="has changed: it is"):
        search(replace(wanted(place, "odd"), trials={each.name: each for each in odd}), Results(Folder(str(place))))
    assert not (place / "odd").exists()


def test_a_rate_that_was_searched_is_tested_by_the_trials_that_the_whole_grid_would_have_made(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    easy = replace(HALVES, name="easy", kind="memory")
    data = trial(place, 0.1).data
    both = Wanted(
        tasks=(easy, HALVES),
        data={task.name: data for task in (easy, HALVES)},
        recipes={task.name: trial(place, 0.1).recipe for task in (easy, HALVES)},
        rates={task.name: RATES for task in (easy, HALVES)},
        starts=("pretrained", "scratch"),
        protocol="demo-1",
        seeds=(0, 1),
        pretrained="p",
        architecture="a",
    )
    asked: list[tuple[str, ...]] = []
    nothing: Any = None

    def searched(arguments: Any, part: Wanted, *_: Any) -> float:
        if part.starts == ("scratch",):
            raise RuntimeError("no room")
        return 0.1

    def reconcile(arguments: Any, part: Wanted, *_: Any) -> dict[str, str]:
        asked.append(tuple(sorted(part.trials({}))))
        return {}

    monkeypatch.setattr(job, "_searched", searched)
    monkeypatch.setattr(job, "_reconcile", reconcile)
    words = job.Arguments("", "", "", asha=True)
    parts, errors = job._all(words, both, "", "", nothing, "", nothing)
    small, tested = asked
    assert set(small) == {name for (task, _), trials in both.choosing.items() if task == "easy" for name in trials}
    assert set(tested) == both.testing(HALVES, "pretrained", 0.1).keys()
    assert errors == {"tiny scratch": "no room"} and sum(part.count for part in parts) == 8 + 2 + 4
    asked.clear()
    assert job._all(replace(words, asha=False), both, "", "", nothing, "", nothing) == ([both], {})
    assert asked == [tuple(sorted(both.trials({})))]


# --- the run on the way ----------------------------------------------------------------------------------------------


def go(world: World, place: str, to: str, until: int | None) -> tuple[bool, float]:
    """A trial up to some of its steps, or whole; whether it has got there, and its accuracy there."""
    chosen = trial(Path(place), 0.1)
    config, count = large.planned(chosen, f"{place}/start", f"{place}/data", cpus_each=1, precision="fp32")
    run = large.folder_of(chosen, Folder(f"{place}/{to}"))
    open_folder(config, run.absolute, roots_of(config, *refuse_misfits(config, 1)))
    count = replace(count, file=f"{large.RUNGS}/{until}.json") if until else count
    uri, tags = f"sqlite:///{place}/{to}.db", {"vitscale.folder": run.absolute}
    made = Job(config, run.absolute, uri, begin(uri, "tiny", tags, {}, same="vitscale.folder"), "tiny")
    arrived = work(made, world, torch.device("cpu"), lambda line: None, ended=count, until=until)
    return arrived, json.loads(run.read(count.file))[""]["accuracy"]


@pytest.mark.slow
def test_a_run_that_was_judged_on_the_way_ends_as_if_it_had_not_been(place: Path) -> None:
    gang = Gang(1)
    try:
        (quiet,), chosen = gang.run(go, str(place), "straight", None), trial(place, 0.1)
        run = place / "judged" / "runs" / chosen.name
        early = {}
        for until in (6, 4):
            ((arrived, early[until]),) = gang.run(go, str(place), "judged", until)
            assert arrived and not (run / "export").exists() and not (run / "counted.json").exists()
        assert early[4] == early[6], "which is as far as it had got"
        assert large.judged_early(chosen, Folder(str(place / "judged"))) == early
        assert gang.run(go, str(place), "judged", None) == [quiet]
        ours, theirs = (find(str(place / to / "runs" / chosen.name)).weights() for to in ("judged", "straight"))
        assert theirs and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    finally:
        gang.close()


# --- the real thing -------------------------------------------------------------------------------------------------


class Driver(Told):
    """One driver of a search."""

    def __init__(self, place: Path, to: str, address: str) -> None:
        super().__init__("test_search", place, to, address)

    def end(self) -> str:
        """What it has said by its end."""
        try:
            assert self.process.wait(240) == 0, self.said()
        finally:
            self.kill()
        return self.said()


@pytest.mark.slow
def test_a_search_that_is_killed_in_the_middle_goes_on_and_leaves_no_half_results(
    place: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.add_node(num_cpus=1)
    chosen = wanted(place, "killed")
    runs = [large.folder_of(each, chosen.folder) for each in chosen.trials.values()]
    first = Driver(place, "killed", str(cluster.address))
    own = chosen.folder / "tune" / chosen.name
    first.wait_for(lambda: any("rungs" in state.read_text() for state in Path(own.absolute).glob("experiment_state*")))

    def stopped_between_writes() -> bool:
        first.process.send_signal(signal.SIGSTOP)
        if not (whole := restorable(own)):
            first.process.send_signal(signal.SIGCONT)
        return whole

    first.wait_for(stopped_between_writes)
    first.kill()
    assert restorable(own)
    judged = {run.absolute: (Path(run.absolute) / "rungs/2.json") for run in runs if run.exists("rungs/2.json")}
    before = {path: path.stat().st_mtime_ns for path in judged.values()}
    said = Driver(place, "killed", str(cluster.address)).end()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    good = next(name for name, each in chosen.trials.items() if each.rate == 0.1)
    known = Results(chosen.folder).load()
    assert "chosen 0.1" in said
    assert known[good]["trial"] == json.loads(json.dumps(asdict(chosen.trials[good])))
    choice = json.loads((chosen.folder / "chosen").read(f"{chosen.name}.json"))
    assert good in choice["whole"] and known.keys() == {*choice["whole"]}
    assert {*choice["stopped"]} == chosen.trials.keys() - known.keys()
    assert all(choice["rungs"][name]["2"] for name in chosen.trials)
    assert not own.sizes()
    monkeypatch.setattr("pipeline.search._run", None)  # nobody calls it again, and no Ray is here
    told: list[str] = []
    assert search(chosen, Results(chosen.folder), finished=lambda name, result: told.append(name)) == 0.1
    assert told == choice["whole"]


def main() -> None:
    """One driver."""
    import ray

    place, to = sys.argv[1:]
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "0"  # so that what was told is kept as soon as it was
    settings = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init(os.environ["RAY_ADDRESS"], runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, **settings)
    chosen = wanted(Path(place), to)
    print("chosen", search(chosen, Results(chosen.folder), claim_seconds=3.0, skew=0.0))


if __name__ == "__main__":
    main()
