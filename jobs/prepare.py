"""Make shard sets from raw pictures, and read them back.

    python jobs/prepare.py DATASETS --to FOLDER    one set a split, at FOLDER/DATASET/SPLIT; makes only what is missing
    python jobs/prepare.py --list                  the data sets, with their splits and licences
    python jobs/prepare.py verify SET              compares every digest, count and picture; exit code 1 if one is wrong

Runs on the Ray cluster it is submitted to, or starts a Ray on this machine. DATASETS is one
data set or several, with commas between them; `python jobs/prepare.py DATASETS --help` lists the options.
"""

import sys
from dataclasses import dataclass
from functools import partial

from pipeline.cli import parse, run


@dataclass(frozen=True)
class Prepare:
    """Make data sets into shard sets, one a split."""

    to: str = ""
    """Folder or URL for the sets; that of a split lies in DATASET/SPLIT under it."""
    source: str = ""
    """Folder or URL of the raw files, where they are not in the usual place."""
    samples_per_shard: int = 5000
    """About how many pictures a shard gets."""


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
        case [option, *_] if option.startswith("-"):
            raise ValueError(f"the data set comes first, then {option}; --list shows the data sets")
        case [names, *options]:
            prepare(names.split(","), parse(Prepare, options))


def prepare(names: list[str], wanted: Prepare) -> None:
    """Make every split of the data sets."""
    # Imported here, as below, so that --help answers at once.
    from shards.build import Recipe, build
    from shards.datasets import find
    from shards.plan import Plan
    from shards.storage import Folder

    datasets = [find(name) for name in names]
    if not wanted.to:
        raise ValueError("--to is missing: the folder or URL for the shard sets")
    for dataset, (split, count) in [(one, split) for one in datasets for split in one.splits.items()]:
        to = Folder(wanted.to) / dataset.name
        plan = Plan(count, wanted.samples_per_shard, f"{dataset.name}/{split}")
        recipe = Recipe(dataset.name, split, dataset.licence, dataset.classes, plan)
        read = partial(dataset.pictures, split, wanted.source, to / "downloads")
        build(recipe, read, to / split)


def verify(shard_set: str) -> None:
    """Say that the set is whole, or the first thing that is wrong with it and exit with 1."""
    from shards.verify import verify

    wrong = verify(shard_set)
    print(f"wrong: {wrong}" if wrong else f"{shard_set} is whole", flush=True)
    if wrong:
        sys.exit(1)


def table() -> str:
    """The data sets, a line each."""
    from shards.datasets import find, known

    rows = [("data set", "pictures", "classes", "licence", "what it is")]
    for dataset in map(find, known()):
        splits = ", ".join(f"{split} {count:,}" for split, count in dataset.splits.items())
        rows.append((dataset.name, splits, str(len(dataset.classes)), dataset.licence, dataset.what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
