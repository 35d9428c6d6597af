"""Batches: the same pixels whatever the cluster, every picture once, damage named before it is used."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config import Config
from pipeline.data.cache import Cache
from pipeline.data.loader import Batch, feed
from pipeline.data.plan import Order
from pipeline.world import World
from shards.manifest import ShardSet
from tests import tiny

SET_SIZES = (7, 5, 11, 9)
ALONE = World()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return tiny.shard_set(tmp_path_factory.mktemp("feed") / "set", sizes=SET_SIZES)


def steps(shards: ShardSet, config: Config, world: World = ALONE, start: int = 0, end: int = 5) -> list[list[Batch]]:
    """The batches of each step of one process."""
    order = Order(tuple(shards.counts.tolist()), config.data.lanes, config.data.window, config.seed)
    made = list(feed(shards, config).training(config, order, world, start, end))
    passes = config.passes(world.size)
    return [made[i : i + passes] for i in range(0, len(made), passes)]


def pixels(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_cluster_does_not_change_the_pixels_of_a_step(shards: ShardSet, size: int, threads: int) -> None:
    config = tiny.config(shards)
    config = replace(config, data=replace(config.data, threads=threads), micro_batch=2)
    alone = steps(shards, tiny.config(shards))
    shares = [steps(shards, config, World(rank, size)) for rank in range(size)]
    for step, whole in enumerate(alone):
        parts = [batch for share in shares for batch in share[step]]
        assert torch.equal(pixels(parts), pixels(whole))
        for name in ("samples", "labels"):
            assert torch.equal(*(torch.cat([getattr(b, name) for b in many]) for many in (parts, whole)))


def test_to_begin_at_a_step_is_to_have_read_up_to_it_whatever_the_step(shards: ShardSet) -> None:
    whole = steps(shards, tiny.config(shards))
    for start in range(5):
        for ours, theirs in zip(steps(shards, tiny.config(shards), start=start), whole[start:], strict=True):
            assert torch.equal(pixels(ours), pixels(theirs))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_an_evaluation_looks_at_every_picture_once_whatever_the_processes(shards: ShardSet, size: int) -> None:
    config = tiny.config(shards)
    seen = [
        sample
        for rank in range(size)
        for batch in feed(shards, config).evaluation(World(rank, size), 4, crop=1.0)
        for sample in batch.samples.tolist()
    ]
    assert seen == list(range(sum(SET_SIZES)))


def test_every_label_belongs_to_its_picture(shards: ShardSet) -> None:
    for batch in feed(shards, tiny.config(shards)).evaluation(World(), 8, crop=1.0):
        assert batch.labels[:, 0].tolist() == [sample % 3 for sample in batch.samples.tolist()]
        brightness = batch.images.float().mean((1, 2, 3)) - 30
        assert (brightness / 95).round().long().tolist() == batch.labels[:, 0].tolist()


def test_every_damaged_shard_is_named_before_a_picture_of_it_is_used(tmp_path: Path) -> None:
    shards = tiny.shard_set(tmp_path / "set")
    broken = tmp_path / "set" / "000002.tar"
    data = bytearray(broken.read_bytes())
    data[700] ^= 1
    broken.write_bytes(data)
    with pytest.raises(ValueError, match=r"000002.tar is damaged"):
        list(feed(shards, tiny.config(shards)).evaluation(World(), 8, crop=1.0))


def test_every_copy_of_the_cache_is_whole_and_right(shards: ShardSet, tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=10**9)
    for shard in shards.manifest.shards:
        assert shards.folder.local
        assert cache.path(shards.folder, shard).read_bytes() == (shards.folder.local / shard.name).read_bytes()


def test_a_cache_refuses_what_has_another_digest_than_the_manifest_says(tmp_path: Path) -> None:
    shards = tiny.shard_set(tmp_path / "set")
    name = shards.manifest.shards[1].name
    (tmp_path / "set" / name).write_bytes(b"x" * shards.manifest.shards[1].bytes)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Cache(tmp_path / "cache", limit=10**9).path(shards.folder, shards.manifest.shards[1])
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_cache_keeps_to_its_limit_and_drops_what_was_used_longest_ago(shards: ShardSet, tmp_path: Path) -> None:
    size = shards.manifest.shards[0].bytes
    cache = Cache(tmp_path, limit=sum(s.bytes for s in shards.manifest.shards) - size // 2)
    first, *others = [cache.path(shards.folder, shard) for shard in shards.manifest.shards[:3]]
    for age, path in enumerate([*others, first]):  # the first was used last
        os.utime(path, (time.time() - 1000 + age,) * 2)
    cache.path(shards.folder, shards.manifest.shards[3])
    assert first.exists() and not others[0].exists() and others[1].exists()


def test_a_process_killed_while_it_fetches_keeps_nobody_waiting(shards: ShardSet, tmp_path: Path) -> None:
    shard = shards.manifest.shards[0]
    script = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "open(sys.argv[2], 'wb').write(b'half'); print('held', flush=True); time.sleep(100)"
    )
    lock, partial = tmp_path / f"{shard.sha256}.tar.lock", tmp_path / f"{shard.sha256}.partial"
    holder = subprocess.Popen([sys.executable, "-c", script, str(lock), str(partial)], stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    with pytest.raises(TimeoutError, match="fetched by another process"):
        Cache(tmp_path, limit=10**9, lock_seconds=0.2).path(shards.folder, shard)
    holder.kill()
    holder.wait()
    assert Cache(tmp_path, limit=10**9, lock_seconds=5).path(shards.folder, shard).stat().st_size == shard.bytes
