"""Make shard sets from raw pictures, and read them back.

    python jobs/prepare.py DATASETS --to FOLDER    one set a split, at FOLDER/DATASET/SPLIT; makes only what is missing
    python jobs/prepare.py folder --name birds --source PICTURES --to FOLDER
                                                   your own: folder, tars, parquet or list
    python jobs/prepare.py index SHARDS --to SET   describes WebDataset shards made elsewhere, without copying them
    python jobs/prepare.py subset SET --to PART --share 0.1
                                                   describes a part of a set: a share, so many per class, without some
    python jobs/prepare.py --list                  the data sets, with their splits and licences
    python jobs/prepare.py describe SET            classes, counts, sizes; --sheet FILE.png draws some of its pictures
    python jobs/prepare.py verify SET              compares every digest, count and picture; exit code 1 if one is wrong

Runs on the Ray cluster it is submitted to, or starts a Ray on this machine. DATASETS is one data set or several, with
commas between them; FOLDER, PICTURES, SHARDS and SET are folders or URLs (s3://bucket/prefix).
`python jobs/prepare.py DATASETS --help` lists the options.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.cli import parse, run

if TYPE_CHECKING:
    from shards.datasets import Dataset
    from shards.recipe import Recipe


@dataclass(frozen=True)
class Prepare:
    """Make data sets into shard sets, one a split."""

    to: str = ""
    """Folder or URL for the sets; that of a split lies in DATASET/SPLIT under it."""
    source: str = ""
    """Folder, file or URL of the raw pictures, where they are not in the usual place."""
    split: str = ""
    """Only these splits, with commas between them; all if empty."""
    name: str = ""
    """What the data set is called, where it has no recipe of its own (folder, tars, parquet, list)."""
    classes: str = ""
    """File with the names of the classes, a line each; else they are the recipe's or the source's."""
    samples_per_shard: int = 5000
    """About how many pictures a shard gets."""
    seed: int = 0
    """Of the order of the pictures."""
    run: int = 0
    """So many neighbours of the source stay in one shard: fewer requests to a store, less mixing; 0 is what suits the
    source."""
    short_side: int = 0
    """Scale larger pictures down to so many pixels on the shorter side; 0 keeps the bytes as they are."""
    format: Literal["jpeg", "webp"] = "jpeg"
    """What scaled pictures are encoded as."""
    quality: int = 95
    """Of JPEG or WebP."""
    check: Literal["decode", "header"] = "decode"
    """Decode every picture that is kept, or look at its header and length only."""
    duplicates: Literal["keep", "drop", "merge"] = "keep"
    """Of equal and nearly equal pictures: keep all, keep one, or keep one with the labels of all."""
    against: str = ""
    """Shard sets, with commas between them, whose pictures are left out, with what resembles them."""
    refused_limit: float = 0.01
    """Share of unusable pictures from which on the job fails."""
    keep_sound: bool = False
    """Take what is sound of a damaged file, rather than fail."""


@dataclass(frozen=True)
class Index:
    """Describe WebDataset shards that were made elsewhere, so that a run can be fed from them."""

    to: str = ""
    """Folder or URL for the description; may be the folder of the shards."""
    name: str = "indexed"
    """What the set is called."""
    classes: str = ""
    """File with the names of the classes, a line each; else they are numbered up to the largest label."""
    label: str = ""
    """Field of the samples' JSON that holds the label, where there is no .cls."""
    refused_limit: float = 0.01
    """Share of unusable samples from which on the job fails."""


@dataclass(frozen=True)
class Subset:
    """Describe a part of a shard set as a set of its own; nothing is copied."""

    to: str = ""
    """Folder or URL for the description."""
    name: str = "subset"
    """What the part is called."""
    share: float = 1.0
    """Share of the pictures; a smaller one lies within every larger one."""
    per_class: int = 0
    """So many pictures of each class; 0 is all."""
    without: str = ""
    """File with the keys of pictures to be left out, a line each."""
    seed: int = 0
    """Of the choice."""


def main(argv: list[str]) -> None:
    """Do what the first word says."""
    match argv:
        case [] | ["-h" | "--help", *_]:
            print(__doc__)
        case ["--list"]:
            print(table())
        case ["verify", shard_set]:
            verify(shard_set)
        case ["verify", *_]:
            raise ValueError("verify takes one thing, the folder or URL of a shard set")
        case ["describe", shard_set]:
            describe(shard_set)
        case ["describe", shard_set, "--sheet", file]:
            describe(shard_set, file)
        case ["describe", *_]:
            raise ValueError("describe takes the folder or URL of a shard set, and perhaps --sheet FILE.png")
        case ["index", shards, *options] if not shards.startswith("-"):
            index(shards, parse(Index, options))
        case ["index", *_]:
            raise ValueError("index takes the folder or URL of the shards first, then --to")
        case ["subset", whole, *options] if not whole.startswith("-"):
            subset(whole, parse(Subset, options))
        case ["subset", *_]:
            raise ValueError("subset takes the folder or URL of a shard set first, then --to")
        case [option, *_] if option.startswith("-"):
            raise ValueError(f"the data set comes first, then {option}; --list shows the data sets")
        case [names, *options]:
            prepare(names.split(","), parse(Prepare, options))


