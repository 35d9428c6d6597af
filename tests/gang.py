"""A few processes that stay and do, all together, one thing after another: what takes long is to start them."""

import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.world import World


class Gang:
    """Processes that reach each other by gloo."""

    def __init__(self, size: int) -> None:
        self.size, self._aside = size, tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            place = f"file://{Path(self._aside.name) / 'meeting'}"
            process = context.Process(target=_serve, args=(rank, size, place, theirs), daemon=True)
            process.start()
            theirs.close()  # so that reading ends if the process does
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *given: Any) -> list[Any]:
        """What `function(world, *given)` returns in each process, by rank; AssertionError with what one raised."""
        for pipe in self._pipes:
            pipe.send((function, given))
        answers = [pipe.recv() for pipe in self._pipes]
        for good, answer in answers:
            assert good, answer
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._aside.cleanup()


def _serve(rank: int, size: int, place: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed insists
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size)
    while True:
        try:
            function, given = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(World(rank, size), *given))
        except Exception:
            answer = (False, f"process {rank}:\n{traceback.format_exc()}")
        pipe.send(answer)
