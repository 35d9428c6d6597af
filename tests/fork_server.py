"""Forks workers of Ray from a process that has imported what they need, and what takes a new one seconds.

Ray's C++ reads the environment while it is imported, and that differs between jobs and between nodes: for each of
these the server forks one process, which imports Ray and forks the workers.
"""

import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 18
LOOK_SECONDS = 5.0


def serve(address: str) -> None:
    """Have a process forked for each message at this Unix socket, until killed."""
    importlib.import_module("tests.preloaded")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what is forked
    importers: dict[tuple[str, str], socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen(100)
        while True:
            asked, _ = server.accept()
            with asked:
                message, files, _, _ = socket.recv_fds(asked, MOST_BYTES, 3)
            environment = json.loads(message)[1]
            whose = environment["RAY_JOB_ID"], environment["RAY_RAYLET_PID"]
            try:
                socket.send_fds(importers[whose], [message], files)
            except (KeyError, BrokenPipeError):  # there is none yet, or it has ended with its node
                importers[whose] = _fork_importer(environment, [server, *importers.values()])
                socket.send_fds(importers[whose], [message], files)
            for file in files:
                os.close(file)


def _fork_importer(environment: dict[str, str], others: list[socket.socket]) -> socket.socket:
    """A process that has imported Ray in this environment, and forks a worker for each message."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        return ours
    for other in [ours, *others]:
        other.close()
    os.environ.clear()
    os.environ |= environment
    importlib.import_module("tests.preloaded_ray")
    while True:
        while not select.select([theirs], [], [], LOOK_SECONDS)[0]:
            if not Path("/proc", environment["RAY_RAYLET_PID"]).exists():
                os._exit(0)
        message, files, _, _ = socket.recv_fds(theirs, MOST_BYTES, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            theirs.close()
            _become_worker(*json.loads(message), files)
        for file in files:
            os.close(file)


def _become_worker(argv: list[str], environment: dict[str, str], cwd: str, files: list[int]) -> None:
    """Be the worker that Ray wanted to start; does not return."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ |= environment
        os.chdir(cwd)
        if pause := float(environment.get("VITSCALE_PAUSE", 0)):
            _pause_after_each_step(pause)
        _run_worker(argv)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _pause_after_each_step(seconds: float) -> None:
    """Let runs take longer, which leaves the processors to others while a test waits for what Ray does with one."""
    from pipeline.train.meter import Meter

    log = Meter.log

    def late(meter: Meter, done: int, values: dict[str, Any]) -> None:
        log(meter, done, values)
        time.sleep(seconds)

    Meter.log = late  # type: ignore[method-assign]


def _run_worker(argv: list[str]) -> None:
    """What Ray's setup_worker.py does, but for the new Python; a worker for another Python is one."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs
    from ray._private.workers import setup_worker

    known, rest = setup_worker.parser.parse_known_args(argv)
    context: Any = RuntimeEnvContext.deserialize(known.serialized_runtime_env_context or "{}")
    if context.py_executable != sys.executable or context.command_prefix or context.override_worker_entrypoint:
        os.execv(sys.executable, [sys.executable, setup_worker.__file__, *argv])
    update_envs(context.env_vars)
    sys.argv = rest
    sys.path[:1] = [str(Path(rest[0]).parent), *os.environ.get("PYTHONPATH", "").split(":")]
    runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
