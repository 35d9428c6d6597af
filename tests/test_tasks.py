"""Tasks: which pictures they have, what is refused before anything runs, and the pictures of one in memory."""

import gzip
import io
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from pipeline.data.image import Pixels
from pipeline.transfer import pictures, tasks
from pipeline.transfer.pictures import Pictures, Room, joined, pictures_of, read
from pipeline.transfer.tasks import DEV, TEST, Part, Split, Task, check, find, named, roots
from shards import datasets
from shards.datasets import imagenet_real, imagenet_v2
from shards.datasets.imagenet1k import Devkit
from shards.manifest import INDEX, MANIFEST, SCHEMA, Manifest, ShardSet
from shards.pack import pack
from shards.sources import Origin, Picture, Ranges
from shards.storage import Folder

pytestmark = pytest.mark.timeout(300)

NAMES = ("cat", "dog", "owl")


def pixels(number: int, high: int = 9, wide: int = 7) -> Pixels:
    return np.random.default_rng(number).integers(0, 256, (high, wide, 3), np.uint8)


def sample(key: str, number: int, *labels: int, **size: int) -> Picture:
    return Picture(key, pixels(number, **size), labels)


def samples(split: str, labels: Iterable[int], first: int = 0) -> list[Picture]:
    """Pictures of these classes, of many sizes, that are in no other split."""
    return [
        sample(f"{split}-{n}", hash_of(split) + n, label, high=5 + n % 4, wide=6 + n % 3)
        for n, label in enumerate(labels, first)
    ]


def hash_of(word: str) -> int:
    return int.from_bytes(sha256(word.encode()).digest()[:4], "big")


def put(folder: Path, of: Sequence[Picture], classes: tuple[str, ...] = NAMES, per_shard: int = 8) -> ShardSet:
    """A shard set of these pictures in this order."""
    folder.mkdir(parents=True)
    made = []
    with pq.ParquetWriter(folder / INDEX, SCHEMA) as index:
        for number, first in enumerate(range(0, len(of), per_shard)):
            packed = pack(number, iter(of[first : first + per_shard]), folder / f"{number:06}.tar")
            index.write_table(packed.rows)
            made.append(packed.shard)
    digest = sha256((folder / INDEX).read_bytes()).hexdigest()
    (folder / MANIFEST).write_bytes(Manifest(folder.name, {}, classes, tuple(made), {INDEX: digest}, {}).to_json())
    return ShardSet(str(folder))


def spoilt(folder: Path, shard: int, offset: int, size: int) -> None:
    """The set again with a picture whose bytes are none, though the digests are right."""
    manifest = ShardSet(str(folder)).manifest
    tar = folder / manifest.shards[shard].name
    data = bytearray(tar.read_bytes())
    data[offset : offset + size] = b"x" * size
    tar.write_bytes(data)
    shards = list(manifest.shards)
    shards[shard] = replace(shards[shard], sha256=sha256(data).hexdigest())
    (folder / MANIFEST).write_bytes(replace(manifest, shards=tuple(shards)).to_json())


# --- which tasks there are ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(some.integers(0, 3_000_000), some.lists(some.integers(1, 99), unique=True, max_size=6).map(sorted))
def test_parts_that_adjoin_hold_every_picture_once_whatever_their_edges(samples: int, edges: list[int]) -> None:
    parts = [Part("train", first, last) for first, last in pairwise([0, *edges, 100])]
    numbers = [part.numbers(samples) for part in parts]
    assert (numbers[0].start, numbers[-1].stop) == (0, samples)
    assert all(one.stop == other.start for one, other in pairwise(numbers))
    for part, here in zip(parts, numbers, strict=True):
        assert abs(len(here) - samples * (part.last - part.first) / 100) < 1


def recipe(task: Task) -> datasets.Dataset:
    return datasets.find(task.dataset)


def overlap(one: Part, other: Part) -> bool:
    return one.split == other.split and max(one.first, other.first) < min(one.last, other.last)