def prepare(names: list[str], wanted: Prepare) -> None:
    """Make every wanted split of the data sets."""
    # Imported here, as below, so that --help answers at once.
    from shards.build import build
    from shards.cluster import mapped
    from shards.datasets import find
    from shards.sources import Origin
    from shards.storage import Folder

    datasets = [_named(find(name), wanted) for name in names]
    if not wanted.to:
        raise ValueError("--to is missing: the folder or URL for the shard sets")
    classes = _lines("classes", wanted.classes)
    recipes = [(dataset, split, _recipe(dataset, split, wanted, classes)) for dataset, split in _splits(datasets)]
    for dataset, split, recipe in recipes:
        to = Folder(wanted.to) / dataset.name
        origin = Origin(
            wanted.source,
            to / "downloads",
            spread=mapped,
            classes=classes,
            keep_sound=wanted.keep_sound,
            say=partial(print, flush=True),
        )
        build(recipe, partial(dataset.pictures, split, origin), to / split)


def _named(dataset: "Dataset", wanted: Prepare) -> "Dataset":
    """The data set as the options name it, with the splits they want."""
    free = dataset.splits.keys() == {"all"}
    if free and not wanted.name:
        raise ValueError(f"--name is missing: what your data set is called ({dataset.name} is the form it comes in)")
    if wanted.name and not free:
        raise ValueError(f"--name is for pictures without a recipe of their own; {dataset.name} has its name")
    splits = wanted.split.split(",") if wanted.split else list(dataset.splits)
    if unknown := [split for split in splits if split not in dataset.splits and not free]:
        raise ValueError(f"{dataset.name} has no split {unknown[0]!r}; there are: {', '.join(dataset.splits)}")
    counts = {split: dataset.splits.get(split) for split in splits}
    return replace(dataset, name=wanted.name or dataset.name, splits=counts)


def _splits(datasets: list["Dataset"]) -> Iterator[tuple["Dataset", str]]:
    return ((dataset, split) for dataset in datasets for split in dataset.splits)


def _lines(option: str, file: str) -> tuple[str, ...]:
    """The lines of the file of an option, those that are not empty."""
    if not file:
        return ()
    try:
        lines = Path(file).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"--{option} {file}: {error.strerror}") from error
    return tuple(line.strip() for line in lines if line.strip())


def _recipe(dataset: "Dataset", split: str, wanted: Prepare, classes: tuple[str, ...]) -> "Recipe":
    from shards.image import Processing
    from shards.recipe import Clean, Recipe
    from shards.storage import Folder

    processing = Processing(wanted.short_side, wanted.format, wanted.quality, wanted.check)
    against = tuple(Folder(url).absolute for url in wanted.against.split(",") if url)
    known = dataset.classes if isinstance(dataset.classes, tuple) else ()
    return Recipe(
        dataset.name,
        split,
        dataset.licence,
        classes or known,
        samples_per_shard=wanted.samples_per_shard,
        seed=wanted.seed,
        run=wanted.run or dataset.run,
        processing=processing,
        clean=Clean(wanted.duplicates, against),
        keep_sound=wanted.keep_sound,
        refused_limit=wanted.refused_limit,
    )


def index(shards: str, wanted: Index) -> None:
    """Describe shards made elsewhere."""
    from shards.inplace import index
    from shards.storage import Folder

    if not wanted.to:
        raise ValueError("--to is missing: the folder or URL for the description of the shards")
    classes = _lines("classes", wanted.classes)
    index(shards, Folder(wanted.to), wanted.name, classes, label=wanted.label, refused_limit=wanted.refused_limit)


def subset(whole: str, wanted: Subset) -> None:
    """Describe a part of a set."""
    from shards.storage import Folder
    from shards.subset import Part, subset

    if not wanted.to:
        raise ValueError("--to is missing: the folder or URL for the description of the part")
    part = Part(wanted.share, wanted.per_class, _lines("without", wanted.without), wanted.seed)
    made = subset(whole, Folder(wanted.to), wanted.name, part)
    print(f"{made.name}: {made.samples:,} pictures of {whole} are described at {Folder(wanted.to)}", flush=True)


def describe(shard_set: str, sheet: str = "") -> None:
    """Say what is in a set, and draw some of it."""
    from shards.describe import contact_sheet, describe

    print(describe(shard_set), flush=True)
    if sheet:
        Path(sheet).write_bytes(contact_sheet(shard_set))
        print(f"sheet: {sheet}", flush=True)


def verify(shard_set: str) -> None:
    """Say that the set is whole, or the first thing that is wrong with it and exit with 1."""
    from shards.verify import verify

    wrong = verify(shard_set)
    print(f"wrong: {wrong}" if wrong else f"{shard_set} is whole", flush=True)
    if wrong:
        sys.exit(1)


def table() -> str:
    """The data sets, a line each."""
    from shards.datasets import known

    rows = [("data set", "pictures", "classes", "licence", "what it is")]
    for dataset in known().values():
        counts = (f"{split} {count:,}" if count is not None else split for split, count in dataset.splits.items())
        classes = dataset.classes if isinstance(dataset.classes, int) else len(dataset.classes)
        rows.append((dataset.name, ", ".join(counts), f"{classes or '-'}", dataset.licence, dataset.what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
