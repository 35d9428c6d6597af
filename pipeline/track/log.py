"""Metrics on their way to MLflow: nothing that was logged is lost, and no step stands there twice.

Training never waits for MLflow. A thread of its own sends; while the server is away it tries again and again, and
what has not been sent is kept with each checkpoint. A start of the run after a crash logs some steps again: what the
run already holds is not sent a second time. MLflow is imported on use, since importing it takes more than a second: of
the processes of a run one needs it, and that one in the thread that sends.
"""

import logging
import time
from collections import deque
from dataclasses import asdict, dataclass
from functools import cached_property
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "vitscale"
RunEnd = Literal["FINISHED", "FAILED", "KILLED"]
PAUSE_SECONDS = 2.0
GATHER_SECONDS = 5.0
MOST_METRICS = 1000  # what MLflow takes in one request


@dataclass(frozen=True)
class Record:
    """What was measured after `step` steps, at `timestamp` milliseconds since 1970."""

    step: int
    timestamp: int
    values: dict[str, float]


class Log:
    """Metrics of one MLflow run, which gets the `tags`; `unsent` is what an earlier start could not send.

    Nothing is logged at an earlier time than `not_before`, in milliseconds since 1970: the last that is known.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        unsent: list[dict[str, Any]],
        *,
        tags: dict[str, str] | None = None,
        not_before: int = 0,
    ) -> None:
        self.run_id = run_id
        self._uri = uri
        self._waiting = deque(Record(**record) for record in unsent)
        self._tags = tags or {}
        self._held: dict[str, set[int]] = {}
        self._added: dict[str, int] = {}
        self.latest = max([not_before, *(record.timestamp for record in self._waiting)])
        """When something was last logged."""
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._send_all, daemon=True, name="mlflow")
        self._thread.start()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Log `values` for `step`; returns at once.

        Steps only rise: what a run that went back measures a second time is not logged. Nor does the time fall,
        whatever the clock of the machine does.
        """
        with self._changed:
            values = {name: value for name, value in values.items() if step > self._added.get(name, -1)}
            self._added |= dict.fromkeys(values, step)
            if values:
                self.latest = max(self.latest, round(time.time() * 1000))
                self._waiting.append(Record(step, self.latest, values))
            self._changed.notify()

    def unsent(self, *, up_to: int | None = None) -> list[dict[str, Any]]:
        """What MLflow does not have yet, to be kept; with `up_to`, of the steps up to that one."""
        with self._changed:
            return [asdict(record) for record in self._waiting if up_to is None or record.step <= up_to]

    def close(self, seconds: float) -> list[dict[str, Any]]:
        """Give the sending so many seconds to finish; returns what is left unsent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)
        return self.unsent()

    @cached_property
    def _client(self) -> "MlflowClient":
        return client(self._uri)

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                # A request costs the same for one line as for ten, and its cost is taken from the training.
                self._changed.wait_for(lambda: self._closed, GATHER_SECONDS)
                sending = self._some()
            try:
                self._send(sending)
            except Exception:  # whatever it is, training goes on and the records stay
                time.sleep(PAUSE_SECONDS)
                continue
            with self._changed:
                for _ in sending:
                    self._waiting.popleft()

    def _some(self) -> list[Record]:
        """The first records, as many as one request can hold."""
        taken: list[Record] = []
        count = 0
        for record in self._waiting:
            count += len(record.values)
            if taken and count > MOST_METRICS:
                break
            taken.append(record)
        return taken

    def _send(self, records: list[Record]) -> None:
        """Send what the run does not hold yet. Sending the very same record twice does no harm: MLflow keeps one."""
        from mlflow.entities import Metric, RunTag

        if self._tags:
            self._client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in self._tags.items()])
            self._tags = {}
        metrics = [
            Metric(name, value, record.timestamp, record.step)
            for record in records
            for name, value in record.values.items()
            if record.step not in self._steps_of(name)
        ]
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)

    def _steps_of(self, name: str) -> set[int]:
        """Steps at which the run held the metric when this start began."""
        if name not in self._held:
            self._held[name] = {metric.step for metric in self._client.get_metric_history(self.run_id, name)}
        return self._held[name]


def client(uri: str) -> "MlflowClient":
    """A client that gives up on a server soon; whoever uses it tries again itself."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
    from mlflow.tracking import MlflowClient

    MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(1)
    MLFLOW_HTTP_REQUEST_TIMEOUT.set(10)
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # its tables are no news
    return MlflowClient(uri)


