"""What each process of a small run does: the run that its folder's config.json describes."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.config import from_dict
from pipeline.track import log
from pipeline.train import run
from pipeline.train.checkpoint import complete
from pipeline.train.folder import ABOUT, CONFIG, Job, open_folder
from pipeline.world import World
from shards.storage import Folder
from tests.gang import run_ranks


def repeat_undisturbed(disturbed: Folder, to: Path, uri: str, *, processes: int, **changes: Any) -> Folder:
    """The same run once more, in the folder `to` and by forked processes, which nothing happens to."""
    config = replace(from_dict(json.loads(disturbed.read(CONFIG))), **changes)
    open_folder(config, str(to), json.loads(disturbed.read(ABOUT))["data"])
    tags = {"vitscale.folder": str(to), "vitscale.run": to.name}
    mlflow_run = log.begin(uri, to.name, tags, {}, same="vitscale.folder")
    code, output = run_ranks(play, str(to), uri, mlflow_run, None, size=processes)
    assert code == 0, output
    return Folder(str(to))


def play(world: World, folder: str, uri: str, mlflow_run: str, kill_at: int | None) -> None:
    """Train to the end; or, with `kill_at`, let process 0 kill itself after that step.

    It waits first for a checkpoint that is due before that step.
    """
    config = from_dict(json.loads(Folder(folder).read(CONFIG)))
    if kill_at is not None and world.first:
        kill_after(kill_at, Folder(folder), config.save_every)
    run.work(Job(config, folder, uri, mlflow_run, "tiny"), world, torch.device("cpu"), print)


def kill_after(step: int, folder: Folder, save_every: int) -> None:
    """Let the loop's log end the process."""
    log = run.Meter.log

    def deadly(meter: run.Meter, done: int, values: dict) -> None:
        log(meter, done, values)
        if done == step:
            while step > save_every and not complete(folder):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

    run.Meter.log = deadly  # type: ignore[method-assign]
