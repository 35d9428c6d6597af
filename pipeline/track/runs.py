"""MLflow's reading door: every run of an experiment as plain values.

MLflow is imported on use, since importing it costs more than a second. Nothing here sets MLflow's global state.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

KIND = "vitscale.kind"
"""Tag that says what a run is: `pretrain` or `trial`."""
PARENT = "mlflow.parentRunId"

_PAGE = 1000
_PATIENCE = 4.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


@dataclass(frozen=True)
class Point:
    """One logged value: after how many steps, what, when (milliseconds since 1970)."""

    step: int
    value: float
    timestamp: int


@dataclass(frozen=True)
class Run:
    """A run as it stands in MLflow; `metrics` by name, each ordered by step, one point a step."""

    id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, tuple[Point, ...]]


def tracking_uri(explicit: str | None) -> str:
    """Where MLflow is: `explicit`, else MLFLOW_TRACKING_URI, else a sqlite file in the home of a Ray of our own.

    ValueError where none of them says it: on a cluster (RAY_ADDRESS is set) workers on other machines could not see
    a file of this one. The file's folder is made.
    """
    if named := explicit or os.environ.get("MLFLOW_TRACKING_URI"):
        return named
    if "RAY_ADDRESS" in os.environ:
        raise ValueError(
            "where to log is not said: set MLFLOW_TRACKING_URI to a server, since workers on the cluster's other "
            "machines could not see a local file"
        )
    folder = Path.home() / ".local" / "share" / "vitscale"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def check(uri: str) -> None:
    """Raise ValueError within ten seconds where MLflow cannot be reached at `uri`.

    MLflow itself goes on trying for minutes before it says so.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme == "sqlite":
        _check_file(uri)
    elif scheme in ("http", "https"):
        _check_server(uri)
    elif scheme in _PORTS:
        _check_port(uri, _PORTS[scheme])
    elif not scheme.startswith("databricks"):
        raise ValueError(f"{uri!r} is no tracking URI: http://host:port or sqlite:////folder/mlflow.db would be")


def read(uri: str, experiment: str = "vitscale") -> list[Run]:
    """Every run of the experiment that has not been deleted, oldest first; none where there is no such experiment.

    Whole histories are read for pretraining runs only; of a trial every metric has its last point, which comes with
    the page that lists it, so that thousands of trials cost a few requests. ValueError where MLflow cannot be
    reached or refuses.
    """
    check(uri)
    if uri.startswith("sqlite") and not _sqlite_file(uri).exists():
        return []
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri)
    try:
        found = client.get_experiment_by_name(experiment)
        return [_run(client, run) for run in _pages(client, found.experiment_id)] if found else []
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri} refuses: {str(error).splitlines()[0]}") from error


def _pages(client: "MlflowClient", experiment: str) -> Iterator["MlflowRun"]:
    token = None
    while True:
        page = client.search_runs(
            [experiment], max_results=_PAGE, order_by=["attributes.start_time ASC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _run(client: "MlflowClient", run: "MlflowRun") -> Run:
    metrics = {metric.key: [_point(metric)] for metric in run.data.to_proto().metrics}
    if run.data.tags.get(KIND) == "pretrain":
        metrics = {key: [_point(m) for m in client.get_metric_history(run.info.run_id, key)] for key in metrics}
    return Run(
        id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics={key: _ordered(points) for key, points in metrics.items()},
    )


def _point(metric: Any) -> Point:
    return Point(metric.step, metric.value, metric.timestamp)


def _ordered(points: list[Point]) -> tuple[Point, ...]:
    """By step; of a step that was logged twice, what was logged last."""
    latest = {point.step: point for point in sorted(points, key=lambda point: point.timestamp)}
    return tuple(latest[step] for step in sorted(latest))


def _sqlite_file(uri: str) -> Path:
    return Path(uri.partition(":///")[2])


def _check_file(uri: str) -> None:
    file = _sqlite_file(uri)
    there = next(place for place in (file, *file.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK) or (there != file and not there.is_dir()):
        raise ValueError(
            f"{uri} cannot be written: {there} is not writable; set MLFLOW_TRACKING_URI to a place that is"
        )


def _check_server(uri: str) -> None:
    import requests
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        response = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "POST",
            json={"max_results": 1},
            timeout=_PATIENCE,
            max_retries=0,
            raise_on_status=False,
        )
    except (requests.RequestException, OSError) as error:
        raise _unreachable(uri, _cause(error)) from error
    except Exception as error:
        raise _unreachable(uri, str(error).splitlines()[0]) from error
    if response is None or not response.ok:
        raise _unreachable(
            uri, f"it answers {response.status_code} {response.reason}" if response is not None else "no answer"
        )


def _check_port(uri: str, port: int) -> None:
    parts = urlsplit(uri)
    try:
        socket.create_connection((parts.hostname or "", parts.port or port), timeout=_PATIENCE).close()
    except OSError as error:
        raise _unreachable(uri.replace(parts.password or "\0", "***"), str(error)) from error


def _cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error)


def _unreachable(uri: str, cause: str) -> ValueError:
    return ValueError(f"no MLflow server at {uri} ({cause}): start it, or correct MLFLOW_TRACKING_URI")
