"""Processes without the seconds that each takes to import torch, Ray or MLflow: all are forked from one."""

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.world import World

ROOT = Path(__file__).resolve().parents[1]
_FORKED = mp.get_context("forkserver")
_FORKED.set_forkserver_preload(["tests.preloaded", "tests.preloaded_ray"])


class Gang:
    """Processes that stay, reach each other by gloo, and do, all together, one thing after another."""

    def __init__(self, size: int) -> None:
        self.size, self._aside = size, tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = _FORKED.Pipe()
            place = f"file://{Path(self._aside.name) / 'meeting'}"
            process = _FORKED.Process(target=_serve, args=(rank, size, place, theirs), daemon=True)
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


def run_ranks(function: Callable[..., Any], *given: Any, size: int, seconds: float = 200.0) -> tuple[int, str]:
    """Call `function(world, *given)` in new processes, all of which are killed as soon as one has failed.

    Returns the exit code of the first that has failed, 0 if none has, and what all have printed.
    """
    with tempfile.TemporaryDirectory() as aside:
        place, output = f"file://{aside}/meeting", Path(aside) / "output"
        processes = [
            _FORKED.Process(target=_play, args=(rank, size, place, str(output), dict(os.environ), function, given))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            code = _first_failure(processes, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return code, output.read_text() if output.exists() else ""


_STARTED: WeakSet[BaseProcess] = WeakSet()


@atexit.register  # multiprocessing would wait for them
def kill_jobs() -> None:
    """Kill the jobs that a test has left."""
    for process in _STARTED:
        process.kill()


class JobProcess:
    """`python jobs/NAME WORDS` as a subprocess.Popen, but forked from what has imported all that a job needs."""

    def __init__(
        self, name: str | Path, *words: object, env: Mapping[str, str] = os.environ, cwd: Path | str = ROOT
    ) -> None:
        self.args = [str(ROOT / "jobs" / name), *map(str, words)]
        self._aside = tempfile.TemporaryDirectory()
        self._files = Path(self._aside.name, "output"), Path(self._aside.name, "errors")
        self._process = _FORKED.Process(target=_run_script, args=(self.args, self._files, dict(env), str(cwd)))
        self._process.start()
        _STARTED.add(self._process)
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it; those that it has started are left."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code, once it has ended; subprocess.TimeoutExpired where it has not in time."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, *self.said())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed on stdout and on stderr, once it has ended."""
        self.wait(timeout)
        return self.said()

    def said(self) -> tuple[str, str]:
        """What it has printed so far on stdout and on stderr."""
        output, errors = (path.read_text() if path.exists() else "" for path in self._files)
        return output, errors


def run_job(
    name: str | Path,
    *words: object,
    env: Mapping[str, str] = os.environ,
    cwd: Path | str = ROOT,
    timeout: float = 120.0,
) -> subprocess.CompletedProcess[str]:
    """Run `python jobs/NAME WORDS` as a JobProcess, which is killed where it takes too long."""
    process = JobProcess(name, *words, env=env, cwd=cwd)
    try:
        output, errors = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode or 0, output, errors)


def _run_script(argv: list[str], files: tuple[Path, Path], environment: dict[str, str], cwd: str) -> None:
    os.setsid()
    _send_output(*files)
    os.environ.clear()
    os.environ |= environment
    os.chdir(cwd)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process would leave them out, and a Ray that it has started
        sys.stdout.flush()
        sys.stderr.flush()


def _send_output(*files: Path | str) -> None:
    """Let stdout and stderr go to these files."""
    for number, file in enumerate(files, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)


def _first_failure(processes: list[BaseProcess], limit: float) -> int:
    while time.monotonic() < limit:
        codes = [process.exitcode for process in processes]
        if failed := [code for code in codes if code]:
            return failed[0]
        if None not in codes:
            return 0
        time.sleep(0.01)
    raise TimeoutError("the processes did not end in time")


def _play(
    rank: int,
    size: int,
    place: str,
    output: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    given: tuple[Any, ...],
) -> None:
    _send_output(output, output)
    os.environ |= environment
    _join(rank, size, place)
    function(World(rank, size), *given)


def _join(rank: int, size: int, place: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed insists
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size)


def _serve(rank: int, size: int, place: str, pipe: Connection) -> None:
    mp.set_sharing_strategy("file_system")
    _join(rank, size, place)
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