@pytest.mark.parametrize("task", tasks.ALL, ids=lambda task: task.name)
def test_no_task_learns_from_what_it_is_judged_on_and_the_test_from_all_else(task: Task) -> None:
    roles = (task.learning, task.choosing, task.testing)
    for one, other in combinations(roles, 2):
        assert not any(overlap(a, b) for a in one for b in other)
    assert (task.training(DEV), task.judged(DEV)) == (task.learning, task.choosing)
    assert (set(task.training(TEST)), task.judged(TEST)) == ({*task.learning, *task.choosing}, task.testing)
    splits = {task.where(part).partition("/") for part in chain(*roles)}
    assert {name for name, _, _ in splits} == {task.dataset}
    assert {split for _, _, split in splits} <= set(recipe(task).splits)


def test_every_task_holds_back_as_much_as_the_paper_says() -> None:
    found = {}
    for task in (tasks.imagenet, tasks.cifar10, tasks.cifar100, tasks.pets, tasks.flowers):
        (learning,), (choosing,), (testing,) = task.learning, task.choosing, task.testing
        count = recipe(task).splits[learning.split] or 0
        assert (learning.split, learning.last, choosing.last) == (choosing.split, choosing.first, 100)
        counts = len(learning.numbers(count)), len(choosing.numbers(count)), recipe(task).splits[testing.split]
        found[task.name] = counts
    assert found == {
        "imagenet": (1_268_355, 12_812, 50_000),
        "cifar10": (49_000, 1_000, 10_000),
        "cifar100": (49_000, 1_000, 10_000),
        "pets": (3_312, 368, 3_669),
        "flowers": (918, 102, 6_149),
    }


# Classes and pictures of the test, as in Zhai et al. 2019, table 2, and their code.
VTAB = {
    "natural": {
        "caltech101": (102, 6_084),
        "cifar100": (100, 10_000),
        "dtd": (47, 1_880),
        "flowers": (102, 6_149),
        "pets": (37, 3_669),
        "sun397": (397, 21_750),
        "svhn": (10, 26_032),
    },
    "specialized": {
        "camelyon": (2, 32_768),
        "eurosat": (10, 5_400),
        "resisc45": (45, 6_300),
        "retinopathy": (5, 42_670),
    },
    "structured": {
        "clevr_count": (8, 15_000),
        "clevr_distance": (6, 15_000),
        "dmlab": (6, 22_735),
        "kitti": (4, 711),
        "dsprites_location": (16, 73_728),
        "dsprites_orientation": (16, 73_728),
        "smallnorb_azimuth": (18, 12_150),
        "smallnorb_elevation": (9, 12_150),
    },
}


def classes_of(task: Task) -> int:
    classes = recipe(task).classes
    return classes if isinstance(classes, int) else len(classes)


@pytest.mark.parametrize("group", VTAB)
def test_every_group_of_vtab_has_its_tasks_of_a_thousand_pictures(group: str) -> None:
    found = {}
    for task in named(group):
        splits = recipe(task).splits
        assert (task.group, task.kind) == (group, "memory") and task.drawn
        assert [splits[part.split] for part in (*task.learning, *task.choosing)] == [800, 200]
        found[task.name] = classes_of(task), splits[task.testing[0].split]
    assert found == {f"vtab_{name}": counts for name, counts in VTAB[group].items()}


def test_every_task_is_turned_and_cut_only_as_its_classes_allow() -> None:
    assert {task.name for task in tasks.ALL if not task.flip} == {
        "digits",
        "mnist",
        "fashion_offset",
        "vtab_dsprites_location",
        "vtab_dsprites_orientation",
        "vtab_smallnorb_azimuth",
    }
    assert {task.name for task in tasks.ALL if not task.crop} == {
        "fashion_offset",
        "vtab_clevr_count",
        "vtab_clevr_distance",
        "vtab_dmlab",
        "vtab_kitti",
        "vtab_dsprites_location",
    }


