"""Local copies of remote shards: named by their digest, bounded in bytes, shared by all processes of a machine.

A copy appears under its name when it is whole and its digest is right. Who makes it holds a lock file that the
operating system releases when a process dies, so that a killed process blocks nobody.
"""

import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

from shards.manifest import Shard
from shards.storage import Folder, digest

LOCK_SECONDS = 1800.0


class Cache:
    """At most about `limit` bytes of shards under `folder`; the ones used longest ago go first."""

    def __init__(self, folder: Path, limit: int, *, lock_seconds: float = LOCK_SECONDS) -> None:
        self.folder, self.limit, self.lock_seconds = folder, limit, lock_seconds
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, source: Folder, shard: Shard) -> Path:
        """A local file with the bytes of `shard`; fetched once more if they are wrong, then ValueError."""
        target = self.folder / f"{shard.sha256}.tar"
        if not self._used(target):
            lock = FileLock(f"{target}.lock", timeout=self.lock_seconds)
            try:
                with lock:
                    if not target.exists():
                        self._make_room(shard.bytes)
                        self._fetch(source, shard, target)
            except Timeout as error:
                raise TimeoutError(
                    f"{target} has been fetched by another process for more than {self.lock_seconds:g} s"
                ) from error
        return target

    def _used(self, target: Path) -> bool:
        """Mark a copy as just used; False where there is none."""
        try:
            os.utime(target)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, source: Folder, shard: Shard, target: Path) -> None:
        partial = target.with_suffix(".partial")  # only the holder of the lock writes it
        for _attempt in range(2):
            source.get(shard.name, partial)
            if digest(partial) == shard.sha256:
                os.replace(partial, target)
                return
        partial.unlink(missing_ok=True)
        raise ValueError(f"{source.absolute}/{shard.name} is damaged: its digest is not that of the manifest")

    def _make_room(self, needed: int) -> None:
        """Remove copies, oldest use first; whoever still reads one keeps it open and is not disturbed."""
        kept: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("*.tar"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process made room at the same time
                continue
            kept.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in kept) + needed
        recent = time.time() - 60  # what somebody has just asked for and may not have opened yet
        for used, size, path in sorted(kept):
            if total <= self.limit or used > recent:
                return
            path.unlink(missing_ok=True)
            total -= size
