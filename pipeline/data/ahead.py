"""Shards made ready before they are needed: fetched into the cache, or local ones verified."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Condition, Thread

from pipeline.data.plan import Need

AGAIN_SECONDS = 20.0


class Ahead:
    """Calls `prepare` for the shards of `needs` in their order, as far ahead as `room` bytes hold.

    The shards of a window count from when they are asked for until the lane has left it; all that time `used` is
    called for them now and then, so that the cache keeps them. No more than `reach` pictures ahead of a lane are looked
    at. A shard that could not be prepared is left to who needs it, and who will be told why.
    """

    def __init__(
        self,
        needs: Iterator[Need],
        *,
        size: Callable[[int], int],
        prepare: Callable[[int], object],
        used: Callable[[int], object],
        room: float,
        threads: int,
        position: int,
        reach: int,
    ) -> None:
        self._needs, self._size, self._prepare, self._used = needs, size, prepare, used
        self._room, self._position, self._reach = room, position, reach
        self._held: dict[int, int] = {}  # shard: position at which no lane needs it any more
        self._closed, self._changed = False, Condition()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        self._thread = Thread(target=self._run, daemon=True, name="ahead")
        self._thread.start()

    def reached(self, position: int) -> None:
        """Say that the lanes stand at this position of their streams."""
        with self._changed:
            self._position = position
            self._changed.notify()

    def close(self) -> None:
        """Stop; what is being fetched is finished in the background."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        touched = time.monotonic()
        for need in self._needs:
            for shard in need.shards.tolist():
                while not self._may(need, shard):
                    with self._changed:
                        if self._closed:
                            return
                        self._changed.wait(AGAIN_SECONDS)
                    if time.monotonic() > touched + AGAIN_SECONDS:
                        touched = time.monotonic()
                        self._touch()
                self._take(shard, need.end)

    def _may(self, need: Need, shard: int) -> bool:
        """Whether it is time to prepare a shard."""
        with self._changed:
            if self._closed or need.start > self._position + self._reach:
                return False
            self._held = {one: end for one, end in self._held.items() if end > self._position}
            if shard in self._held or need.start <= self._position:
                return not self._closed
            return sum(map(self._size, self._held)) + self._size(shard) <= self._room

    def _take(self, shard: int, end: int) -> None:
        known = shard in self._held
        self._held[shard] = max(end, self._held.get(shard, 0))
        if not known:
            with suppress(RuntimeError):  # closed in the meantime
                self._pool.submit(self._try, shard)

    def _try(self, shard: int) -> None:
        with suppress(OSError, ValueError):
            self._prepare(shard)

    def _touch(self) -> None:
        for shard in list(self._held):
            self._used(shard)
