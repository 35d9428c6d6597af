"""A process that does nothing any more: noticed, written down, and ended, so that the run can start again."""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from shards.storage import Folder

STACKS = "stacks"
HUNG = 75
"""What a process ends with that hung: EX_TEMPFAIL, "try again", of BSD's sysexits."""
BEFORE_THE_FIRST = 4
"""So many times as long as a later step the first may take, which compiles and fills caches."""
SLOW = 1.5
WRITE_SECONDS = 60.0


class Watch:
    """Ends this process with `HUNG` when `seconds` have passed without a step; with 0 it never does.

    What each of its threads was doing is in `stacks/<attempt>-<rank>.txt` of the folder before. A thread sees to it,
    which works as long as what hangs does not hold Python's lock; collectives do not.
    """

    def __init__(
        self,
        folder: Folder,
        attempt: str,
        rank: int,
        seconds: float,
        *,
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.place, self.name, self.seconds = folder / STACKS, f"{attempt}-{rank}.txt", seconds
        self._end, self._clock = end, clock
        self._done, self._limit, self._last = 0, BEFORE_THE_FIRST * seconds, clock()
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._follow, name="watch", daemon=True).start()

    def step(self, done: int) -> None:
        """So many steps are done: the time begins anew."""
        self._done, self._limit, self._last = done, self.seconds, self._clock()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def left(self) -> float:
        """Seconds until it ends the process, if no step is done before."""
        return self._limit - (self._clock() - self._last)

    def _follow(self) -> None:
        while not self._closed.wait(max(0.0, self.left())):
            if self.left() <= 0:
                self._write_down()
                self._end(HUNG)
                return

    def _write_down(self) -> None:
        """Leave all stacks in the run's folder; a storage that hangs, too, is not waited for."""
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside) / self.name
            with path.open("w") as file:
                print(f"no step for {self._limit:g} s after step {self._done}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            text = path.read_bytes()
        writer = threading.Thread(target=lambda: self.place.write(self.name, text), daemon=True)
        writer.start()
        writer.join(WRITE_SECONDS)


def straggler(seconds: list[float]) -> int | None:
    """The process that took longest for its own work, where that is `SLOW` times the median of the others.

    `seconds[rank]` is the time of its steps outside of what all do together: there, everybody waits for the slowest.
    """
    if len(seconds) < 2:
        return None
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = median(seconds[:slowest] + seconds[slowest + 1 :])
    return slowest if seconds[slowest] > SLOW * others else None
