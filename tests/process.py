"""One process of a small run, for torchrun: `python -m tests.process FOLDER URI MLFLOW_RUN [KILL_AT]`.

The run is the one that the folder's config.json describes. With KILL_AT, process 0 kills itself with SIGKILL after
that step, when a checkpoint due before it is complete.
"""

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from pipeline.config import from_dict
from pipeline.train import run
from pipeline.train.checkpoint import complete
from pipeline.train.folder import CONFIG, Job
from pipeline.world import World
from shards.storage import Folder


def main() -> None:
    folder, uri, mlflow_run, *kill_at = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    config = from_dict(json.loads(Folder(folder).read(CONFIG)))
    if kill_at and world.first:
        kill_after(int(kill_at[0]), Folder(folder), config.save_every)
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


if __name__ == "__main__":
    main()
