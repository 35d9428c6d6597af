"""A run gets over whatever happens to it: all at once, memory that runs out, a process that hangs, and a stop."""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster
from safetensors.torch import load

from jobs import demo, drill
from pipeline.data.loader import Batch
from pipeline.train.checkpoint import complete
from pipeline.train.folder import Job
from pipeline.train.objective import Objective
from pipeline.world import World
from shards.storage import Folder
from tests import tiny
from tests.family import family, kill
from tests.faults import Fault, Faults
from tests.process import repeat_undisturbed
from tests.rings import SOAK, count
from tests.test_elastic import losses, store
from tests.test_launch import Driver, words

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


# --- everything at once ---------------------------------------------------------------------------------------------

SAVE_EVERY = 20
STEPS, AWAY_SECONDS = (1600, 30.0) if SOAK else (500, 8.0)


class Besieged:
    """A run of two processes on a cluster of as many nodes, to which things happen."""

    def __init__(self, start: Callable[[], Driver], cluster: Cluster, faults: Faults, chance: random.Random) -> None:
        self._start, self._cluster, self._faults, self._chance = start, cluster, faults, chance
        self._nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        self.driver = start()

    def wait(self) -> None:
        """Until its next checkpoint, or a time at random, whatever it is doing then; never for many steps."""
        if self._chance.random() < 0.5:
            self.driver.wait_for_checkpoint(after=self._saved())
            return
        end, far = time.monotonic() + self._chance.uniform(0, 10), self._saved() + 2 * SAVE_EVERY
        while time.monotonic() < end and self._saved() < far:
            time.sleep(0.02)

    def _saved(self) -> int:
        return [0, *complete(self.driver.run)][-1]

    def kill_worker(self) -> None:
        """One of its processes is killed."""
        while not (found := family(name="TrainWorker")) or not kill([self._chance.choice(found)]):
            time.sleep(0.02)

    def lose_node(self) -> None:
        """A machine is gone, and another comes."""
        gone = self._nodes.pop(self._chance.randrange(len(self._nodes)))
        self._cluster.remove_node(gone, allow_graceful=False)
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def kill_driver(self) -> None:
        """Who started the run is killed, and starts it again."""
        self.driver.kill()
        self.driver = self._start()

    def lose_storage(self) -> None:
        """Nobody answers where its bucket is, for a while."""
        self._faults.always(Fault.RESET)
        time.sleep(AWAY_SECONDS)
        self._faults.calm()


HAPPENS = [
    Besieged.lose_storage,
    *count(1, 3) * [Besieged.kill_driver],
    *count(1, 5) * [Besieged.lose_node],
    *count(1, 11) * [Besieged.kill_worker],
]
"""Four blows, or twenty, whose order is left to chance."""


def weights(run: Folder) -> dict[str, torch.Tensor]:
    return load((run / "export").read("model.safetensors"))


@pytest.mark.soak
def test_whatever_is_killed_at_any_time_a_run_ends_as_if_it_had_been_left_alone(
    tmp_path: Path, faulty: tuple[str, Faults], cluster: Cluster
) -> None:
    tiny.shard_set(tmp_path / "set")
    url, faults = faulty
    chance = random.Random("siege")
    long = {"duration": STEPS / 2, "save_every": SAVE_EVERY, "max_failures": 100, "tracking_uri": store(tmp_path)}
    besieged = Besieged(
        lambda: Driver(tmp_path, "besieged", cluster=str(cluster.address), to=url, **long), cluster, faults, chance
    )
    for happens in chance.sample(HAPPENS, len(HAPPENS)):
        besieged.wait()
        assert not (besieged.driver.run / "export").exists("model.json"), "it is at its end before all has happened"
        happens(besieged)
    assert f"besieged: {STEPS:,} steps; " in besieged.driver.end()
    quiet = repeat_undisturbed(besieged.driver.run, tmp_path / "quiet", store(tmp_path), processes=2)
    ours, theirs = weights(besieged.driver.run), weights(quiet)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(tmp_path, "besieged") == losses(tmp_path, "quiet")


# --- memory that runs out, and a process that hangs -----------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> drill.Place:
    """Where small runs are disturbed."""
    folder = tmp_path_factory.mktemp("survival")
    made = drill.Place.open(str(folder / "drill"), folder / "aside")
    # Dropout is drawn for each pass, of which there are as many as the memory demands, and Adam makes much of rounding.
    optim = replace(made.config.optim, optimizer="sgd", lr=0.1)
    made.config = replace(made.config, model=replace(made.config.model, dropout=0.0), optim=optim)
    return made


