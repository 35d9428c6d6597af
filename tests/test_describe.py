"""What is said and shown of a shard set is what it holds."""

import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image

from shards.describe import contact_sheet, describe, evenly, quantile
from shards.manifest import INDEX, MANIFEST, Manifest, ShardSet
from shards.pack import pack
from shards.recipe import Recipe
from shards.sources import Picture
from shards.storage import Folder, digest
from tests import tiny

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.shard_set(tmp_path_factory.mktemp("tiny") / "set").folder)


def made(folder: Path, pictures: list[Picture], classes: tuple[str, ...]) -> Manifest:
    """A set of one shard."""
    folder.mkdir(parents=True)
    packed = pack(0, pictures, folder / "000000.tar")
    pq.write_table(packed.rows, folder / INDEX, row_group_size=max(1, len(pictures)))
    return said(folder, Manifest("set", {}, classes, (packed.shard,), {INDEX: digest(folder / INDEX)}, {}))


def said(folder: Path, manifest: Manifest) -> Manifest:
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return manifest


def grey(number: int, height: int = 4, width: int = 4) -> np.ndarray:
    return np.full((height, width), number, np.uint8)


def facts(text: str) -> dict[str, str]:
    """Lines by their first word, but for those of classes."""
    return {line[:12].strip(): line[12:] for line in text.splitlines()[1:] if not line.startswith(" ")}


def named(text: str) -> list[tuple[str, int]]:
    """The classes that are named, with their counts."""
    rows = (re.fullmatch(r"  (?:largest |smallest|        )  *([\d,]+)  (.*)", line) for line in text.splitlines())
    return [(row[2], int(row[1].replace(",", ""))) for row in rows if row]


# in words


def test_every_count_that_is_said_is_that_of_the_set(tiny_set: str) -> None:
    text, there = describe(tiny_set), ShardSet(tiny_set)
    assert text.splitlines()[0] == "tiny"
    found = facts(text)
    assert (found["at"], found["digest"]) == (tiny_set, there.manifest.root)
    assert found["pictures"] == f"32 in 4 shards, {there.manifest.size / 1000:.1f} kB"
    assert found["formats"].startswith("png 100.0%; ")
    assert found["width"] == found["height"] == "12 to 12 pixels, quartiles 12, 12, 12"
    assert (found["classes"], found["refused"], found["removed"]) == ("3, none empty", "none", "none")
    labels = Counter(label for n in range(4) for row in there.rows(n)["labels"].to_pylist() for label in row)
    assert dict(named(text)) == {f"class {label}": count for label, count in labels.items()}


@given(labels=some.lists(some.lists(some.integers(0, 35), max_size=3, unique=True), max_size=120))
@settings(max_examples=25, deadline=None)
def test_the_largest_and_smallest_classes_are_named_and_the_empty_counted_whatever_the_labels(
    tmp_path_factory: pytest.TempPathFactory, labels: list[list[int]]
) -> None:
    folder, classes = tmp_path_factory.mktemp("set") / "x", tuple(f"name of {n}" for n in range(30))
    made(folder, [Picture(f"{n}", grey(n), tuple(each)) for n, each in enumerate(labels)], classes)
    text = describe(str(folder))
    counts = Counter(label for each in labels for label in each)
    names = {label: classes[label] if label < 30 else str(label) for label in counts}
    order = [(names[label], counts[label]) for label in sorted(counts, key=lambda label: (-counts[label], label))]
    assert named(text) == (order if len(order) <= 20 else order[:10] + order[-10:])
    empty, none = 30 - sum(label < 30 for label in counts), sum(not each for each in labels)
    words = facts(text)["classes"].split(", ")
    assert words[1] == (f"{empty} empty" if empty else "none empty")
    assert words[2:] == ([f"{none} picture{'s' * (none > 1)} of no class"] if none else [])


def test_sizes_and_formats_are_those_of_the_pictures(tmp_path: Path) -> None:
    jpeg = BytesIO()
    Image.fromarray(grey(9, 50, 60)).save(jpeg, "JPEG")
    pictures = [Picture(f"{n}", grey(n, 10 + n, 40 - 2 * n), (0,)) for n in range(7)]
    made(tmp_path / "x", [*pictures, Picture("j", jpeg.getvalue(), (0,))], ("a",))
    found = facts(describe(str(tmp_path / "x")))
    assert found["formats"].startswith("png 87.5%, jpg 12.5%; ")
    assert found["width"] == "28 to 60 pixels, quartiles 30, 34, 38"
    assert found["height"] == "10 to 50 pixels, quartiles 11, 13, 15"


