"""Local copies: whole and right whoever is killed, bounded, shared, and no wait without a limit."""

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import cache as module
from pipeline.data.ahead import Ahead
from pipeline.data.cache import Cache, Verified
from pipeline.data.plan import Need, needed, order
from shards.manifest import Shard, ShardSet
from shards.storage import digest
from tests import tiny

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return tiny.shard_set(tmp_path_factory.mktemp("cache") / "set")


def cached(cache: Cache, shards: ShardSet, shard: Shard) -> Path:
    return cache.path(shards.folder, shard.name, shard.sha256, shard.bytes)


def test_every_copy_of_the_cache_is_whole_and_right(shards: ShardSet, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**9, wait_seconds=10)
    for _again in range(2):
        for shard in shards.manifest.shards:
            assert shards.folder.local
            assert cached(cache, shards, shard).read_bytes() == (shards.folder.local / shard.name).read_bytes()
    count = len(shards.manifest.shards)
    assert (cache.misses, cache.hits) == (count, count)


def test_a_copy_of_another_file_of_the_same_name_is_never_taken(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 10**9, wait_seconds=10)
    for side in (12, 16):
        shards = tiny.shard_set(tmp_path / f"set-{side}", side=side)
        for shard in shards.manifest.shards:
            assert digest(cached(cache, shards, shard)) == shard.sha256


def test_a_cache_refuses_what_has_another_digest_than_the_manifest_says(tmp_path: Path) -> None:
    shards = tiny.shard_set(tmp_path / "set")
    shard = shards.manifest.shards[1]
    (tmp_path / "set" / shard.name).write_bytes(b"x" * shard.bytes)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged or has been replaced"):
        cached(Cache(tmp_path / "cache", 10**9, wait_seconds=10), shards, shard)
    assert not list((tmp_path / "cache").glob("*.tar")) + list((tmp_path / "cache").glob("*.partial"))


@contextmanager
def server(folder: Path, wrong: int) -> Iterator[str]:
    """A web server whose first `wrong` answers for each tar have a wrong byte."""
    asked: dict[str, int] = {}

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(folder))

        def do_GET(self) -> None:
            data = bytearray((folder / self.path.lstrip("/")).read_bytes())
            if self.path.endswith(".tar"):
                asked[self.path] = asked.get(self.path, 0) + 1
                data[600] ^= asked[self.path] <= wrong
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *given: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


@pytest.mark.parametrize("wrong", [1, 2])
def test_what_comes_damaged_is_fetched_again_once_and_then_refused(
    shards: ShardSet, tmp_path: Path, wrong: int
) -> None:
    assert shards.folder.local
    shard = shards.manifest.shards[0]
    with server(shards.folder.local, wrong) as url:
        cache = Cache(tmp_path, 10**9, wait_seconds=10)
        from_web = module.Folder(url)
        if wrong == 1:
            path = cache.path(from_web, shard.name, shard.sha256, shard.bytes)
            assert sha256(path.read_bytes()).hexdigest() == shard.sha256
        else:
            with pytest.raises(ValueError, match=f"{url}/{shard.name} is damaged or has been replaced: twice"):
                cache.path(from_web, shard.name, shard.sha256, shard.bytes)


