"""A run on a Ray of several nodes goes on with whatever number of processes there is room for."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster

from jobs.pretrain import allowed, changes_of
from pipeline.launch import largest
from tests import tiny
from tests.process import repeat_undisturbed
from tests.test_launch import Driver

pytestmark = pytest.mark.timeout(600)


# --- numbers --------------------------------------------------------------------------------------------------------


def test_every_number_that_is_allowed_divides_the_lanes_and_every_other_is_left_out(tmp_path: Path) -> None:
    config = tiny.config(tiny.shard_set(tmp_path / "set"))  # of 8 lanes
    assert allowed(config, "2:8") == [2, 4, 8]
    assert allowed(config, "3:7") == [4]
    assert allowed(config, "4") == [4]
    for text, said in [
        ("5:7", "8 lanes divide over none of these numbers; they do over 1, 2, 4, 8"),
        ("8:2", "the smaller number goes first, 2:8"),
        ("3", "8 lanes do not divide over 3 processes: 2 or 4"),
        ("2:4:8", "as in 2:8, is needed"),
        ("many", "as in 2:8, is needed"),
        ("0", "at least 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            allowed(config, text)


def test_every_room_is_used_by_the_largest_number_that_fits() -> None:
    assert [largest([2, 4, 8], room) for room in range(10)] == [0, 0, 2, 2, 4, 4, 4, 4, 8, 8]


def test_every_change_is_a_field_and_a_number() -> None:
    assert changes_of(("optim.lr=3e-4", "optim.clip=10")) == {"optim.lr": 3e-4, "optim.clip": 10.0}
    with pytest.raises(ValueError, match=r"--change optim.lr=fast: a field and its number are needed"):
        changes_of(("optim.lr=fast",))


# --- nodes that come and go -----------------------------------------------------------------------------------------


class Elastic(Driver):
    """A run that has no end, on a cluster whose nodes are children of the test; its lines as they come."""

    def __init__(self, place: Path, name: str, cluster: Cluster, **changes: object) -> None:
        # Without dropout, which every process draws for itself.
        slow = {"micro_batch": 1, "optim__lr": 1e-5, "optim__decay": "constant", "log_every": 1, "resize_seconds": 1}
        slow["model__dropout"] = 0.0
        given: dict[str, object] = {**slow, "duration": 10**6, "tracking_uri": store(place), **changes}
        super().__init__(place, name, cluster=cluster.address, **given)

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self._process.said()[0]

    def wait_for(self, what: str | Callable[[], bool]) -> None:
        """Return when a line has said so, or when it is so."""
        limit = time.monotonic() + 240
        while True:
            ended = self._process.poll() is not None
            if what() if callable(what) else re.search(what, self.said):
                return
            assert not ended, "".join(self._process.said())
            assert time.monotonic() < limit, f"no {what} in {self.said}"
            time.sleep(0.05)

    def go_on(self) -> int:
        """Return when there is a checkpoint later than those there are now."""
        from pipeline.train.checkpoint import complete
        from shards.storage import Folder

        before = [0, *complete(Folder(str(self.folder)))][-1]
        self.wait_for_checkpoint(after=before)
        return before

    def stop(self) -> None:
        """Have it save and end."""
        self._process.send_signal(signal.SIGTERM)
        self.wait_for("has saved and stopped: on demand")
        assert self._process.wait(60) == 130


def store(place: Path) -> str:
    """Where MLflow is, which a run on a cluster has to be told."""
    return f"sqlite:///{place}/mlflow.db"


def losses(place: Path, name: str) -> dict[int, float]:
    """The loss of every step that MLflow holds, each of which it holds once."""
    client = MlflowClient(store(place))
    experiment = client.get_experiment_by_name("vitscale")
    assert experiment
    (only,) = client.search_runs([experiment.experiment_id], f"tags.`vitscale.run` = '{name}'")
    found = [(metric.step, metric.value) for metric in client.get_metric_history(only.info.run_id, "loss")]
    assert len(found) == len(dict(found)), "each step once"
    return dict(found)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes_and_with_more_as_if_they_had_always_been_as_many(
    tmp_path: Path, cluster: Cluster, slow_steps: None
) -> None:
    tiny.shard_set(tmp_path / "set")
    first = SimpleNamespace(kept=cluster.add_node(num_cpus=2), killed=cluster.add_node(num_cpus=2))
    driver = Elastic(tmp_path, "elastic", cluster, processes="1:4")
    driver.wait_for(r"elastic: on 4 processes")
    driver.go_on()
    cluster.remove_node(first.killed, allow_graceful=False)
    driver.wait_for(r"elastic: on 2 processes(.|\n)*goes on after step")
    driver.go_on()
    cluster.add_node(num_cpus=3)  # room for five
    driver.wait_for(r"on 2 processes(.|\n)*stopped: there is room for more processes\n(.|\n)*elastic: on 4 processes")
    driver.go_on()
    driver.stop()
    disturbed = losses(tmp_path, "elastic")
    steps = max(disturbed)
    assert sorted(disturbed) == list(range(1, steps + 1))
    half = steps / 2  # epochs of 32 pictures
    repeat_undisturbed(driver.run, tmp_path / "quiet", store(tmp_path), processes=1, duration=half)
    undisturbed = losses(tmp_path, "quiet")
    assert all(abs(undisturbed[step] - disturbed[step]) < 1e-5 for step in disturbed)
