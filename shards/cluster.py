"""The Ray that a job runs on: the one it was submitted to, or one of its own on this machine."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

# What a job was told through its environment and its workers have to know too.
PASSED_ON = (
    "MLFLOW_TRACKING_URI",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "DS_ACCELERATOR",
    "VITSCALE_CODE",
)

RETRIES = 8
"""How often a task may lose its process, its machine or its storage before a job is given up."""


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS`, which a submitted job has set; without it, start a Ray on this machine.

    Workers import the packages from where this process has them, unless the job brought a working directory.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What a submitted job was given reaches its workers already, and Ray refuses to be told a second time.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    passed = {n: os.environ[n] for n in PASSED_ON if n in os.environ and n not in job.get("env_vars", {})}
    if "working_dir" not in job:
        root = str(Path(__file__).resolve().parents[1])
        passed["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"runtime_env": {"env_vars": passed}, "logging_level": logging.WARNING, "log_to_driver": False}
    if "RAY_ADDRESS" in os.environ:
        ray.init(os.environ["RAY_ADDRESS"], **settings)
    else:  # "local": never a Ray that somebody else happens to run on this machine
        # Ray warns that its tokens are on, which is what one wants.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        ray.init("local", include_dashboard=False, **settings)


def require(needed: Mapping[str, float], what: str, *, wait_s: float = 0.0) -> None:
    """Raise ValueError where the whole cluster has less than `needed`, even when nothing else runs on it.

    A cluster that grows on demand is given `wait_s` seconds to show what it can have.
    """
    limit = time.monotonic() + wait_s
    while True:
        there = ray.cluster_resources()
        short = {name: amount for name, amount in needed.items() if there.get(name, 0) < amount}
        if not short:
            return
        if time.monotonic() >= limit:
            asked = ", ".join(f"{amount:g} {name}" for name, amount in needed.items())
            has = ", ".join(f"{there.get(name, 0):g} {name}" for name in needed)
            raise ValueError(f"{what} needs {asked}; the cluster has {has}")
        time.sleep(min(1.0, wait_s))


def each(
    work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, cpus: float = 1.0, every: float = 1.0
) -> Iterator[list[Any]]:
    """What `work(*argument)` returns for each argument, in the order in which tasks end.

    Yields at least once in `every` seconds, an empty list where nothing has ended. Twice as many tasks as there is
    room for are submitted, so that arguments are made no sooner than needed. A task whose machine or storage failed is
    run again, several times; what `work` itself raises is raised here, and the other tasks are cancelled.
    """
    for ended in _each(work, arguments, cpus, every):
        yield [result for _, result in ended]


def mapped(work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """The same, in the order of the arguments."""
    connect()
    early: dict[int, Any] = {}
    due = 0
    for ended in _each(work, arguments, 1.0, 1.0):
        early.update(ended)
        while due in early:
            yield early.pop(due)
            due += 1


def _each(
    work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], cpus: float, every: float
) -> Iterator[list[tuple[int, Any]]]:
    """Number and result of each task, as they end."""
    options = {"num_cpus": cpus, "max_retries": RETRIES, "retry_exceptions": [OSError], "scheduling_strategy": "SPREAD"}
    task: Any = ray.remote(**options)(_guarded)
    left = enumerate(arguments)
    running: dict[Any, int] = {}
    try:
        while True:
            room = max(2, round(2 * ray.cluster_resources().get("CPU", 1.0) / cpus))
            for number, argument in islice(left, max(0, room - len(running))):
                running[task.remote(work, argument)] = number
            if not running:
                return
            ended, _ = ray.wait(list(running), num_returns=1, timeout=every)
            yield [(running.pop(reference), _result(reference)) for reference in ended]
    finally:
        for reference in running:
            ray.cancel(reference)


@dataclass(frozen=True)
class _Fault:
    """What a task raised, where another try would raise it again."""

    error: Exception


def _guarded(work: Callable[..., Any], argument: tuple[Any, ...]) -> Any:
    try:
        return work(*argument)
    except (ValueError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        return _Fault(error)


def _result(reference: Any) -> Any:
    try:
        found = ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    if isinstance(found, _Fault):
        raise found.error
    return found
