"""Leases: one of several processes, on any machines, does a thing; if it dies, another may after a while.

A lease `NAME` in a folder is a row of files, `NAME/1.json`, `NAME/2.json` and so on: its generations. Each was created
exclusively, by its holder, and says until when it holds; its holder alone writes it again, to say a later time or that
he is done. Only the newest counts, and a generation is never removed, so that of several who find it over exactly one
creates the next, however old their view of the folder is.

Clocks: `until` is by the holder's clock, who trusts in the lease only until then, and in a renewal only if its answer
came before the lease ended. Others wait `skew` seconds longer. So no two clocks that differ by at most `skew` ever make
two holders of one lease. If clocks differ by more, or a process sleeps between asking `held` and acting, two may act:
a lease saves doing a thing twice, while what must not exist twice has to be created exclusively as well.
"""

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from shards.storage import Folder

SKEW = 30.0


@dataclass(eq=False)
class Lease:
    """A lease of this process: `with lease:` keeps it renewed by a thread, and gives it back at the end."""

    folder: Folder
    generation: int
    seconds: float
    now: Callable[[], float] = time.time
    until: float = field(init=False, default=-math.inf)
    """When it ends by this machine's clock, unless it is renewed before."""
    holder: str = field(init=False)
    _stop: threading.Event = field(init=False, repr=False, default_factory=threading.Event)
    _thread: threading.Thread | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self.holder = f"{socket.gethostname()}, process {os.getpid()} ({uuid.uuid4().hex[:8]})"

    @property
    def held(self) -> bool:
        """Whether nobody else has it; once False it stays so."""
        return self.now() < self.until

    def renew(self) -> bool:
        """Hold it for `seconds` from now; False where it is lost, or is by the time that the store has answered."""
        if not (before := self.until) > (began := self.now()):
            return False
        self.folder.write(self._name, self._record(began + self.seconds))
        # Whoever looked before this was written, and after the old time, may have taken it.
        self.until = began + self.seconds if self.now() < before else -math.inf
        return self.held

    def release(self) -> None:
        """Give it back. Where the store does not answer, or it is lost, there is nothing to do: it ends by itself."""
        if self.held:
            self.until = -math.inf
            with suppress(OSError):
                self.folder.write(self._name, self._record(0.0))

    def __enter__(self) -> "Lease":
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread
        self._stop.set()
        self._thread.join()  # or a late renewal would undo the release
        self.release()

    def _keep(self) -> None:
        while not self._stop.wait(self.seconds / 3) and self.held:
            with suppress(OSError):  # perhaps the store is back before the lease ends
                self.renew()

    @property
    def _name(self) -> str:
        return f"{self.generation}.json"

    def _record(self, until: float) -> bytes:
        return json.dumps({"holder": self.holder, "until": until}).encode()

    def _create(self) -> bool:
        until = self.now() + self.seconds
        if self.folder.create(self._name, self._record(until)):
            self.until = until
        return self.held


def take(
    folder: Folder, name: str, seconds: float, *, now: Callable[[], float] = time.time, skew: float = SKEW
) -> Lease | None:
    """The lease `name` in `folder` for `seconds`, renewable; None where somebody else holds it.

    A lease that nobody ever had takes one operation of the store, one that was given back four. ValueError for a time
    that is not above 0, OSError where the store does not answer.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"a lease cannot be held for {seconds:g} seconds: give a number above 0, such as 60")
    first = Lease(folder / name, 1, seconds, now)
    if first._create():
        return first
    newest = _newest(first.folder)
    if newest is None or now() < _ends(newest[1], skew):
        return None
    following = Lease(first.folder, newest[0] + 1, seconds, now)
    return following if following._create() else None


def holder(folder: Folder, name: str) -> str:
    """Who has taken the lease last, for people to read; empty where nobody has, or it was given back."""
    newest = _newest(folder / name)
    return newest[1]["holder"] if newest and newest[1]["until"] else ""


def _ends(record: dict[str, Any], skew: float) -> float:
    """When others may take it; what was given back at once."""
    return record["until"] + skew if record["until"] else -math.inf


def _newest(row: Folder) -> tuple[int, dict[str, Any]] | None:
    """The newest generation and what it says; None where a store does not list it yet."""
    generations = [int(stem) for file in row.sizes() if (stem := file.removesuffix(".json")).isdecimal()]
    if not generations:
        return None
    newest = max(generations)
    return newest, json.loads(row.read(f"{newest}.json"))
