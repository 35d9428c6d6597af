"""Batches: the same pixels whatever the cluster and the store, every picture once, damage named before it is used."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import Augment, Config, Data
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Batch, Feed
from pipeline.data.refused import Refused
from pipeline.objectives.classify import loss
from pipeline.train.evaluate import evaluate
from pipeline.train.objective import to_device
from pipeline.world import World
from shards.manifest import ShardSet
from shards.storage import Folder
from tests import tiny
from tests.faults import Fault, Faults

pytestmark = pytest.mark.timeout(120)

SET_SIZES = (7, 5, 11, 9)
CPU = torch.device("cpu")
ALL = Augment(layers=2, magnitude=9.0, mixup=0.8, cutmix=1.0, erase=0.5, repeats=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return tiny.shard_set(tmp_path_factory.mktemp("feed") / "set", sizes=SET_SIZES)


@pytest.fixture
def remote(shards: ShardSet, s3: str) -> Corpus:
    """The set in a bucket."""
    upload(shards, s3)
    return Corpus.open(s3)


def upload(shards: ShardSet, url: str) -> None:
    assert shards.folder.local
    for path in sorted(shards.folder.local.iterdir()):
        Folder(url).put(path, path.name)


def changed(config: Config, **data: Any) -> Config:
    return replace(config, data=replace(config.data, **data))


def steps(
    corpus: Corpus, config: Config, world: World | None = None, start: int = 0, end: int = 5
) -> list[list[Batch]]:
    """The batches of each step of one process."""
    feed = Feed(corpus, config, world)
    made = list(feed.training(start, end))
    feed.close()
    passes = config.passes(feed.world.size)
    return [made[i : i + passes] for i in range(0, len(made), passes)]


def given(batches: list[Batch]) -> list[Tensor]:
    """What the model is given: pictures, what they show, weights, numbers."""
    parts = [(to_device(batch, CPU, classes=3), batch.samples) for batch in batches]
    columns = ((one.images, one.shown, one.weights, samples) for one, samples in parts)
    return [torch.cat(column) for column in zip(*columns, strict=True)]


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(given(ours), given(theirs), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("augment", [Augment(), ALL], ids=["plain", "augmented"])
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_cluster_does_not_change_the_pixels_of_a_step(
    shards: ShardSet, size: int, threads: int, augment: Augment
) -> None:
    corpus, config = Corpus([shards]), replace(tiny.config(shards), augment=augment)
    alone = steps(corpus, replace(config, micro_batch=16))
    config = replace(changed(config, threads=threads), micro_batch=2)
    shares = [steps(corpus, config, World(rank, size)) for rank in range(size)]
    for step, whole in enumerate(alone):
        assert same([batch for share in shares for batch in share[step]], whole)


@pytest.mark.parametrize("gigabytes", [1.0, 0.0], ids=["cached", "direct"])
def test_the_store_does_not_change_the_pixels_of_a_step(
    shards: ShardSet, remote: Corpus, tmp_path: Path, gigabytes: float
) -> None:
    config = replace(tiny.config(shards), augment=ALL)
    from_bucket = steps(remote, changed(config, cache=str(tmp_path / "cache"), cache_gigabytes=gigabytes))
    for ours, theirs in zip(from_bucket, steps(Corpus([shards]), config), strict=True):
        assert same(ours, theirs)
    assert bool(list((tmp_path / "cache").glob("*.tar"))) == bool(gigabytes)


def test_to_begin_at_a_step_is_to_have_read_up_to_it_whatever_the_step(shards: ShardSet) -> None:
    corpus, config = Corpus([shards]), replace(tiny.config(shards), augment=ALL)
    whole = steps(corpus, config)
    for start in range(5):
        for ours, theirs in zip(steps(corpus, config, start=start), whole[start:], strict=True):
            assert same(ours, theirs)


def test_every_epoch_changes_a_picture_in_its_own_way(shards: ShardSet) -> None:
    config = replace(tiny.config(shards), augment=Augment(layers=2))
    seen: dict[int, list[Tensor]] = {}
    for batch in (batch for step in steps(Corpus([shards]), config, end=6) for batch in step):
        for sample, image in zip(batch.samples.tolist(), batch.images, strict=True):
            seen.setdefault(sample, []).append(image)
    assert all(len(images) == 3 for images in seen.values())
    assert sum(torch.equal(images[0], images[1]) for images in seen.values()) < len(seen) / 4


def test_every_copy_of_a_repeated_picture_is_cut_anew_and_most_are_in_one_step(shards: ShardSet) -> None:
    config = replace(tiny.config(shards), augment=Augment(repeats=3))
    seen: dict[tuple[int, int], list[Tensor]] = {}
    for step in steps(Corpus([shards]), config, end=6):
        here = [sample for batch in step for sample in batch.samples.tolist()]
        assert sum(here.count(sample) == 3 for sample in here) >= len(here) - 4
        for batch in step:
            for sample, epoch, image in zip(batch.samples.tolist(), batch.epochs.tolist(), batch.images, strict=True):
                seen.setdefault((sample, epoch // 3), []).append(image)
    assert len(seen) == 32 and all(len(images) == 3 for images in seen.values())
    alike = [torch.equal(a, b) for images in seen.values() for a, b in combinations(images, 2)]
    assert sum(alike) < len(alike) / 4


def test_what_is_read_encoded_is_what_training_decodes(shards: ShardSet) -> None:
    feed, corpus = Feed(Corpus([shards]), tiny.config(shards)), Corpus([shards])
    for batch, encoded in zip(feed.training(0, 4), feed.encoded(0, 4), strict=True):
        assert encoded.samples.tolist() == batch.samples.tolist()
        assert encoded.labels.tolist() == batch.labels.tolist()
        for sample, data in zip(encoded.samples, encoded.data, strict=True):
            shard, place = corpus.find(np.array([sample]))
            row = corpus.rows(int(shard[0])).slice(int(place[0]), 1).to_pylist()[0]
            assert shards.folder.local
            tar = (shards.folder.local / corpus.about(int(shard[0])).name).read_bytes()
            assert data == tar[row["offset"] : row["offset"] + row["size"]]


def test_sets_with_weights_come_by_their_weights_and_without_once_an_epoch(shards: ShardSet, tmp_path: Path) -> None:
    other = tiny.shard_set(tmp_path / "other", sizes=(40, 24))
    both, own = Corpus([shards, other]), sum(SET_SIZES)
    weighted = changed(tiny.config(shards), weights=(3.0, 1.0))
    for step in steps(both, weighted, end=10):
        numbers = torch.cat([batch.samples for batch in step])
        assert (numbers < own).sum() == 12 and (numbers >= own).sum() == 4
    seen = [s for step in steps(both, tiny.config(shards), end=6) for batch in step for s in batch.samples.tolist()]
    assert sorted(seen) == list(range(both.samples))


def test_sets_with_other_classes_do_not_go_together(shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has 2 classes, not 3"):
        Corpus([shards, tiny.shard_set(tmp_path / "two", classes=2)])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_an_evaluation_looks_at_every_picture_once_whatever_the_processes(shards: ShardSet, size: int) -> None:
    corpus, config = Corpus([shards]), tiny.config(shards)
    shares = [list(Feed(corpus, config, World(rank, size)).evaluation(4)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1, "a process that has done its share would leave others waiting"
    batches = [batch for share in shares for batch in share]
    assert {tuple(batch.images.shape) for batch in batches} == {(4, 12, 12, 3)}
    counted = [
        (sample, key)
        for batch in batches
        for sample, key, weight in zip(batch.samples.tolist(), batch.keys, batch.weights.tolist(), strict=True)
        if weight == 1
    ]
    assert counted == [(i, f"picture-{i:04}") for i in range(sum(SET_SIZES))]
    assert sum(float(batch.weights.sum()) for batch in batches) == sum(SET_SIZES)


def test_what_fills_a_batch_makes_no_model_better_or_worse(shards: ShardSet) -> None:
    corpus, config = Corpus([shards]), tiny.config(shards)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 12 * 12, 3))
    found = [
        evaluate(model, Feed(corpus, config).evaluation(batch), config, CPU, lambda sums: sums) for batch in (1, 7, 32)
    ]
    assert [each["count"] for each in found] == 3 * [sum(SET_SIZES)]
    assert found[0]["accuracy"] == found[1]["accuracy"] == found[2]["accuracy"]
    assert [each["loss"] for each in found] == pytest.approx(3 * [found[0]["loss"]], rel=1e-5)


def test_every_label_belongs_to_its_picture(shards: ShardSet) -> None:
    for batch in Feed(Corpus([shards]), tiny.config(shards)).evaluation(8):
        assert batch.labels[:, 0].tolist() == [sample % 3 for sample in batch.samples.tolist()]
        brightness = batch.images.float().mean((1, 2, 3)) - 30
        assert (brightness / 95).round().long().tolist() == batch.labels[:, 0].tolist()


def test_scaling_by_two_neighbours_is_not_scaling_by_all(shards: ShardSet) -> None:
    config = tiny.config(shards)
    config = replace(changed(config, crop_area=1.0), model=replace(config.model, image_size=4))
    both = [steps(Corpus([shards]), changed(config, scaling=how), end=1)[0][0] for how in ("antialiased", "bilinear")]
    assert (both[0].images.float() - both[1].images.float()).abs().mean() > 1
    assert both[0].images.float().std() < both[1].images.float().std(), "averaging leaves less noise"


# What cannot be used.


@pytest.fixture
def spoilt(tmp_path: Path) -> ShardSet:
    """A set with three pictures that are none: 2, 14 and 30."""
    return tiny.shard_set(tmp_path / "set", spoilt=(2, 14, 30))


def test_a_picture_that_cannot_be_decoded_is_left_out_and_named_once(spoilt: ShardSet, tmp_path: Path) -> None:
    corpus, config = Corpus([spoilt]), tiny.config(spoilt)
    folder, said = Folder(str(tmp_path / "refused")), list[str]()
    for _start in range(2):  # as if the run had been started again
        feed = Feed(corpus, config, refused=Refused(folder, 3, said.append))
        batches = list(feed.training(0, 6))
        assert feed.refused.count == 3
        out = {
            s for b in batches for s, weight in zip(b.samples.tolist(), b.weights.tolist(), strict=True) if not weight
        }
        assert out == {2, 14, 30}
    names = [json.loads(folder.read(name)) for name in sorted(folder.sizes())]
    assert [(one["sample"], one["key"]) for one in names] == [(i, f"picture-{i:04}") for i in (2, 14, 30)]
    assert len(said) == 3 and all("it is left out" in line for line in said)


def test_a_run_fails_when_more_pictures_are_refused_than_its_limit(spoilt: ShardSet, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "refused"))
    with pytest.raises(ValueError, match=r"with it 3 pictures are refused, more than data.refused_limit 2; .*refused"):
        list(Feed(Corpus([spoilt]), tiny.config(spoilt), refused=Refused(folder, 2)).training(0, 6))


def test_a_picture_left_out_leaves_the_gradient_as_if_it_had_not_been_there(spoilt: ShardSet) -> None:
    for batch in Feed(Corpus([spoilt]), tiny.config(spoilt)).training(0, 4):
        _, images, targets, weights, *_ = to_device(batch, CPU, classes=3)
        head = torch.randn(3, images[0].numel(), generator=torch.Generator().manual_seed(0), requires_grad=True)
        loss(images.flatten(1) @ head.T, targets, "softmax", 0.1, weights).backward()
        found, head.grad = head.grad, None
        kept = weights > 0
        (loss(images[kept].flatten(1) @ head.T, targets[kept], "softmax", 0.1) * kept.float().mean()).backward()
        assert found is not None and head.grad is not None
        torch.testing.assert_close(found, head.grad)


def test_an_evaluation_leaves_no_picture_out_in_silence(spoilt: ShardSet) -> None:
    with pytest.raises(ValueError, match=r"000000.tar: picture picture-0002: not a picture"):
        list(Feed(Corpus([spoilt]), tiny.config(spoilt)).evaluation(8))


def test_every_damaged_shard_is_named_before_a_picture_of_it_is_used(tmp_path: Path) -> None:
    shards = tiny.shard_set(tmp_path / "set")
    broken = tmp_path / "set" / "000002.tar"
    data = bytearray(broken.read_bytes())
    data[700] ^= 1
    broken.write_bytes(data)
    with pytest.raises(ValueError, match=r"000002.tar is damaged"):
        list(Feed(Corpus([shards]), tiny.config(shards)).evaluation(8))


def test_a_shard_that_changes_under_a_run_is_named(shards: ShardSet, tmp_path: Path) -> None:
    shards = tiny.shard_set(tmp_path / "set")
    feed = Feed(Corpus([shards]), tiny.config(shards))
    list(feed.training(0, 3))
    for shard in shards.manifest.shards:
        path = tmp_path / "set" / shard.name
        with path.open("r+b") as file:  # the very file that is open
            file.write(b"x" * shard.bytes)
    with pytest.raises(ValueError, match=r"00000\d.tar has been changed or removed while the run went on"):
        list(feed.training(3, 6))


def test_a_shard_that_is_removed_under_a_run_is_named(tmp_path: Path) -> None:
    shards = tiny.shard_set(tmp_path / "set")
    feed = Feed(Corpus([shards]), tiny.config(shards))
    (tmp_path / "set" / "000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"000001.tar does not exist any more.*put the very same file back"):
        list(feed.training(0, 6))


@pytest.mark.parametrize("gigabytes", [1.0, 0.0], ids=["cached", "direct"])
def test_a_shard_that_is_removed_from_a_store_is_named(
    shards: ShardSet, remote: Corpus, tmp_path: Path, gigabytes: float
) -> None:
    config = changed(tiny.config(shards), cache=str(tmp_path / "cache"), cache_gigabytes=gigabytes)
    feed = Feed(remote, config)
    remote.sets[0].folder.remove("000002.tar")
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/.*/000002.tar does not exist"):
        list(feed.training(0, 6))


def test_a_store_that_hangs_is_waited_for_no_longer_than_is_said(
    shards: ShardSet, faulty: tuple[str, Faults], tmp_path: Path
) -> None:
    url, faults = faulty
    upload(shards, url)
    corpus = Corpus.open(url)
    config = changed(tiny.config(shards), cache=str(tmp_path / "cache"), wait_seconds=1.5, patience_seconds=5.0)
    feed = Feed(corpus, config)
    faults.always(Fault.HANG)
    with pytest.raises(TimeoutError, match=r"no batch for 1.5 s \(data.wait_seconds\); it waits for s3://.*tar"):
        list(feed.training(0, 6))
    feed.close()
    faults.calm()


def test_a_store_with_faults_that_pass_changes_nothing(
    shards: ShardSet, faulty: tuple[str, Faults], tmp_path: Path
) -> None:
    url, faults = faulty
    upload(shards, url)
    for gigabytes in (1.0, 0.0):
        config = changed(tiny.config(shards), cache=str(tmp_path / "cache"), cache_gigabytes=gigabytes)
        feed = Feed(Corpus.open(url), config)
        before = feed.measures().retries
        faults.script(Fault.SLOW_DOWN, Fault.TRUNCATED, Fault.RESET, Fault.EXPIRED, Fault.SHORT, Fault.INTERNAL)
        quiet = steps(Corpus([shards]), tiny.config(shards), end=4)
        for ours, theirs in zip(feed.training(0, 4), (batch for step in quiet for batch in step), strict=True):
            assert same([ours], [theirs])
        assert feed.measures().retries > before
        feed.close()


def test_a_cache_that_cannot_hold_what_the_lanes_need_at_once_is_refused(
    shards: ShardSet, remote: Corpus, tmp_path: Path
) -> None:
    config = changed(tiny.config(shards), cache=str(tmp_path / "cache"), cache_gigabytes=1e-6)
    with pytest.raises(ValueError, match=r"its share of the cache is 0.0 GB: data.cache_gigabytes of 0.1 would do"):
        list(Feed(remote, config).training(0, 1))


def test_what_the_feed_measures_is_what_it_has_done(shards: ShardSet, remote: Corpus, tmp_path: Path) -> None:
    config = changed(tiny.config(shards), cache=str(tmp_path / "cache"))
    bytes_of = {s: n for s, n in enumerate(n for i in range(4) for n in remote.rows(i, ["size"])["size"].to_pylist())}
    for again in range(2):
        feed = Feed(remote, config)
        read = sum(bytes_of[s] for batch in feed.training(0, 4) for s in batch.samples.tolist())
        found = feed.measures()
        assert found.read == read and found.waited > 0
        tars = sum(shard.bytes for shard in shards.manifest.shards)
        index = Folder(remote.sets[0].folder.absolute).size("index.parquet")
        assert found.fetched == (0 if again else tars + (index or 0))
        assert found.misses == (0 if again else 5) and found.hits >= (5 if again else 0)
        feed.close()


BAD = [
    ({"unit": "steps", "duration": -1.0}, "duration is -1.0"),
    ({"data": {"fetches": 0}}, "data.fetches is 0; at least 1"),
    ({"data": {"threads": 0}}, "data.threads is 0; at least 1"),
    ({"data": {"wait_seconds": 0.0}}, "data.wait_seconds is 0.0; it is a time above 0"),
    ({"data": {"patience_seconds": float("nan")}}, "data.patience_seconds is nan"),
    ({"data": {"refused_limit": -1}}, "data.refused_limit is -1"),
    ({"augment": Augment(erase=1.5)}, "augment.erase is 1.5; it is a share"),
    ({"augment": Augment(layers=2, magnitude=15, space="deit")}, "augment.magnitude is 15; deit goes up to 10"),
    ({"augment": Augment(mixup=-1)}, "augment.mixup is -1"),
    ({"augment": Augment(mixup=1), "micro_batch": 1}, "mixup and cutmix take pictures two by two"),
    ({"augment": Augment(cutmix=1), "batch": 8}, "8 processes share a batch of 8"),
    ({"augment": Augment(repeats=0)}, "augment.repeats is 0; at least 1"),
    ({"augment": Augment(mixup=1, repeats=9)}, "themselves: it needs at least 9 lanes, of which there are 8"),
]


@pytest.mark.parametrize(("fields", "said"), BAD)
def test_what_a_feed_cannot_do_is_refused_before_it_begins(fields: dict[str, Any], said: str) -> None:
    config = Config(name="x", classes=3, batch=16, data=Data(lanes=8), zero=2)
    fields = {**fields, "data": replace(config.data, **fields.get("data", {}))}
    with pytest.raises(ValueError, match=said):
        replace(config, **fields).check(8)


def test_a_duration_is_the_same_in_every_unit() -> None:
    config = Config(name="x", classes=3, batch=16)
    for duration, unit in ((3.0, "epochs"), (3.0 * 160, "samples"), (30.0, "steps")):
        assert replace(config, duration=duration, unit=unit).steps(160) == 30
