"""The processes that a test has started, and theirs: any of them may end while it is looked at, which is no mistake."""

import subprocess
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.gang import JobProcess


def family(of: int | None = None, name: str = "") -> list[psutil.Process]:
    """All that a process (this one, unless its id is given) has started, and what those have.

    Only those are meant that have the name in their command line, if one is given; who is dead and was not waited
    for has none.
    """
    return [one for one in psutil.Process(of).children(recursive=True) if not name or name in _command(one)]


def kill(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Kill processes; which of them were still there."""
    return [one for one in processes if _there(one) and _does(one, "kill")]


def suspend(processes: Iterable[psutil.Process]) -> None:
    """Let processes do nothing any more."""
    for one in processes:
        _does(one, "suspend")


def kill_run(driver: "JobProcess") -> None:
    """Kill a driver and the processes of its run, none of which does a step more."""
    workers = family(name="TrainWorker")
    suspend(workers)
    driver.kill()
    driver.wait()
    kill(workers)


def kill_all(leader: "subprocess.Popen | JobProcess") -> None:
    """Kill a process and its family, none of which does a thing more once the first of them is dead; wait for it."""
    if leader.poll() is None:
        others = family(leader.pid)
        suspend(others)
        leader.kill()
        kill(others)
    leader.wait()


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _there(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _does(process: psutil.Process, what: str) -> bool:
    with suppress(psutil.NoSuchProcess):
        getattr(process, what)()
        return True
    return False
