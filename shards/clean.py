"""Takes out of a corpus, before it is planned, what is there twice and what a test set holds, with Ray.

Fingerprints are made of every picture, a task a piece, and kept in `parts/`, so that a build that was killed goes on.
Pieces are held against each test set by tasks too; the corpus is held against itself in one process, by whole pictures
alone. What the hashes find is then compared by its pixels. `duplicates.parquet` names each picture that left, and why;
`contamination.parquet` names every test picture that was found, with every picture of the corpus that is a copy of it;
`contamination.html` shows some of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards import cluster, contamination, dedup, fingerprint
from shards.manifest import CONTAMINATION, DUPLICATES, ShardSet
from shards.progress import Progress
from shards.recipe import Clean, Recipe
from shards.sources import Pictures, Ranges, sets
from shards.storage import Folder

# Its functions are made when it is imported, where no type checker sees them.
pc: Any = pyarrow.compute

PIECE = 4096
"""Pictures of a task."""
PAGE = "contamination.html"

Numbers = NDArray[np.int64]

LEFT = pa.schema(
    [
        ("key", pa.string()),
        ("reason", pa.string()),
        ("of", pa.string()),  # key of the picture that it is a copy of
        ("test_set", pa.string()),  # null where that one is of the corpus
        ("distance", pa.int16()),
        ("score", pa.float32()),
    ]
)

FOUND = pa.schema(
    [
        ("test_set", pa.string()),
        ("of", pa.string()),  # key of the picture in the test set
        ("key", pa.string()),  # of the picture of the corpus that is a copy of it
        ("distance", pa.int16()),
        ("score", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Kept:
    """How many pictures stay, their numbers in the listing, and all pictures' labels; None where that is as listed."""

    count: int
    numbers: Numbers | None = None
    labels: pa.Array | None = None


@dataclass(frozen=True)
class Removed:
    """How many pictures left, by reason, and the files that say which."""

    reasons: dict[str, int]
    files: dict[str, bytes]


def test_sets(wanted: Clean) -> dict[str, ShardSet]:
    """The sets that a corpus is held against, by name; ValueError where one is none, or two are called the same."""
    found: dict[str, ShardSet] = {}
    for url in wanted.against:
        one = ShardSet(url)
        if one.manifest.name in found:
            raise ValueError(f"{url} and {found[one.manifest.name].folder} are both called {one.manifest.name}")
        found[one.manifest.name] = one
    return found


def survivors(recipe: Recipe, source: Pictures, parts: Folder) -> Kept:
    """What stays of a source; what leaves, and what was found of test sets, is written to `parts`."""
    against = {name: sets.read(one) for name, one in test_sets(recipe.clean).items()}
    cluster.connect()
    _print_all(f"{recipe.name}: fingerprints", source, parts / "prints")
    for name, pictures in against.items():
        _print_all(f"{name}: fingerprints", pictures, parts / _folder(name))
    tested = {name: _against(recipe.name, name, source, pictures, parts) for name, pictures in against.items()}
    inside = dedup.SCORED.empty_table()
    if recipe.clean.duplicates != "keep":
        inside = _confirmed(recipe.name, dedup.within(_wholes(parts / "prints", len(source))), source, source)
    mode = "merge" if recipe.clean.duplicates == "merge" else "drop"
    decisions = dedup.decide(len(source), inside, tested, mode)
    parts.write(DUPLICATES, _named(decisions, source, against))
    if against:
        parts.write(CONTAMINATION, _linked(tested, source, against))
        parts.write(PAGE, _page(recipe, source, against, inside, tested).encode())
    stays = np.ones(len(source), bool)
    stays[decisions["number"].to_numpy()] = False
    labels = dedup.united(source.table["labels"], decisions) if mode == "merge" else None
    return Kept(int(stays.sum()), np.flatnonzero(stays), labels)


def removed(parts: Folder) -> Removed:
    """What `survivors` wrote."""
    names = [name for name in (DUPLICATES, CONTAMINATION, PAGE) if parts.exists(name)]
    files = {name: parts.read(name) for name in names}
    left = pq.read_table(BytesIO(files[DUPLICATES]))
    reasons: dict[str, int] = {}
    for row in left.group_by(["reason", "test_set"]).aggregate([("key", "count")]).to_pylist():
        reason = f"in {row['test_set']}" if row["test_set"] else row["reason"].removesuffix(" of")
        reasons[reason] = row["key_count"]
    return Removed(dict(sorted(reasons.items())), files if left.num_rows or PAGE in files else {})