def fits(most: int, job: Job, world: World) -> Iterator[None]:
    """No more than so many pictures fit into the memory of the device from now on."""
    whole = Objective.__call__

    def cramped(self: Objective, batch: Batch) -> torch.Tensor:
        if len(batch.images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. GPU 0 has a total capacity of 79 GiB")
        return whole(self, batch)

    Objective.__call__ = cramped  # type: ignore[method-assign]
    yield


def a_collective_that_never_returns(job: Job, world: World) -> Iterator[None]:
    """The last process does nothing any more, once."""
    if world.rank == world.size - 1 and drill.once(job, "hung"):
        while True:
            time.sleep(1)
    yield


def test_a_run_that_does_not_fit_into_the_memory_goes_on_in_smaller_passes_as_if_it_had_begun_with_them(
    place: drill.Place,
) -> None:
    quiet, most = place.quiet(), 2
    said = place.run("cramped", drill.Disturbed(partial(fits, most)), failures=2)
    assert "cramped: micro-batches of at most 4, as larger ones did not fit" in said
    assert "cramped: micro-batches of at most 2, as larger ones did not fit" in said
    assert place.of("cramped").read("micro_batch") == b"2"
    ours, theirs = weights(place.of("cramped")), weights(place.of(quiet))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    logged, wanted = place.losses("cramped"), place.losses(quiet)
    assert [step for step, _ in logged] == [step for step, _ in wanted]
    assert all(abs(float(a) - float(b)) < 1e-5 for (_, a), (_, b) in zip(logged, wanted, strict=True))


def test_a_run_of_which_a_process_hangs_writes_down_where_and_goes_on_as_if_nothing_had_happened(
    place: drill.Place,
) -> None:
    quiet, patient = place.quiet(), place.config
    place.config = replace(patient, health=replace(patient.health, hang_seconds=15.0))
    try:
        said = place.run("hangs", drill.Disturbed(a_collective_that_never_returns), failures=1)
    finally:
        place.config = patient
    assert drill.went_on(said, "", drill.AT - drill.AT % drill.SAVE_EVERY).held
    stacks = {
        name: (place.of("hangs") / "stacks").read(name).decode() for name in (place.of("hangs") / "stacks").sizes()
    }
    assert all(re.match(r"no step for 15 s after step 2[12]\n", text) for text in stacks.values())
    (hung,) = (text for name, text in stacks.items() if name.endswith("-1.txt"))
    assert "a_collective_that_never_returns" in hung
    assert all(finding.held for finding in drill.compared(place, "hangs", quiet))


# --- a submitted job that is stopped --------------------------------------------------------------------------------


class Submitted:
    """`ray job submit … -- python jobs/pretrain.py` on the Ray of this environment."""

    def __init__(self, environment: dict[str, str], place: Path, name: str, number: int, **changes: object) -> None:
        self._environment, self.id, self.run = environment, f"{name}-{number}", Folder(str(place / "runs")) / name
        told = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "120", "MLFLOW_TRACKING_URI": store(place)}
        runtime = ["--working-dir", str(ROOT), "--runtime-env-json", json.dumps({"env_vars": told})]
        entry = ["python", "jobs/pretrain.py", *words(place, name, **changes)]
        self._ray("submit", "--no-wait", "--submission-id", self.id, *runtime, "--", *entry)

    def _ray(self, *arguments: str) -> str:
        command = [str(Path(sys.executable).with_name("ray")), "job", *arguments]
        ended = subprocess.run(command, env=self._environment, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def said(self) -> str:
        """What the job has printed so far."""
        return self._ray("logs", self.id)

    def go_on(self) -> int:
        """Return when there is a checkpoint of a later step than now; the step of the newest now."""
        before, limit = [0, *complete(self.run)][-1], time.monotonic() + 240
        while not any(step > before for step in complete(self.run)):
            assert time.monotonic() < limit, self.said()
            time.sleep(0.1)
        return before

    def stop(self) -> int:
        """Stop it; the step of the newest checkpoint after its end."""
        said = self._ray("stop", self.id)
        assert "was stopped" in said, said + self.said()
        assert "has saved and stopped: on demand" in self.said()
        return complete(self.run)[-1]


def test_a_job_that_is_stopped_has_saved_and_goes_on_from_there_with_what_is_changed_meanwhile(tmp_path: Path) -> None:
    tiny.shard_set(tmp_path / "set")
    # No checkpoint is due soon after the first, and no failure is forgiven: to be stopped is none.
    endless = {"duration": 10**6, "max_failures": 0, "optim__decay": "constant", "log_every": 1, "save_every": 50}
    endless["processes"] = 1  # which leaves a processor to what submits, stops and asks
    with demo.ray_head(tmp_path) as environment:
        first = Submitted(environment, tmp_path, "stopped", 1, **endless)
        first.go_on()
        saved = first.stop()
        second = Submitted(environment, tmp_path, "stopped", 2, **endless, change="optim.lr=1e-4")
        assert second.go_on() == saved
        limit = time.monotonic() + 240
        while max(losses(tmp_path, "stopped")) <= saved:  # MLflow takes seconds to begin with, the run fewer
            assert time.monotonic() < limit, second.said()
            time.sleep(0.1)
        last = second.stop()
        said = second.said()
    assert f"stopped: optim.lr=0.0001 from step {saved:,} on\n" in said
    assert f"stopped: goes on after step {saved:,} of" in said
    found = losses(tmp_path, "stopped")
    assert sorted(found) == list(range(1, last + 1)), "each step once"
    client = MlflowClient(store(tmp_path))
    experiment = client.get_experiment_by_name("vitscale")
    assert experiment
    (only,) = client.search_runs([experiment.experiment_id])
    assert only.info.status == "KILLED"
    assert json.loads(only.data.tags["vitscale.changes"]) == [{"step": saved, "optim.lr": 1e-4}]
    rates = {metric.step: metric.value for metric in client.get_metric_history(only.info.run_id, "lr")}
    assert {rate for step, rate in rates.items() if step > saved} == {1e-4}
    assert {rate for step, rate in rates.items() if 5 < step <= saved} == {4e-3}