def test_a_cache_keeps_to_its_limit_and_drops_what_was_used_longest_ago(shards: ShardSet, tmp_path: Path) -> None:
    all_of_it = sum(s.bytes for s in shards.manifest.shards)
    cache = Cache(tmp_path, all_of_it - shards.manifest.shards[0].bytes // 2, wait_seconds=10)
    first, *others = [cached(cache, shards, shard) for shard in shards.manifest.shards[:3]]
    for age, path in enumerate([*others, first]):  # the first was used last
        os.utime(path, (time.time() - 1000 + age,) * 2)
    cached(cache, shards, shards.manifest.shards[3])
    assert first.exists() and not others[0].exists() and others[1].exists()


def test_what_was_used_just_now_is_never_dropped(shards: ShardSet, tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1, wait_seconds=10)
    paths = [cached(cache, shards, shard) for shard in shards.manifest.shards]
    assert all(path.exists() for path in paths)


def test_a_process_killed_while_it_fetches_keeps_nobody_waiting(shards: ShardSet, tmp_path: Path) -> None:
    shard = shards.manifest.shards[0]
    script = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "open(sys.argv[2], 'wb').write(b'half'); print('held', flush=True); time.sleep(100)"
    )
    lock, partial = tmp_path / f"{shard.sha256}.tar.lock", tmp_path / f"{shard.sha256}.partial"
    holder = subprocess.Popen([sys.executable, "-c", script, str(lock), str(partial)], stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    with pytest.raises(TimeoutError, match=r"fetched by another process for more than 0.2 s \(data.wait_seconds\)"):
        cached(Cache(tmp_path, 10**9, wait_seconds=0.2), shards, shard)
    assert partial.exists(), "what is being fetched is not swept away"
    holder.kill()
    holder.wait()
    Cache(tmp_path, 10**9, wait_seconds=5)
    assert not partial.exists(), "what a killed process left is swept away"
    assert cached(Cache(tmp_path, 10**9, wait_seconds=5), shards, shard).stat().st_size == shard.bytes


READ = """
import sys
from hashlib import sha256
from dataclasses import replace
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Feed
from shards.manifest import ShardSet
from tests import tiny
local, url, cache = sys.argv[1:]
config = tiny.config(ShardSet(local))
config = replace(config, data=replace(config.data, cache=cache))
feed, found = Feed(Corpus.open(url), config), sha256()
for batch in feed.training(0, 12):
    found.update(batch.images.numpy().tobytes())
feed.close()
print(found.hexdigest())
"""


@pytest.mark.slow
def test_killing_processes_that_share_a_cache_at_any_point_changes_nothing(
    shards: ShardSet, s3: str, tmp_path: Path
) -> None:
    local = shards.folder.local
    assert local
    for path in local.iterdir():
        module.Folder(s3).put(path, path.name)
    draw = random.Random(0)

    def begin(cache: Path) -> "subprocess.Popen[bytes]":
        words = [sys.executable, "-c", READ, str(local), s3, str(cache)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)

    began = time.monotonic()
    quiet = begin(tmp_path / "quiet").communicate()[0]
    whole = time.monotonic() - began
    for _kill in range(4):
        process = begin(tmp_path / "cache")
        time.sleep(whole * draw.uniform(0.4, 1))  # half of it is the start
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    both = [begin(tmp_path / "cache") for _ in range(2)]
    assert [process.communicate()[0] for process in both] == [quiet, quiet] and len(quiet) == 65


def full(*given: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_with_a_way_out(shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Folder, "fetch", full)
    with pytest.raises(
        OSError, match=r"has no space left \([\d.]+ GB\): free some, lower data.cache_gigabytes"
    ) as raised:
        cached(Cache(tmp_path, 10**9, wait_seconds=5), shards, shards.manifest.shards[0])
    assert raised.value.errno == errno.ENOSPC, "so that the run is not started again and again"


def test_a_disk_with_little_room_makes_copies_go_before_the_limit_does(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path, 10**9, wait_seconds=5)
    old = cached(cache, shards, shards.manifest.shards[0])
    os.utime(old, (time.time() - 1000,) * 2)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    cached(cache, shards, shards.manifest.shards[1])
    assert not old.exists()


def test_a_file_system_without_locks_is_said_with_a_way_out(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path, 10**9, wait_seconds=5)
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):

        def refuse(descriptor: int, how: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(
            OSError, match=r"is on a file system without locks, .* give data.cache a folder on a local disk"
        ):
            cached(cache, shards, shards.manifest.shards[0])


def test_a_folder_that_cannot_be_one_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"file/cache cannot be written to .*: give data.cache another folder"):
        Cache(tmp_path / "file" / "cache", 1, wait_seconds=5)


def test_a_file_found_right_is_not_read_again_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "file", list[Path]()
    path.write_bytes(b"right")
    digest = module.digest
    monkeypatch.setattr(module, "digest", lambda path: read.append(path) or digest(path))
    wanted = sha256(b"right").hexdigest()
    for _start in range(3):
        Verified(tmp_path / "notes").check(path, wanted)
    assert len(read) == 1
    path.write_bytes(b"wrong")
    for _start in range(2):
        with pytest.raises(ValueError, match="file is damaged"):
            Verified(tmp_path / "notes").check(path, wanted)
    assert len(read) == 3


def test_where_no_note_can_be_kept_files_are_read_each_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"right")
    for _start in range(2):
        Verified(path / "notes").check(path, sha256(b"right").hexdigest())


# Ahead of need.


class Store:
    """Prepares shards of equal size, when it is let."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.used: list[int] = []

    def ahead(self, needs: Iterator[Need], *, room: float, position: int = 0, reach: int = 10**9) -> Ahead:
        return Ahead(
            needs,
            size=lambda shard: 1,
            prepare=self.prepared.append,
            used=self.used.append,
            room=room,
            threads=1,
            position=position,
            reach=reach,
        )

    def settled(self) -> list[int]:
        """What has been prepared, once nothing is added any more."""
        before = -1
        while before != len(self.prepared):
            before = len(self.prepared)
            time.sleep(0.1)
        return list(self.prepared)


def test_shards_are_made_ready_in_the_order_of_need_as_far_as_there_is_room() -> None:
    laid = order([(10,) * 40], (), lanes=2, window=20, seed=0)
    wanted: list[int] = []
    for need, _ in zip(needed(laid, range(2), 0), range(30), strict=False):
        wanted += [shard for shard in need.shards.tolist() if shard not in wanted]
    store = Store()
    ahead = store.ahead(needed(laid, range(2), 0), room=8)
    assert store.settled() == wanted[:8]
    ahead.reached(40)  # two windows further
    later = store.settled()
    assert later == wanted[: len(later)] and len(later) > 8
    ahead.close()
    ahead.reached(80)
    assert store.settled() == later, "what is closed fetches no more"


def test_what_is_needed_at_once_is_made_ready_though_there_be_no_room() -> None:
    needs = iter([Need(0, 10, np.arange(5)), Need(10, 20, np.arange(5, 9))])
    store = Store()
    ahead = store.ahead(needs, room=2)
    assert store.settled() == [0, 1, 2, 3, 4]
    ahead.close()


def test_nothing_is_made_ready_beyond_the_reach() -> None:
    store = Store()
    ahead = store.ahead(iter([Need(0, 10, np.arange(2)), Need(30, 40, np.arange(2, 4))]), room=100, reach=20)
    assert store.settled() == [0, 1]
    ahead.reached(10)
    assert store.settled() == [0, 1, 2, 3]
    ahead.close()


def test_what_is_held_is_said_to_be_used_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.ahead.AGAIN_SECONDS", 0.05)
    store = Store()
    ahead = store.ahead(iter([Need(0, 10, np.arange(2)), Need(10, 20, np.arange(2, 9))]), room=2)
    while store.used.count(0) < 2 or store.used.count(1) < 2:
        time.sleep(0.01)
    assert set(store.used) == {0, 1}
    ahead.close()