def test_only_imagenet_is_a_run_of_its_own_and_has_further_tests() -> None:
    assert [task.name for task in tasks.ALL if task.kind == "run" or task.also] == ["imagenet"]
    for _, where in tasks.imagenet.also:
        name, _, split = where.partition("/")
        assert split in datasets.find(name).splits and datasets.find(name).classes == classes_of(tasks.imagenet)


def test_every_task_has_one_name_and_every_group_only_tasks() -> None:
    names = [task.name for task in tasks.ALL]
    assert len(set(names)) == len(names) == 27 and not set(names) & set(tasks.GROUPS)
    assert all(set(group) <= set(tasks.ALL) for group in tasks.GROUPS.values())
    assert [len(tasks.GROUPS[name]) for name in ("vtab", "natural", "specialized", "structured")] == [19, 7, 4, 8]


words = some.lists(some.sampled_from([*tasks.GROUPS, *(task.name for task in tasks.ALL)]), min_size=1, max_size=5)


@settings(deadline=None)
@given(words)
def test_every_task_that_is_named_is_there_once_however_often(names: list[str]) -> None:
    found = named(", ".join(names))
    assert len(set(found)) == len(found)
    expected = [tasks.GROUPS.get(name) or tuple(task for task in tasks.ALL if task.name == name) for name in names]
    assert set(found) == set(chain(*expected)) and found[0] == expected[0][0]


@pytest.mark.parametrize("names", ["cats", "digits,cats", "cats,vtab", ""])
def test_a_word_that_is_no_task_is_told_with_those_there_are(names: str) -> None:
    with pytest.raises(ValueError, match=r"no task '(cats|)'; there are: digits, mnist, .*; and the groups vtab, "):
        named(names)


@pytest.mark.parametrize("task", tasks.ALL, ids=lambda task: task.name)
def test_every_task_says_how_its_data_are_made_and_how_big_they_are(task: Task, tmp_path: Path) -> None:
    made, big = tasks.made_by(task, str(tmp_path)), tasks.how_big(task)
    command, _, source = made.partition(" --source SOURCE, which is ")
    assert source == recipe(task).source
    wanted = set(recipe(task).splits)
    if "--split" in command:
        wanted = set(command.split("--split ")[1].split()[0].split(","))
    assert wanted == {task.where(part).partition("/")[2] for part in (*task.training(TEST), *task.testing)}
    assert command.startswith(f"python jobs/prepare.py {task.dataset} ")
    assert command.endswith(f" --to {tmp_path}")
    count = sum(recipe(task).splits[split] or 0 for split in wanted)
    size = tasks.KILOBYTES[task.dataset] * count
    assert big.startswith(f"{count:,} pictures, about ")
    number, unit = big.split("about ")[1].split()
    assert float(number) * {"MB": 1000, "GB": 1_000_000}[unit] == pytest.approx(size, rel=0.05)
    assert f"{task.name} " in tasks.table() and big in tasks.table()


# --- what is found, and what is wrong with it -----------------------------------------------------------------------

PLAIN = Task("plain", "things", (Part("train", 0, 80),), (Part("train", 80, 100),), (Part("test"),), True, True)
DRAWN = Task("drawn", "things", (Part("train800"),), (Part("val200"),), (Part("test"),), True, True)
FURTHER = replace(PLAIN, also=(("again", "others/val"),))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """`sets` with the task PLAIN: 20 pictures to learn from and choose by, 9 to test on."""
    put(tmp_path / "sets" / "things" / "train", samples("train", [n % 3 for n in range(20)]))
    put(tmp_path / "sets" / "things" / "test", samples("test", [n % 3 for n in range(9)]))
    return tmp_path / "sets"


def checked(data: Path, task: Task) -> tuple[str, ...]:
    return check(task, find(str(data), task))


def test_every_set_of_a_task_is_found_and_nothing_is_wrong_with_it(plain: Path) -> None:
    sets = find(str(plain), PLAIN)
    assert list(sets) == ["things/train", "things/test"] and checked(plain, PLAIN) == ()
    assert roots(sets) == tuple((name, ShardSet(str(plain / name)).manifest.root) for name in sets)