def begin(uri: str, name: str, tags: dict[str, str], params: dict[str, Any], *, same: str) -> str:
    """The id of the MLflow run whose tag `same` has the value in `tags`: found, or made with name, tags and params."""
    mlflow = client(uri)
    experiment = _experiment(mlflow)
    found = mlflow.search_runs([experiment], f"tags.`{same}` = '{tags[same]}'", max_results=1)
    if found:
        run_id, there = found[0].info.run_id, found[0].data.params
        mlflow.update_run(run_id, status="RUNNING")
        # A start that was killed at once may have left none of them.
        _add_params(mlflow, run_id, {key: value for key, value in params.items() if key not in there})
        return run_id
    run_id = mlflow.create_run(experiment, run_name=name, tags=tags).info.run_id
    _add_params(mlflow, run_id, params)
    return run_id


class Trials:
    """The children of a pretraining run in MLflow: each trial once.

    The run is the one that ended with this checkpoint (a digest), or else the one of `folder`, which may go on.
    """

    def __init__(self, uri: str, checkpoint: str, folder: str = "") -> None:
        self._client = client(uri)
        self._experiment = _experiment(self._client)
        found = self._find(f"tags.`vitscale.kind` = 'pretrain' and tags.`vitscale.checkpoint` = '{checkpoint}'")
        if not found and folder:
            found = self._find(f"tags.`vitscale.kind` = 'pretrain' and tags.`vitscale.folder` = '{folder}'")
        self.parent = found[0].info.run_id if found else ""
        children = self._find(f"tags.`mlflow.parentRunId` = '{self.parent}'") if self.parent else self._orphans()
        self._waiting: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {}
        self._there = {run.data.tags.get("vitscale.trial") for run in children if run.info.status == "FINISHED"}

    def add(self, name: str, title: str, params: dict[str, Any], metrics: dict[str, float]) -> None:
        """Log a trial's result, unless it is there; while MLflow is away it waits for the next call."""
        self._waiting[name] = (title, params, metrics)
        self.flush()

    def flush(self) -> int:
        """Log what waits; returns how many results MLflow does not take now."""
        from mlflow.exceptions import MlflowException

        for name, (title, params, metrics) in list(self._waiting.items()):
            try:
                self._log(name, title, params, metrics)
            except MlflowException:
                break
            del self._waiting[name]
        return len(self._waiting)

    def _log(self, name: str, title: str, params: dict[str, Any], metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        if name in self._there:
            return
        if run_id := self._begun(name, title):
            _add_params(self._client, run_id, params)
            now = round(time.time() * 1000)
            self._client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in metrics.items()])
            self._client.set_terminated(run_id)
        self._there.add(name)

    def _begun(self, name: str, title: str) -> str | None:
        """The trial's run, found or made; None where another driver has finished it or was first to make one."""
        if found := self._of(name):
            return None if found[0].info.status == "FINISHED" else found[0].info.run_id
        tags = {"vitscale.kind": "trial", "vitscale.trial": name}
        if self.parent:
            tags["mlflow.parentRunId"] = self.parent
        run_id = self._client.create_run(self._experiment, run_name=title, tags=tags).info.run_id
        if self._of(name)[0].info.run_id == run_id:
            return run_id
        self._client.delete_run(run_id)
        return None

    def _of(self, name: str) -> list[Any]:
        """The runs of a trial under this parent, those that are finished first, then the earliest."""
        found = self._find(f"tags.`vitscale.trial` = '{name}'")
        found = [run for run in found if run.data.tags.get("mlflow.parentRunId", "") == self.parent]
        return sorted(found, key=lambda run: (run.info.status != "FINISHED", run.info.start_time, run.info.run_id))

    def _orphans(self) -> list[Any]:
        found = self._find("tags.`vitscale.kind` = 'trial'")
        return [run for run in found if "mlflow.parentRunId" not in run.data.tags]

    def _find(self, query: str) -> list[Any]:
        found, token = [], None
        while True:
            page = self._client.search_runs([self._experiment], query, max_results=1000, page_token=token)
            found += page
            if not (token := page.token):
                return found


def end(uri: str, run_id: str, status: RunEnd = "FINISHED", *, tags: dict[str, str] | None = None) -> None:
    """Say in MLflow that a run has ended, and how; killed is one that was told to stop."""
    from mlflow.entities import RunTag

    mlflow = client(uri)
    if tags:
        mlflow.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    mlflow.set_terminated(run_id, status)


def _add_params(mlflow: "MlflowClient", run_id: str, params: dict[str, Any]) -> None:
    from mlflow.entities import Param

    mlflow.log_batch(run_id, params=[Param(key, str(value)[:500]) for key, value in params.items()])


def _experiment(mlflow: "MlflowClient") -> str:
    from mlflow.exceptions import MlflowException

    if found := mlflow.get_experiment_by_name(EXPERIMENT):
        return found.experiment_id
    try:
        return mlflow.create_experiment(EXPERIMENT)
    except MlflowException:  # somebody else has just made it
        found = mlflow.get_experiment_by_name(EXPERIMENT)
        if not found:
            raise
        return found.experiment_id
