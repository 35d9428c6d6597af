"""Downstream tasks: which pictures are learnt from, chosen by and judged on, and what may be done to them.

Whole data sets hold a share of their training pictures back to choose by: 1 % of ImageNet, 2 % of CIFAR, 10 % of Pets
and Flowers (Dosovitskiy et al. 2021, appendix B.1.1). VTAB-1k's tasks have 800 pictures to learn from and 200 to choose
by, whatever their classes (Zhai et al. 2019, section 2.2). What is tested is learnt from both together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute

from shards.manifest import MANIFEST, ShardSet
from shards.storage import Folder

# Its functions are made when it is imported, where no type checker sees them.
pc: Any = pyarrow.compute

Split = Literal["dev", "test"]
DEV: Split = "dev"
TEST: Split = "test"
Group = Literal["", "natural", "specialized", "structured"]


@dataclass(frozen=True)
class Part:
    """The pictures from `first` to below `last` hundredths of a shard set, in its own order.

    The plan of the set has drawn that order, so that the last tenth is a random one, the same for all who have a set
    with this root digest.
    """

    split: str
    """Split of the task's data set; or, of another one, data set and split with a slash between them."""
    first: int = 0
    last: int = 100

    def __post_init__(self) -> None:
        assert 0 <= self.first < self.last <= 100, "hundredths, at least one"

    def numbers(self, samples: int) -> range:
        """The pictures, counting through a set of so many; parts that adjoin share none and leave none out."""
        return range(samples * self.first // 100, samples * self.last // 100)


@dataclass(frozen=True)
class Task:
    """A task: classes to tell apart, from pictures of one data set."""

    name: str
    dataset: str
    """The recipe of `jobs/prepare.py` that makes its shard sets."""
    learning: tuple[Part, ...]
    choosing: tuple[Part, ...]
    """What a learning rate is chosen by; no part of it is learnt from meanwhile, none of it is tested on."""
    testing: tuple[Part, ...]
    flip: bool
    """Whether a mirrored picture is of the same class."""
    crop: bool
    """Whether a part of a picture is of the same class."""
    kind: Literal["memory", "run"] = "memory"
    """Whether its pictures fit into the memory of one process, or learning them is a run of its own."""
    group: Group = ""
    """Of VTAB's groups, which."""
    also: tuple[tuple[str, str], ...] = ()
    """Further test sets with the same classes, name and set; pictures may have several labels there."""

    def training(self, split: Split) -> tuple[Part, ...]:
        """What is learnt from before looking at `split`: all that is no test, once a rate has been chosen."""
        return self.learning if split == DEV else (*self.learning, *self.choosing)

    def judged(self, split: Split) -> tuple[Part, ...]:
        """What the accuracy is of."""
        return self.choosing if split == DEV else self.testing

    @property
    def drawn(self) -> bool:
        """Whether the pictures to learn from were drawn whatever their class, so that some class may have none."""
        return self.learning == (Part("train800"),)

    def where(self, part: Part) -> str:
        """The shard set of a part, as data set and split."""
        return part.split if "/" in part.split else f"{self.dataset}/{part.split}"


def _thousand(name: str, *, flip: bool = True, crop: bool = True, group: Group = "") -> Task:
    learning, choosing, testing = ((Part(split),) for split in ("train800", "val200", "test"))
    return Task(name, name, learning, choosing, testing, flip, crop, "memory", group)


def _whole(name: str, dataset: str, train: str, held_back: int, test: str) -> Task:
    """A task of a whole data set, that holds the last hundredths of its training pictures back to choose by."""
    edge = 100 - held_back
    learning, choosing = (Part(train, 0, edge),), (Part(train, edge, 100),)
    return Task(name, dataset, learning, choosing, (Part(test),), flip=True, crop=True)


def _vtab(group: Group, names: str) -> tuple[Task, ...]:
    return tuple(
        _thousand(f"vtab_{name}", flip=name not in _NO_FLIP, crop=name not in _NO_CROP, group=group)
        for name in names.split()
    )


# Where a mirrored picture, or a part of one, is of another class (Kolesnikov et al. 2020, BiT, appendix F).
_NO_FLIP = ("dsprites_location", "dsprites_orientation", "smallnorb_azimuth")
_NO_CROP = ("clevr_count", "clevr_distance", "dmlab", "kitti", "dsprites_location")

digits = _thousand("digits", flip=False)
mnist = _thousand("mnist", flip=False)
fashion_offset = _thousand("fashion_offset", flip=False, crop=False)
imagenet = replace(
    _whole("imagenet", "imagenet1k", "train", 1, "val"),
    kind="run",
    also=(("real", "imagenet_real/val"), ("v2", "imagenet_v2/test")),
)
cifar10 = _whole("cifar10", "cifar10", "train", 2, "test")
cifar100 = _whole("cifar100", "cifar100", "train", 2, "test")
pets = _whole("pets", "pets", "trainval", 10, "test")
flowers = _whole("flowers", "flowers", "train", 10, "test")

DEMO = (digits, mnist, fashion_offset)
CIFAR = (cifar10, cifar100)
NATURAL = _vtab("natural", "caltech101 cifar100 dtd flowers pets sun397 svhn")
SPECIALIZED = _vtab("specialized", "camelyon eurosat resisc45 retinopathy")
STRUCTURED = _vtab(
    "structured",
    "clevr_count clevr_distance dmlab kitti dsprites_location dsprites_orientation smallnorb_azimuth "
    "smallnorb_elevation",
)
VTAB = (*NATURAL, *SPECIALIZED, *STRUCTURED)

ALL = (*DEMO, imagenet, *CIFAR, pets, flowers, *VTAB)
GROUPS: Mapping[str, tuple[Task, ...]] = {
    "vtab": VTAB,
    "natural": NATURAL,
    "specialized": SPECIALIZED,
    "structured": STRUCTURED,
    "cifar": CIFAR,
    "demo": DEMO,
    "all": ALL,
}
"""Several tasks under one name."""

# About what a picture and its label take in a shard, in thousands of bytes, by recipe: measured for the demo's, of
# others what the published archives' sizes make of it.
KILOBYTES = {
    "digits": 2,
    "mnist": 2,
    "fashion_offset": 2,
    "imagenet1k": 117,
    "cifar10": 4,
    "cifar100": 4,
    "pets": 109,
    "flowers": 44,
    "vtab_caltech101": 16,
    "vtab_cifar100": 4,
    "vtab_dtd": 114,
    "vtab_flowers": 44,
    "vtab_pets": 109,
    "vtab_sun397": 350,
    "vtab_svhn": 4,
    "vtab_camelyon": 25,
    "vtab_eurosat": 5,
    "vtab_resisc45": 15,
    "vtab_retinopathy": 18,
    "vtab_clevr_count": 190,
    "vtab_clevr_distance": 190,
    "vtab_dmlab": 29,
    "vtab_kitti": 800,
    "vtab_dsprites_location": 2,
    "vtab_dsprites_orientation": 2,
    "vtab_smallnorb_azimuth": 7,
    "vtab_smallnorb_elevation": 7,
}


_LIKE = ["key", "size", "width", "height"]  # what two pictures have in common before their bytes are compared
_AT_ONCE = 1024  # pairs whose bytes are compared in one go


def named(words: str) -> tuple[Task, ...]:
    """The tasks of a list with commas of names and groups, each once; ValueError names those there are."""
    known = {**{task.name: (task,) for task in ALL}, **GROUPS}
    found: dict[Task, None] = {}
    for word in words.split(","):
        if word.strip() not in known:
            there = ", ".join(task.name for task in ALL)
            raise ValueError(f"no task {word.strip()!r}; there are: {there}; and the groups {', '.join(GROUPS)}")
        found.update(dict.fromkeys(known[word.strip()]))
    return tuple(found)


def find(data: str, task: Task) -> dict[str, ShardSet]:
    """The task's shard sets by data set and split, and those of `also` that are there.

    ValueError says how much the task's data are, and the command that makes them, where they are not there.
    """
    found: dict[str, ShardSet] = {}
    for where in _sets(task):
        try:
            found[where] = ShardSet((Folder(data) / where).absolute)
        except ValueError as error:
            why = f"task {task.name} is not prepared ({error})"
            raise ValueError(f"{why}: {how_big(task)}; make it with: {made_by(task, data)}") from error
    for _, where in task.also:
        if Folder(data).exists(f"{where}/{MANIFEST}"):
            found[where] = ShardSet((Folder(data) / where).absolute)
    return found


def _sets(task: Task) -> Iterator[str]:
    return iter(dict.fromkeys(task.where(part) for part in (*task.training(TEST), *task.testing)))


def roots(sets: Mapping[str, ShardSet]) -> tuple[tuple[str, str], ...]:
    """Name and root digest of each shard set."""
    return tuple((name, one.manifest.root) for name, one in sets.items())


def check(task: Task, sets: Mapping[str, ShardSet]) -> tuple[str, ...]:
    """Look at the labels and names of all pictures, and say what is odd but may be so, a line each.

    ValueError, naming the set and the class or picture, where the sets do not name the same classes; where a part has
    no picture; where one that is learnt from or tested on has no class, one that is learnt from several, or any a class
    that is none; where a class has no picture to learn from (a line, where 1,000 pictures were drawn whatever their
    class); and where one picture is in two parts that have to be apart. That is one with the same name and the same
    bytes: different pictures of a data set may be equal, as squares that are turned are.
    """
    _check_classes(task, sets)
    also = tuple(Part(where) for _, where in task.also if where in sets)
    roles = {"learn from": task.learning, "choose by": task.choosing, "test on": (*task.testing, *also)}
    rows = {where: _rows(one) for where, one in sets.items()}
    for to_do, parts in roles.items():
        for part in parts:
            _check_labels(task, part, sets, rows, several=to_do == "test on")
    odd = _empty_classes(task, sets, rows)
    for (to_do, some), (to_do_else, others) in combinations(roles.items(), 2):
        for one, other in product(some, others):
            if key := _shared(task, one, other, sets, rows):
                both = f"to {to_do} and to {to_do_else}"
                raise ValueError(f"task {task.name}: picture {key} of {task.where(other)} is there both {both}")
    return odd


def _check_classes(task: Task, sets: Mapping[str, ShardSet]) -> None:
    (first, one), *others = sets.items()
    ours = one.manifest.classes
    for where, other in others:
        theirs = other.manifest.classes
        if ours == theirs:
            continue
        wrong = f"{len(theirs)} classes, not {len(ours)} as {first}"
        if len(ours) == len(theirs):
            number = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            wrong = f"class {number} {theirs[number]!r}, in {first} it is {ours[number]!r}"
        raise ValueError(f"task {task.name}: {where} has {wrong}; make both with one list of classes (--classes)")


def _rows(shards: ShardSet) -> pa.Table:
    """The index of all shards."""
    columns = (*_LIKE, "shard", "offset", "labels")
    return pa.concat_tables([shards.rows(number, columns) for number in range(len(shards.manifest.shards))])


def _of(part: Part, rows: pa.Table) -> pa.Table:
    numbers = part.numbers(len(rows))
    return rows.slice(numbers.start, len(numbers))


def _check_labels(
    task: Task, part: Part, sets: Mapping[str, ShardSet], rows: Mapping[str, pa.Table], *, several: bool
) -> None:
    where = task.where(part)
    some, classes = _of(part, rows[where]), len(sets[where].manifest.classes)
    if not len(some):
        percent = f"{part.first} to {part.last} % of its {len(rows[where])} are none"
        raise ValueError(f"task {task.name}: {where} has too few pictures, {percent}")
    counts = pc.list_value_length(some["labels"]).to_numpy()
    wrong = np.flatnonzero((counts < 1) | ((counts > 1) & (not several)))
    if len(wrong):
        key = some["key"][wrong.item(0)].as_py()
        raise ValueError(f"task {task.name}: picture {key} of {where} has {counts[wrong[0]]} classes, not one")
    largest = pc.max(pc.list_flatten(some["labels"])).as_py()
    if largest >= classes:
        raise ValueError(f"task {task.name}: {where} has pictures of class {largest}, there are {classes} classes")


def _empty_classes(task: Task, sets: Mapping[str, ShardSet], rows: Mapping[str, pa.Table]) -> tuple[str, ...]:
    names = next(iter(sets.values())).manifest.classes
    labels = [pc.list_flatten(_of(part, rows[task.where(part)])["labels"]) for part in task.training(TEST)]
    counts = np.bincount(np.concatenate([some.to_numpy() for some in labels]), minlength=len(names))
    empty = np.flatnonzero(counts == 0).tolist()
    if not empty:
        return ()
    which = f"{len(empty)} of {len(names)} classes, {names[empty[0]]!r} the first,"
    said = f"task {task.name}: {which} have no picture to learn from"
    if task.drawn:
        return (said,)
    raise ValueError(f"{said}; make {task.dataset} again from a whole source")


def _shared(
    task: Task, one: Part, other: Part, sets: Mapping[str, ShardSet], rows: Mapping[str, pa.Table]
) -> str | None:
    """The name of a picture that is in both parts."""
    places = task.where(one), task.where(other)
    first, second = (_of(part, rows[where]) for part, where in zip((one, other), places, strict=True))
    if places[0] == places[1]:
        numbers = [part.numbers(len(rows[places[0]])) for part in (one, other)]
        start = max(each.start for each in numbers)
        return rows[places[0]]["key"][start].as_py() if start < min(each.stop for each in numbers) else None
    columns = [*_LIKE, "shard", "offset"]
    pairs = first.select(columns).join(second.select(columns), _LIKE, right_suffix="_other", join_type="inner")
    pairs = pairs.sort_by("key")
    for start in range(0, len(pairs), _AT_ONCE):
        some = pairs.slice(start, _AT_ONCE).to_pydict()
        ours = _encoded(sets[places[0]], some["shard"], some["offset"], some["size"])
        theirs = _encoded(sets[places[1]], some["shard_other"], some["offset_other"], some["size"])
        for key, a, b in zip(some["key"], ours, theirs, strict=True):
            if a == b:
                return key
    return None


def _encoded(shards: ShardSet, shard: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> list[bytes]:
    names = [shards.manifest.shards[number].name for number in shard]
    return shards.tars.ranges(list(zip(names, offset, size, strict=True)))


def made_by(task: Task, data: str) -> str:
    """The command that makes the task's data in the folder `data`, and what else it needs."""
    from shards.datasets import find  # with all recipes, which nobody needs whose data are there

    dataset = find(task.dataset)
    wanted = [where.rpartition("/")[2] for where in _sets(task)]
    some = "" if set(wanted) == set(dataset.splits) else f" --split {','.join(wanted)}"
    command = f"python jobs/prepare.py {task.dataset}{some} --to {Folder(data).absolute}"
    return f"{command} --source SOURCE, which is {dataset.source}" if dataset.source else command


def how_big(task: Task) -> str:
    """How many pictures the task's shard sets hold, and about how many bytes."""
    from shards.datasets import find

    splits = find(task.dataset).splits
    count = sum(splits[where.rpartition("/")[2]] or 0 for where in _sets(task))
    return f"{count:,} pictures, about {_bytes(1000 * KILOBYTES[task.dataset] * count)}"


def _bytes(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{float(f'{size / unit:.2g}'):,g} {name}"
    return "1 MB"


def table() -> str:
    """The tasks, a line each: what they are made of, and how much that is."""
    from shards.datasets import find

    rows = [("task", "group", "prepare.py", "data", "what it is")]
    rows += [(t.name, t.group or "-", t.dataset, how_big(t), find(t.dataset).what) for t in ALL]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