def test_a_further_test_is_looked_at_where_it_is_there(plain: Path) -> None:
    assert list(find(str(plain), FURTHER)) == ["things/train", "things/test"]
    others = [sample("other-0", 1, 0, 2), sample("other-1", 2, 1)]  # of which one has two classes
    put(plain / "others" / "val", others)
    assert list(find(str(plain), FURTHER)) == ["things/train", "things/test", "others/val"]
    assert checked(plain, FURTHER) == ()


def test_a_task_that_is_not_prepared_says_its_size_and_the_command(tmp_path: Path) -> None:
    said = "task digits is not prepared .*: 1,797 pictures, about .* MB; make it with: python jobs/prepare.py digits"
    with pytest.raises(ValueError, match=rf"{said} --to {tmp_path}$"):
        find(str(tmp_path), tasks.digits)
    put(tmp_path / "cifar10" / "train", samples("train", [0]))
    said = "task cifar10 is not prepared .*/cifar10/test.*: 60,000 pictures, .*prepare.py cifar10 --to .* --source"
    with pytest.raises(ValueError, match=said):
        find(str(tmp_path), tasks.cifar10)


def test_a_set_that_is_damaged_is_named(tmp_path: Path) -> None:
    for split in ("train800", "val200", "test"):
        put(tmp_path / "digits" / split, samples(split, range(3)))
    assert len(find(str(tmp_path), tasks.digits)) == 3
    (tmp_path / "digits" / "val200" / "000000.tar").unlink()
    with pytest.raises(ValueError, match=r"val200/000000\.tar is missing.*prepare\.py digits --to"):
        find(str(tmp_path), tasks.digits)


def changed(data: Path, split: str, of: Sequence[Picture], classes: tuple[str, ...] = NAMES) -> Path:
    """The sets with another one in place of a split, or one more."""
    if (data / split).exists():
        (data / split).rename(data.parent / "before")
    put(data / split, of, classes)
    return data


@pytest.mark.parametrize(
    ("split", "of", "classes", "said"),
    [
        ("things/test", [sample("a", 1, 0)], ("cat", "dog"), "things/test has 2 classes, not 3 as things/train"),
        ("things/test", [sample("a", 1, 0)], ("cat", "owl", "dog"), "class 1 'owl', in things/train it is 'dog'"),
        ("others/val", [sample("a", 1, 0)], ("cat",), "others/val has 1 classes, not 3 as things/train"),
        ("things/train", samples("t", [0, 1] * 9), NAMES, "1 of 3 classes, 'owl' the first, have no picture"),
        ("things/train", samples("t", [0, 1, 2]), NAMES, None),
        ("things/train", [sample("a", 1, 2)], NAMES, "things/train has too few pictures, 0 to 80 % of its 1 are none"),
        (
            "things/train",
            [*samples("t", [0, 1, 2]), sample("b", 1, 0, 1)],
            NAMES,
            "picture b .* has 2 classes, not one",
        ),
        ("things/train", [*samples("t", [0, 1, 2]), sample("b", 1)], NAMES, "picture b of .* has 0 classes, not one"),
        ("things/test", [sample("b", 1, 0, 2)], NAMES, None),  # right is who names one of them
        ("things/test", [sample("b", 1)], NAMES, "picture b of things/test has 0 classes, not one"),
        ("things/train", samples("t", [0, 1, 2, 3]), NAMES, "has pictures of class 3, there are 3 classes"),
        ("things/test", samples("train", [0]), NAMES, "picture train-0 .* to learn from and to test on"),
        ("things/test", samples("train", [1], first=19), NAMES, "train-19 .* to choose by and to test on"),
        ("others/val", samples("train", [2], first=2), NAMES, "train-2 of others/val is there both to learn from and"),
        ("others/val", samples("test", [2], first=2), NAMES, None),
        ("things/test", [sample("train-0", 1, 0)], NAMES, None),  # of the same name, but another picture
        ("things/test", [replace(samples("train", [0])[0], key="other")], NAMES, None),  # equal, as two may well be
    ],
)
def test_everything_that_is_wrong_with_a_task_is_named(
    plain: Path, split: str, of: list[Picture], classes: tuple[str, ...], said: str | None
) -> None:
    data = changed(plain, split, of, classes)
    if said is None:
        assert checked(data, FURTHER) == ()
        return
    with pytest.raises(ValueError, match=rf"task plain: .*{said}"):
        checked(data, FURTHER)


