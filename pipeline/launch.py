"""A run on a Ray cluster: Ray Train starts its processes, and starts them again when one dies."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, ENOSPC, EROFS
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.train.run import Job
from shards.storage import Folder

POLL_SECONDS = 0.5
COLLECTIVE_SECONDS = 600


class Board:
    """Where the processes of a run leave lines for whoever started it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.hopeless = ""

    def say(self, line: str) -> None:
        """Leave a line."""
        self.lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        taken, self.lines = self.lines, []
        return taken

    def give_up(self, why: str) -> None:
        """Say that another start would fail as this one has."""
        self.hopeless = self.hopeless or why

    def why_given_up(self) -> str:
        """What was said so first, empty where nothing was."""
        return self.hopeless


def launch(job: Job, processes: int, *, gpus: bool, cpus_each: int, max_failures: int) -> None:
    """Run the job on so many processes to its end; RuntimeError where more than `max_failures` starts have failed.

    What the run holds decides where it goes on, so that a start after a failure needs nothing from the one before.
    """
    with _board() as board:
        trainer = _Trainer(
            _work,
            train_loop_config={"job": job, "board": board},
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=COLLECTIVE_SECONDS),
            scaling_config=ScalingConfig(
                num_workers=processes,
                use_gpu=gpus,
                resources_per_worker={"CPU": cpus_each, **({"GPU": 1} if gpus else {})},
            ),
            run_config=RunConfig(
                name="ray", **_storage(job.folder), failure_config=FailureConfig(max_failures=max_failures)
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise RuntimeError(f"{job.name} failed: {_cause(error)}") from error
        if why := ray.get(board.why_given_up.remote()):
            raise RuntimeError(f"{job.name} failed: {why}")


class _Trainer(TorchTrainer):
    """Ray's trainer, which in a Ray of our own does not wait for what only a shared one has."""

    def _create_default_callbacks(self) -> list[Any]:
        # A watcher asks the dashboard whether the run is alive, to give its resources back if not. A Ray of our own
        # has no dashboard and ends with the run, and stopping the watcher there takes twelve seconds each time.
        found = super()._create_default_callbacks()
        if "RAY_ADDRESS" in os.environ:
            return found
        return [callback for callback in found if type(callback).__name__ != "PlacementGroupCleanerCallback"]


def _work(settings: dict[str, Any]) -> None:
    """What Ray runs in each process."""
    import torch

    from pipeline.train.run import work
    from pipeline.world import World

    board = settings["board"]
    if ray.get(board.why_given_up.remote()):
        return
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), context.get_local_world_size())
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        work(settings["job"], world, device, lambda line: board.say.remote(line))
    except (ValueError, OSError) as error:
        # Ray starts whatever raises again. What is wrong with the data, the configuration or the disk will be wrong
        # then, too: the next start ends at once, and whoever waits for the run is told why.
        if isinstance(error, ValueError) or error.errno in (ENOSPC, EDQUOT, EROFS, EACCES):
            ray.get(board.give_up.remote(str(error)))
        raise


@contextmanager
def _board() -> Iterator[Any]:
    """A board whose lines are printed here as they come."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(POLL_SECONDS):
            for line in ray.get(board.take.remote()):
                print(line, flush=True)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join(10)
        for line in ray.get(board.take.remote()):
            print(line, flush=True)
        ray.kill(board)


def _storage(url: str) -> dict[str, Any]:
    """Where Ray Train keeps its own notes: in the run's folder, by the same door to buckets as everything else."""
    folder = Folder(url)
    if folder.local:
        return {"storage_path": str(folder.local)}
    import pyarrow.fs

    files, path = folder.place
    return {"storage_path": path, "storage_filesystem": pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files))}


def _cause(error: BaseException) -> str:
    """The last line of what went wrong in a process, without the frames around it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def has_gpus() -> bool:
    """Whether the cluster has any."""
    return ray.cluster_resources().get("GPU", 0) > 0