@given(numbers=some.lists(some.integers(0, 50), min_size=1), share=some.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_every_quantile_is_that_of_the_sorted_numbers(numbers: list[int], share: float) -> None:
    wanted = np.quantile(numbers, share, method="inverted_cdf")
    assert quantile(Counter(numbers), share) == wanted


def test_the_recipe_and_every_reason_are_said_in_words(tmp_path: Path) -> None:
    manifest = made(tmp_path / "x", [Picture("a", grey(1), (0,))], ("a",))
    recipe = Recipe("flowers", "train", "CC0", samples_per_shard=1234).values()
    refused, removed = {"truncated": 3, "animated": 1200, "empty": 3}, {"in pets/test": 7}
    said(tmp_path / "x", replace(manifest, recipe=recipe, refused=refused, removed=removed))
    found = facts(describe(str(tmp_path / "x")))
    assert (found["refused"], found["removed"]) == ("1,206: animated 1,200, empty 3, truncated 3", "7: in pets/test 7")
    for words in ("dataset flowers", "split train", "licence CC0", "samples per shard 1,234", "quality 95", "check"):
        assert words in found["recipe"]
    assert "{" not in found["recipe"] and "against" not in found["recipe"]


@dataclass(frozen=True)
class Nested:
    """A recipe of another shape."""

    lossless: bool = True
    tests: tuple[str, ...] = ("a", "b")
    nothing: None = None
    scale: float = 0.5


def test_every_value_of_whatever_recipe_is_said(tmp_path: Path) -> None:
    manifest = made(tmp_path / "x", [Picture("a", grey(1), (0,))], ("a",))
    said(tmp_path / "x", replace(manifest, recipe={"group_one": asdict(Nested())}))
    assert facts(describe(str(tmp_path / "x")))["recipe"] == "group one: lossless yes, scale 0.5, tests a + b"


def test_a_set_whose_shards_lie_elsewhere_is_described_and_shown_as_if_they_lay_beside_it(tmp_path: Path) -> None:
    manifest = made(tmp_path / "x", [Picture(f"{n}", grey(20 * n), (0,)) for n in range(9)], ("a",))
    text, sheet = describe(str(tmp_path / "x")), contact_sheet(str(tmp_path / "x"))
    (tmp_path / "away").mkdir()
    (tmp_path / "x" / "000000.tar").rename(tmp_path / "away" / "000000.tar")
    said(tmp_path / "x", replace(manifest, tars=str(tmp_path / "away")))
    other = facts(describe(str(tmp_path / "x")))
    assert other["at"] == f"{tmp_path}/x, its shards at {tmp_path}/away"
    same = {"digest": "", "at": ""}
    assert facts(text) | same == other | same and contact_sheet(str(tmp_path / "x")) == sheet


def test_an_empty_set_is_described_and_has_no_sheet(tmp_path: Path) -> None:
    made(tmp_path / "x", [], ("a", "b"))
    found = facts(describe(str(tmp_path / "x")))
    assert found["pictures"].startswith("0 in 1 shard, ") and found["classes"] == "2, 2 empty"
    with pytest.raises(ValueError, match=f"{tmp_path}/x holds no picture to show"):
        contact_sheet(str(tmp_path / "x"))


# in pictures


@given(total=some.integers(0, 10**10), count=some.integers(1, 100))
def test_the_pictures_of_a_sheet_lie_evenly_whatever_their_number(total: int, count: int) -> None:
    numbers = evenly(total, count).tolist()
    assert len(numbers) == min(total, count) and numbers == sorted(set(numbers))
    assert all(0 <= number < total for number in numbers)
    if total >= count:
        steps = np.diff([-numbers[0] - 1, *numbers, 2 * total - 1 - numbers[-1]])
        assert steps.max() - steps.min() <= 2 and (total / count - 1 <= steps.min())


def cells(sheet: bytes, side: int, count: int) -> list[np.ndarray]:
    """The squares of pictures, read off the sheet by its margins alone."""
    with Image.open(BytesIO(sheet)) as opened:
        assert opened.format == "PNG" and opened.mode == "RGB"
        pixels = np.asarray(opened)
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    across, down = (pixels.shape[1] - 6) // columns, (pixels.shape[0] - 6) // rows
    places = [(6 + n // columns * down, 6 + n % columns * across) for n in range(count)]
    return [pixels[top : top + side, left : left + side] for top, left in places]


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (5, 5), (32, 32), (500, 32)])
def test_every_square_of_a_sheet_is_its_picture(tiny_set: str, count: int, shown: int) -> None:
    there = ShardSet(tiny_set)
    rows = [row for n in range(4) for row in there.rows(n).to_pylist()]
    squares = cells(contact_sheet(tiny_set, count, 24), 24, shown)
    for square, number in zip(squares, evenly(32, count).tolist(), strict=True):
        row = rows[number]
        name = there.manifest.shards[row["shard"]].name
        with Image.open(BytesIO(there.folder.read(name, row["offset"], row["offset"] + row["size"]))) as picture:
            wanted = np.asarray(picture.convert("RGB"))
        assert np.array_equal(square, wanted.repeat(2, axis=0).repeat(2, axis=1))


def test_the_same_set_gives_the_same_sheet_wherever_it_lies(tiny_set: str) -> None:
    there = Folder("memory://described")
    for path in Path(tiny_set).iterdir():
        there.write(path.name, path.read_bytes())
    assert contact_sheet(tiny_set) == contact_sheet(tiny_set) == contact_sheet(there.url)
    assert describe(tiny_set).splitlines()[2:] == describe(there.url).splitlines()[2:]


def test_a_sheet_reads_the_bytes_of_its_pictures_alone(tiny_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there, read, ours = ShardSet(tiny_set), [], Folder.read
    monkeypatch.setattr(
        Folder, "read", lambda self, name, *ends: (read.append((name, *ends)), ours(self, name, *ends))[1]
    )
    contact_sheet(tiny_set, 3)
    rows = [row for n in range(4) for row in there.rows(n).to_pylist()]
    chosen = [rows[number] for number in evenly(32, 3).tolist()]
    places = [(f"{row['shard']:06}.tar", row["offset"], row["offset"] + row["size"]) for row in chosen]
    assert sorted(one for one in read if one[0] != MANIFEST) == places


@pytest.mark.parametrize("names", [("x", "y"), ("cat", "cat's long name " * 9), ("Ä", "猫")])
def test_the_name_under_a_picture_is_drawn_within_its_width_whatever_it_is(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    sheets = []
    for label in (0, 1):
        made(tmp_path / f"{label}", [Picture("a", grey(0), (label,))], names)
        with Image.open(BytesIO(contact_sheet(str(tmp_path / f"{label}"), side=64))) as opened:
            sheets.append(np.asarray(opened.convert("L")))
    for sheet in sheets:
        below = sheet[6 + 64 :]
        assert below.min() < 100 and (below[:, :6] > 250).all() and (below[:, 6 + 64 :] > 250).all()
        assert (below[-1] == 255).all()
    assert not np.array_equal(*sheets)


def test_accents_are_left_out_under_a_picture_as_if_they_had_not_been_written(tmp_path: Path) -> None:
    for number, name in enumerate(("Ågren", "Agren")):
        made(tmp_path / f"{number}", [Picture("a", grey(0), (0,))], (name,))
    assert contact_sheet(str(tmp_path / "0")) == contact_sheet(str(tmp_path / "1"))


def test_a_picture_that_does_not_decode_is_named(tmp_path: Path) -> None:
    made(tmp_path / "x", [Picture("a", grey(1), (0,))], ("a",))
    tar = bytearray((tmp_path / "x" / "000000.tar").read_bytes())
    tar[512:540] = bytes(28)
    (tmp_path / "x" / "000000.tar").write_bytes(tar)
    with pytest.raises(ValueError, match=rf"{tmp_path}/x/000000.tar: a.png does not decode .*: verify the set"):
        contact_sheet(str(tmp_path / "x"))


@pytest.mark.parametrize(("count", "side"), [(0, 64), (-1, 64), (4, 0)])
def test_a_sheet_of_nothing_is_refused(tiny_set: str, count: int, side: int) -> None:
    with pytest.raises(ValueError, match=f"not {count} of {side}"):
        contact_sheet(tiny_set, count, side)