def test_pictures_of_one_name_and_length_are_the_same_only_if_every_byte_is(tmp_path: Path) -> None:
    grey = [Picture("grey", np.full((6, 8, 3), value, np.uint8), (0,)) for value in (100, 101)]
    for split, of in {"train800": grey[0], "val200": sample("a", 1, 0), "test": grey[1]}.items():
        put(tmp_path / "things" / split, [of], ("one",))
    sets = find(str(tmp_path), DRAWN)
    assert (
        len({str(sets[f"things/{split}"].rows(0).select(tasks._LIKE).to_pylist()) for split in ("train800", "test")})
        == 1
    )
    assert check(DRAWN, sets) == ()
    changed(tmp_path, "things/test", grey[:1], ("one",))
    with pytest.raises(ValueError, match="picture grey of things/test is there both to learn from and to test on"):
        checked(tmp_path, DRAWN)


def test_parts_of_one_set_that_overlap_are_refused(plain: Path) -> None:
    task = replace(PLAIN, choosing=(Part("train", 75, 100),))
    with pytest.raises(ValueError, match="picture train-15 of things/train is there both to learn from and to choose"):
        checked(plain, task)


def test_a_class_that_a_thousand_drawn_pictures_leave_out_is_said_and_not_refused(tmp_path: Path) -> None:
    for split, labels in {"train800": [0, 2, 2], "val200": [0], "test": [0, 1, 2]}.items():
        put(tmp_path / "things" / split, samples(split, labels))
    (line,) = checked(tmp_path, DRAWN)
    assert line == "task drawn: 1 of 3 classes, 'dog' the first, have no picture to learn from"


# --- pictures in memory ---------------------------------------------------------------------------------------------


@pytest.fixture
def stored(plain: Path) -> tuple[list[tuple[ShardSet, Part]], list[Picture]]:
    """Two parts of one set and one of another, with a picture of several labels; and what they hold."""
    others = [sample("other-0", 1, 0, 2, high=12), sample("other-1", 2, 1)]
    train, further = ShardSet(str(plain / "things" / "train")), put(plain / "others" / "val", others)
    own = samples("train", [n % 3 for n in range(20)])
    parts = [(train, Part("train", 80, 100)), (further, Part("val")), (train, Part("train", 0, 20))]
    return parts, [*own[16:], *others, *own[:4]]


def same(found: Pictures, expected: Sequence[Picture]) -> bool:
    images = [found.image(i) for i in range(len(found))]
    return len(found) == len(expected) and all(map(np.array_equal, images, (p.data for p in expected)))


@pytest.mark.parametrize("budget", [0, 300, 1_000, 2_000, 3_000, 1 << 20])
def test_every_picture_is_the_same_whatever_the_memory(
    stored: tuple[list[tuple[ShardSet, Part]], list[Picture]], budget: int
) -> None:
    parts, expected = stored
    found = read(parts, budget)
    assert same(found, expected) and same(found, expected)
    assert found.keys == [picture.key for picture in expected]
    assert [[label for label in labels if label >= 0] for labels in found.labels.tolist()] == [
        list(picture.labels) for picture in expected
    ]
    width, height = found.sizes
    assert list(zip(height, width, strict=True)) == [np.shape(picture.data)[:2] for picture in expected]


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each reading fetched, from now on."""
    counts: list[int] = []
    whole = pictures.Reader.bytes
    monkeypatch.setattr(
        pictures.Reader, "bytes", lambda self, picks, rows: counts.append(len(picks.shard)) or whole(self, picks, rows)
    )
    return counts


def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each picture that is decoded from now on."""
    sizes: list[int] = []
    whole = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda data: sizes.append(len(data)) or whole(data))
    return sizes


