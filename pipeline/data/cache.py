"""Local copies of remote shards: named by their digest, bounded in bytes, shared by all processes of a machine.

A copy appears under its name when it is whole, on the disk, and its digest is right. Who makes it holds a lock file
that the operating system releases when a process dies, so that a killed process blocks nobody. What was used within
the last minute is never removed; whoever goes on needing a copy says so now and then.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from threading import Lock

from filelock import FileLock, Timeout

from shards.storage import Folder, digest

HOME = Path.home() / ".cache" / "vitscale" / "shards"
"""Where copies are kept unless another folder is given."""
VERIFIED = HOME / "verified"
RECENT_SECONDS = 60.0

# What a file system answers that knows no locks: flock(2) and its relatives.
_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP))


class Cache:
    """About `limit` bytes of files under `folder` at the most; the ones used longest ago go first.

    OSError where the folder cannot be used: it says why, and what would do.
    """

    def __init__(self, folder: Path, limit: int, *, wait_seconds: float) -> None:
        self.folder, self.limit, self.wait_seconds = folder, limit, wait_seconds
        self.hits = self.misses = self.fetched = 0
        self._count = Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
        except OSError as error:
            raise self._explained(error) from error

    def path(self, source: Folder, name: str, wanted: str, size: int) -> Path:
        """A local file with the bytes of `name`, whose sha256 is `wanted`; `size` is what room is made for.

        What comes with another digest is fetched once more, then refused with ValueError. TimeoutError where another
        process has been fetching it for longer than `wait_seconds`.
        """
        target = self.target(name, wanted)
        if self.used(target):
            self._add(hits=1)
            return target
        with self._locked(target):
            if self.used(target):
                self._add(hits=1)
            else:
                self._add(misses=1)
                self._make_room(size)
                self._fetch(source, name, wanted, target)
        return target

    def target(self, name: str, wanted: str) -> Path:
        """Where the copy of a file with this sha256 is, or will be."""
        return self.folder / f"{wanted}{Path(name).suffix}"

    def used(self, target: Path) -> bool:
        """Say that a copy is needed now; False where there is none."""
        try:
            os.utime(target)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _locked(self, target: Path) -> Iterator[None]:
        # No other kind of lock: one that is a mere file outlives a killed process.
        lock = FileLock(f"{target}.lock", timeout=self.wait_seconds, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout as error:
            long = f"for more than {self.wait_seconds:g} s (data.wait_seconds)"
            raise TimeoutError(f"{target} has been fetched by another process {long}") from error
        except (OSError, NotImplementedError) as error:
            raise self._explained(error) from error
        try:
            yield
        finally:
            lock.release()

    def _fetch(self, source: Folder, name: str, wanted: str, target: Path) -> None:
        partial = target.with_suffix(".partial")  # only the holder of the lock writes it
        try:
            for _attempt in range(2):
                found = source.fetch(name, partial)
                self._add(fetched=partial.stat().st_size)
                if found == wanted:
                    os.replace(partial, target)
                    return
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}, though the manifest names it: put the very same file back and start again"
            ) from error
        except OSError as error:
            raise self._explained(error) from error
        finally:
            partial.unlink(missing_ok=True)
        raise ValueError(
            f"{source.absolute}/{name} is damaged or has been replaced: twice its digest was not that of the manifest"
        )

    def _make_room(self, needed: int) -> None:
        """Remove copies, oldest use first; whoever still reads one keeps it open and is not disturbed."""
        kept = sorted(self._copies())
        over = sum(size for _, size, _ in kept) + needed - self.limit
        over = max(over, needed - shutil.disk_usage(self.folder).free)
        recent = time.time() - RECENT_SECONDS  # what somebody has just asked for and may not have opened yet
        for used, size, path in kept:
            if over <= 0 or used > recent:
                return
            path.unlink(missing_ok=True)
            over -= size

    def _copies(self) -> Iterator[tuple[float, int, Path]]:
        """When each was last used, its bytes and its path."""
        for path in self.folder.iterdir():
            if path.suffix in (".tar", ".parquet"):
                try:
                    stat = path.stat()
                except FileNotFoundError:  # another process made room at the same time
                    continue
                yield stat.st_mtime, stat.st_size, path

    def _sweep(self) -> None:
        """Remove what killed processes have left half done."""
        for partial in self.folder.glob("*.partial"):
            for lock in self.folder.glob(f"{partial.stem}.*.lock"):
                try:
                    with FileLock(lock, timeout=0, fallback_to_soft=False):
                        partial.unlink(missing_ok=True)
                except Timeout:
                    pass  # somebody is at it

    def _explained(self, error: OSError | NotImplementedError) -> OSError:
        """The error with what would do, where it is the folder's and not the store's."""
        number = getattr(error, "errno", None)
        if number in _NO_LOCKS or isinstance(error, NotImplementedError):
            why = "is on a file system without locks, which the processes of a machine need to share it"
            return OSError(f"{self.folder} {why}: give data.cache a folder on a local disk")
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.folder).free / 1e9
            why = (
                f"has no space left ({free:.1f} GB): free some, lower data.cache_gigabytes, or give data.cache another"
            )
            return OSError(number, f"{self.folder} {why} folder")
        if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            why = f"cannot be written to ({os.strerror(number)}): give data.cache another folder"
            return OSError(number, f"{self.folder} {why}")
        return error if isinstance(error, OSError) else OSError(str(error))

    def _add(self, *, hits: int = 0, misses: int = 0, fetched: int = 0) -> None:
        with self._count:
            self.hits, self.misses, self.fetched = self.hits + hits, self.misses + misses, self.fetched + fetched


class Verified:
    """Which local files have been read and found right, so that a start need not read them again.

    A file counts while it has the size, the time of change and the place on the disk that it had then.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, path: Path, wanted: str) -> None:
        """ValueError unless the file's sha256 is `wanted`."""
        note, state = self.folder / sha256(os.fsencode(path.absolute())).hexdigest(), _state(path, wanted)
        try:
            if note.read_bytes() == state:
                return
        except OSError:
            pass
        if digest(path) != wanted:
            raise ValueError(f"{path} is damaged: its digest is not that of the manifest")
        self._write(note, state)

    def _write(self, note: Path, state: bytes) -> None:
        aside = note.with_name(f"{note.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(state)
            os.replace(aside, note)
        except OSError:
            pass  # then the next start reads the file once more


def _state(path: Path, wanted: str) -> bytes:
    stat = path.stat()
    return json.dumps(
        [str(path.absolute()), wanted, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    ).encode()