# fingerprints


def _folder(test_set: str) -> str:
    return "prints-" + test_set.replace("/", "-")


def _pieces(count: int) -> int:
    return -(-count // PIECE)


def _piece(number: int, count: int) -> Numbers:
    return np.arange(number * PIECE, min(count, (number + 1) * PIECE))


def _print_all(what: str, pictures: Pictures, prints: Folder) -> None:
    """Make the fingerprints that are not there yet."""
    there = prints.sizes()
    missing = [number for number in range(_pieces(len(pictures))) if _file(number) not in there]
    progress = Progress(what, len(pictures), "pictures")
    done = len(pictures) - sum(len(_piece(number, len(pictures))) for number in missing)
    progress.update(done)
    arguments = ((number, pictures.take(_piece(number, len(pictures))), prints) for number in missing)
    for ended in cluster.each(print_piece, arguments):
        done += sum(ended)
        progress.update(done)


def print_piece(number: int, pictures: Pictures, prints: Folder) -> int:
    """Write the fingerprints of a piece; how many pictures it has."""
    data = BytesIO()
    pq.write_table(fingerprint.fingerprints(pictures), data)
    prints.write(_file(number), data.getvalue())
    return len(pictures)


def _file(number: int) -> str:
    return f"{number:06}.parquet"


def _prints(folder: Folder, number: int) -> pa.Table:
    return pq.read_table(BytesIO(folder.read(_file(number))))


def _wholes(folder: Folder, count: int) -> pa.Table:
    """The fingerprints of a corpus without those of parts of pictures."""
    pieces = (fingerprint.wholes(_prints(folder, number)) for number in range(_pieces(count)))
    return pa.concat_tables([fingerprint.wholes(fingerprint.PRINTS.empty_table()), *pieces])


# search


def _against(corpus: str, name: str, source: Pictures, test: Ranges, parts: Folder) -> pa.Table:
    """The confirmed pairs with a test set."""
    progress = Progress(f"{corpus}: in {name}", len(source), "pictures")
    progress.update(0)
    held, tests = parts / _folder(name), _pieces(len(test))
    found: dict[int, pa.Table] = {}
    arguments = ((number, parts / "prints", held, tests) for number in range(_pieces(len(source))))
    for ended in cluster.each(search_piece, arguments):
        found.update(ended)
        pairs = sum(table.num_rows for table in found.values())
        progress.update(min(len(source), len(found) * PIECE), candidates=f"{pairs:,}")
    every = pa.concat_tables([dedup.PAIRS.empty_table(), *(found[number] for number in sorted(found))])
    return _confirmed(f"{corpus}: in {name}", every, source, test)


def search_piece(number: int, prints: Folder, test: Folder, tests: int) -> tuple[int, pa.Table]:
    """The candidates of a piece in a test set."""
    return number, dedup.against(_held(test, tests), _prints(prints, number), first=number * PIECE)


@lru_cache(maxsize=4)
def _held(test: Folder, tests: int) -> dedup.Held:
    """Kept by each worker: a test set of half a million pictures takes half a gigabyte, and some seconds."""
    return dedup.hold(pa.concat_tables([_prints(test, number) for number in range(tests)]))


def _confirmed(what: str, pairs: pa.Table, ones: Pictures, others: Pictures) -> pa.Table:
    """Those candidates whose pixels agree."""
    unsure = np.flatnonzero(~pairs["exact"].to_numpy())
    scores = np.ones(pairs.num_rows, np.float32)
    batches = [unsure[start : start + PIECE] for start in range(0, len(unsure), PIECE)]
    progress = Progress(f"{what}: comparing", len(unsure), "pairs")
    progress.update(0)
    for batch, found in zip(batches, cluster.mapped(compare, _compared(pairs, batches, ones, others)), strict=True):
        scores[batch] = found
        progress.update(int(np.searchsorted(unsure, batch[-1])) + 1)
    return dedup.confirmed(pairs, scores)


def _compared(
    pairs: pa.Table, batches: Iterable[Numbers], ones: Pictures, others: Pictures
) -> Iterator[tuple[Pictures, Pictures, Numbers, Numbers]]:
    for batch in batches:
        number, which = np.unique(pairs["number"].to_numpy()[batch], return_inverse=True)
        of, whom = np.unique(pairs["of"].to_numpy()[batch], return_inverse=True)
        yield ones.take(number), others.take(of), which, whom


def compare(ones: Pictures, others: Pictures, which: Numbers, whom: Numbers) -> NDArray[np.float32]:
    """The scores of pairs of pictures, by their places in `ones` and `others`."""
    left, right = _thumbnails(ones), _thumbnails(others)
    return dedup.scores(left[which], right[whom])


def _thumbnails(pictures: Pictures) -> NDArray[np.uint8]:
    blank = np.zeros((fingerprint.SIDE, fingerprint.SIDE), np.uint8)
    found = (fingerprint.thumbnail(picture.data) for picture in pictures)
    return np.stack([blank if one is None else one for one in found])


# what is told


def _named(decisions: pa.Table, source: Pictures, against: Mapping[str, Ranges]) -> bytes:
    """`duplicates.parquet`."""
    keys = source.table["key"]
    of: list[str] = [""] * decisions.num_rows
    column, numbers = decisions["test_set"].to_pylist(), decisions["of"].to_numpy()
    for name in {*column}:
        table = keys if name is None else against[name].table["key"]
        here = [place for place, one in enumerate(column) if one == name]
        for place, key in zip(here, table.take(pa.array(numbers[here])).to_pylist(), strict=True):
            of[place] = key
    columns = {
        "key": keys.take(decisions["number"].combine_chunks()),
        "of": pa.array(of, pa.string()),
        **{name: decisions[name] for name in ("reason", "test_set", "distance", "score")},
    }
    data = BytesIO()
    pq.write_table(pa.table({name: columns[name] for name in LEFT.names}).cast(LEFT), data)
    return data.getvalue()


def _linked(tested: Mapping[str, pa.Table], source: Pictures, against: Mapping[str, Ranges]) -> bytes:
    """`contamination.parquet`: every confirmed pair, by test set, in the order of its pictures."""
    made = [FOUND.empty_table()]
    for name, pairs in tested.items():
        ordered = pairs.sort_by([("of", "ascending"), ("number", "ascending")]).combine_chunks()
        columns = {
            "test_set": pa.repeat(pa.scalar(name, pa.string()), len(ordered)),
            "of": against[name].table["key"].take(ordered["of"].combine_chunks()),
            "key": source.table["key"].take(ordered["number"].combine_chunks()),
            **{column: ordered[column] for column in ("distance", "score")},
        }
        made.append(pa.table({column: columns[column] for column in FOUND.names}).cast(FOUND))
    data = BytesIO()
    pq.write_table(pa.concat_tables(made).combine_chunks(), data)
    return data.getvalue()


def _page(
    recipe: Recipe,
    source: Pictures,
    against: Mapping[str, Ranges],
    inside: pa.Table,
    tested: Mapping[str, pa.Table],
) -> str:
    settings = {
        "corpus": f"{recipe.name}, {len(source):,} pictures",
        "duplicates within the corpus": recipe.clean.duplicates,
        "views of a picture": fingerprint.VIEWS,
        "bits that may differ": dedup.RADIUS,
        "score from which two are copies": dedup.THRESHOLD,
    }
    shown = {name: _found(source, test, inside, tested[name]) for name, test in against.items()}
    return contamination.page(recipe.name, settings, shown)


def _found(source: Pictures, test: Ranges, inside: pa.Table, pairs: pa.Table) -> contamination.TestSet:
    """What was found of one test set, with the pictures of the first pairs."""
    exact = pc.unique(pairs.filter(pairs["exact"])["of"])
    every = pc.unique(pairs["of"])
    left = dedup.decide(len(source), inside, {"": pairs}, "drop")
    gone = pc.sum(pc.equal(left["reason"], dedup.TESTED)).as_py() or 0
    first = pairs.slice(0, contamination.SHOWN)
    ones = source.take(first["number"].to_numpy())
    others = test.take(first["of"].to_numpy())
    shown = [
        contamination.Pair(one.key, other.key, row["distance"], row["score"], row["exact"], one.data, other.data)
        for row, one, other in zip(first.to_pylist(), ones, others, strict=True)
    ]
    return contamination.TestSet(len(test), len(exact), len(every) - len(exact), gone, shown)