def passed(found: Pictures) -> None:
    for i in range(len(found)):
        found.image(i)


def test_what_fits_is_kept_decoded_else_encoded_else_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = [Picture(f"flat-{n}", np.full((40, 40, 3), n, np.uint8), (0,)) for n in range(20)]  # of few bytes
    train = put(tmp_path / "flat", flat, per_shard=20)
    encoded = sum(train.rows(0)["size"].to_pylist())
    decoded = 20 * 40 * 40 * 3
    assert encoded < decoded / 4
    fetched, made = reads(monkeypatch), decodings(monkeypatch)

    def second_pass(budget: int) -> tuple[int, int]:
        found = read([(train, Part("train"))], budget)
        passed(found)
        fetched.clear()
        made.clear()
        passed(found)
        return sum(fetched), len(made)

    assert second_pass(decoded) == (0, 0)
    fewer = second_pass(decoded // 2)
    assert fewer[0] == 0 < fewer[1] < 20
    assert second_pass(encoded) == (0, 20)
    some_kept = second_pass(encoded // 2)
    assert 0 < some_kept[0] < 20 and some_kept[1] == 20
    assert second_pass(0) == (20, 20)


@settings(deadline=None)
@given(some.integers(0, 9_000), some.lists(some.integers(1, 900), max_size=30), some.integers(0, 9_000))
def test_no_more_memory_is_taken_than_there_is(budget: int, sizes: list[int], most: int) -> None:
    room = Room(budget)
    fit = room.take(np.array(sizes, np.int64), most)
    taken = sum(sizes[:fit])
    assert taken <= min(budget, most) and room.left == budget - taken
    assert fit == len(sizes) or taken + sizes[fit] > min(budget, most)
    room.give(taken)
    assert room.left == budget


def test_every_thread_gets_the_right_picture(
    stored: tuple[list[tuple[ShardSet, Part]], list[Picture]],
) -> None:
    parts, expected = stored
    for budget in (0, 2_000, 1 << 20):
        found, order = read(parts, budget), np.random.default_rng(0).integers(0, len(expected), 400).tolist()
        with ThreadPoolExecutor(8) as pool:
            images = list(pool.map(found.image, order))
        assert all(np.array_equal(image, expected[i].data) for image, i in zip(images, order, strict=True))


def test_pictures_that_are_dropped_give_their_memory_back_and_can_still_be_had(plain: Path) -> None:
    train, room = ShardSet(str(plain / "things" / "train")), Room(1 << 20)
    found = pictures._Stored(train, Part("train")).pictures(room, room.left)
    passed(found)
    assert room.left == (1 << 20) - found.held < 1 << 20
    found.drop()
    assert (room.left, found.held) == (1 << 20, 0)
    assert same(found, samples("train", [n % 3 for n in range(20)]))


def test_a_picture_that_is_given_cannot_be_spoilt_for_others(plain: Path) -> None:
    found = read([(ShardSet(str(plain / "things" / "train")), Part("train"))], 1 << 20)
    with pytest.raises(ValueError, match="read-only"):
        found.image(0)[:] = 0


def test_pictures_from_memory_are_as_they_were_given() -> None:
    images = [pixels(n, high=3 + n) for n in range(4)]
    found = Pictures.of(images, [3, 1, 0, 2])
    assert found.labels.tolist() == [[3], [1], [0], [2]] and found.sizes[1].tolist() == [3, 4, 5, 6]
    assert all(map(np.array_equal, images, map(found.image, range(4))))
    assert joined([found, found]).image(5) is images[1]


def test_a_part_without_a_picture_is_refused(tmp_path: Path) -> None:
    small = put(tmp_path / "small", samples("train", [0, 1, 2]))
    with pytest.raises(ValueError, match="small has too few pictures: 98 to 99 % of them are none"):
        read([(small, Part("train", 98, 99))], 0)


def test_a_picture_that_cannot_be_decoded_is_named(plain: Path) -> None:
    row = ShardSet(str(plain / "things" / "test")).rows(0).to_pylist()[2]
    spoilt(plain / "things" / "test", 0, row["offset"], row["size"])
    found = read([(ShardSet(str(plain / "things" / "test")), Part("test"))], 1 << 20)
    found.image(1)
    with pytest.raises(ValueError, match="things/test, picture test-2: not a picture"):
        found.image(2)


def test_pictures_in_a_store_are_fetched_many_at_a_time(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Folder(f"memory://{plain.parent.name}")
    files, path = fsspec.core.url_to_fs(there.absolute)
    for file in (plain / "things" / "train").iterdir():
        files.pipe_file(f"{path}/{file.name}", file.read_bytes())
    fetched = reads(monkeypatch)
    found = read([(ShardSet(there.absolute), Part("train"))], 1 << 20)
    assert same(found, samples("train", [n % 3 for n in range(20)])) and fetched == [20]


# --- what a process keeps -------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> "pictures._Shelf":
    """A process that has no pictures yet."""
    made = pictures._Shelf()
    monkeypatch.setattr(pictures, "_shelf", made)
    return made


def wanted(data: Path, task: Task, split: Split) -> tuple[Pictures, Pictures]:
    known = roots(find(str(data), task))
    training, judged = (
        pictures_of(str(data), task, parts, known) for parts in (task.training(split), task.judged(split))
    )
    return training, judged


def test_every_picture_of_a_task_is_decoded_once_whichever_trials_there_are(
    plain: Path, shelf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = decodings(monkeypatch)
    for split in (DEV, TEST, DEV, TEST):
        for found in wanted(plain, PLAIN, split):
            passed(found)
    assert len(made) == 20 + 9
    training, judged = wanted(plain, PLAIN, TEST)
    assert same(training, samples("train", [n % 3 for n in range(20)]))
    assert same(judged, samples("test", [n % 3 for n in range(9)]))
    assert shelf.room.left == pictures.BUDGET - sum(part.held for part in shelf.parts.values())


def test_a_task_that_is_new_makes_room_for_itself_and_no_room_is_exceeded(plain: Path, shelf: Any) -> None:
    for split, count in {"train800": 8, "val200": 2, "test": 40}.items():
        put(plain / "drawn" / split, samples(f"drawn {split}".replace(" ", "-"), [n % 3 for n in range(count)]))
    other, shelf.room = replace(DRAWN, dataset="drawn"), Room(8_000)
    for task in (PLAIN, other, PLAIN, other):
        for split in (DEV, TEST):
            for found in wanted(plain, task, split):
                passed(found)
        assert shelf.room.left == 8_000 - sum(part.held for part in shelf.parts.values()) >= 0
        kept = {where for _, where, _, _ in shelf.parts}
        assert {task.where(part) for part in (*task.training(TEST), *task.testing)} <= kept
    assert len(shelf.parts) < 6  # of both tasks


@pytest.mark.parametrize("size", [0, 500, 2_000, 6_000, 100_000])
def test_no_part_takes_more_than_half_of_what_is_left_so_that_every_other_finds_room(
    plain: Path, shelf: Any, size: int
) -> None:
    known = roots(find(str(plain), PLAIN))
    shelf.room = Room(size)
    for part in (*PLAIN.testing, *PLAIN.learning, *PLAIN.choosing):
        before = shelf.room.left
        found = pictures_of(str(plain), PLAIN, [part], known)
        assert shelf.room.left == before - found.held >= before / 2


def test_pictures_of_sets_that_have_changed_are_refused(plain: Path, shelf: Any) -> None:
    known = tuple((name, "0" * 64) for name, _ in roots(find(str(plain), PLAIN)))
    with pytest.raises(ValueError, match="the shard set things/train has changed"):
        pictures_of(str(plain), PLAIN, PLAIN.learning, known)


def test_further_tests_are_had_by_their_sets(plain: Path, shelf: Any) -> None:
    others = [sample("other-0", 1, 0, 2), sample("other-1", 2, 1)]
    put(plain / "others" / "val", others)
    known = roots(find(str(plain), FURTHER))
    found = pictures_of(str(plain), FURTHER, [Part("others/val")], known)
    assert same(found, others) and found.labels.tolist() == [[0, 2], [1, -1]]


# --- the further tests of ImageNet ----------------------------------------------------------------------------------


@pytest.mark.skipif("VITSCALE_REAL_JSON" not in os.environ, reason="VITSCALE_REAL_JSON does not name ReaL's real.json")
def test_every_label_of_the_published_real_json_is_read() -> None:
    labels = imagenet_real.parse(Path(os.environ["VITSCALE_REAL_JSON"]).read_bytes())
    counts = np.bincount([len(some) for some in labels])
    assert counts.tolist() == [3_163, 39_394, 5_408, 1_319, 411, 161, 88, 41, 13, 2]
    assert counts[1:].sum() == imagenet_real.DATASET.splits["val"]
    assert labels[:4] == ((), (970, 795), (230, 231), (809,))


V2_CLASSES = 12  # so that the order of numbers is not that of words


def v2_files() -> dict[str, bytes]:
    """Two pictures a class, in the order of the names, as tars have it that were made from a folder."""
    files = {f"{number}/{name}.jpeg": f"{number} {name}".encode() for number in range(V2_CLASSES) for name in "ba"}
    return dict(sorted(files.items()))


def put_v2(folder: Path, packed: bool, files: Mapping[str, bytes]) -> Path:
    if not packed:
        for name, data in files.items():
            path = folder / imagenet_v2.FOLDER / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, data in files.items():
            header = tarfile.TarInfo(f"{imagenet_v2.FOLDER}/{name}")
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    folder.mkdir(exist_ok=True)
    (folder / imagenet_v2.ARCHIVE).write_bytes(gzip.compress(made.getvalue()))
    return folder


def v2(folder: Path, classes: tuple[str, ...] = ()) -> Ranges:
    dataset = replace(imagenet_v2.DATASET, classes=V2_CLASSES, splits={"test": 2 * V2_CLASSES})
    found = dataset.pictures("test", Origin(str(folder), Folder(str(folder / "down")), classes=classes))
    assert isinstance(found, Ranges)
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("told", ["classes", "devkit", "nothing"])
def test_every_picture_of_imagenet_v2_has_the_class_whose_number_its_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, told: str
) -> None:
    monkeypatch.setattr(imagenet_v2, "CLASSES", V2_CLASSES)
    wnids = tuple(f"n{number:03}" for number in range(V2_CLASSES))
    kit = Devkit(wnids, np.zeros(0, np.int64)) if told == "devkit" else None
    monkeypatch.setattr(imagenet_v2, "devkit", lambda folder: kit)
    found = v2(put_v2(tmp_path / "v2", packed, v2_files()), wnids if told == "classes" else ())
    assert found.classes == (() if told == "nothing" else wnids)
    rows = [(picture.key, picture.labels, picture.data) for picture in found]
    assert rows == [
        (f"{number}-{name}", (number,), f"{number} {name}".encode()) for number in range(V2_CLASSES) for name in "ab"
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_every_imagenet_v2_that_is_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(imagenet_v2, "CLASSES", V2_CLASSES)
    with pytest.raises(FileNotFoundError, match=r"holds neither imagenetv2-matched-frequency\.tar\.gz nor the folder"):
        v2(tmp_path)
    strange = put_v2(tmp_path / "strange", packed, {**v2_files(), "12/a.jpeg": b"x"})
    with pytest.raises(ValueError, match="has 1 classes that the class list of 12 does not have: 12"):
        v2(strange)
    few = put_v2(tmp_path / "few", packed, dict(list(v2_files().items())[:-1]))
    with pytest.raises(ValueError, match="imagenet_v2/test has 23 pictures, 24 expected"):
        v2(few)
