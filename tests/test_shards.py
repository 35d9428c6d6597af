"""Laws of shards, from the bytes of a picture to the sets of a bucket."""

import gzip
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image

from shards.chance import permuted
from shards.datasets import THOUSAND, fashion_mnist, fashion_offset, find, known, thousand
from shards.image import Look, Refused, encode, look
from shards.manifest import INDEX, MANIFEST, Manifest, Shard, ShardSet
from shards.pack import pack
from shards.plan import Plan
from shards.sources import Arrays, Origin, Picture, idx
from shards.storage import Folder

pytestmark = pytest.mark.timeout(120)
DEBIAN = pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")


def pixels(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def pictures(count: int) -> Arrays:
    return Arrays([f"p{n:04}" for n in range(count)], pixels(count, 7, 9), np.arange(count, dtype=np.uint8) % 10)


# storage


@pytest.fixture(params=["folder", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "a")) if request.param == "folder" else Folder(request.getfixturevalue("s3"))


def test_every_folder_gives_back_what_was_put_into_it(folder: Folder, tmp_path: Path) -> None:
    assert folder.sizes() == {} and folder.folders() == [] and not folder.exists("x")
    folder.write("x", b"0123456789")
    folder.write("deep/er", b"1")
    (tmp_path / "local").write_bytes(b"local")
    folder.put(tmp_path / "local", "y")
    folder.get("y", tmp_path / "back" / "y")
    assert (tmp_path / "back" / "y").read_bytes() == b"local"
    assert (folder.read("x"), folder.read("x", 2, 5), (folder / "deep").read("er")) == (b"0123456789", b"234", b"1")
    assert (folder.sizes(), folder.folders()) == ({"x": 10, "y": 5}, ["deep"])
    assert (folder.size("x"), folder.size("z")) == (10, None)
    with pytest.raises(FileNotFoundError, match=f"{folder.absolute}/z"):
        folder.read("z")
    folder.remove("deep")
    folder.remove("deep")
    assert folder.folders() == [] and folder.size("x") == 10
    folder.check_writable()
    assert sorted(folder.sizes()) == ["x", "y"]


def test_the_mark_of_an_empty_folder_in_a_bucket_is_no_file_of_it(s3: str) -> None:
    files, root = Folder(s3).place
    files.pipe_file(f"{root}/made-by-hand/", b"")
    assert (Folder(s3) / "made-by-hand").sizes() == {}


def test_of_all_who_create_a_name_in_a_folder_one_is_told_that_it_did(folder: Folder) -> None:
    told = [folder.create("name", str(n).encode()) for n in range(4)]
    assert told == [True, False, False, False] and folder.read("name") == b"0"


def test_a_failing_put_leaves_nothing_under_any_name(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        folder.put(tmp_path / "nowhere", "x")
    assert folder.sizes() == {} and not folder.exists("x")


def test_a_write_that_the_disk_ends_leaves_what_was_there(tmp_path: Path) -> None:
    Folder(str(tmp_path)).write("x", b"before")
    limited = (
        "import resource, signal, sys; from shards.storage import Folder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "Folder(sys.argv[1]).write('x', b'a' * 100_000)"
    )
    ended = subprocess.run([sys.executable, "-c", limited, str(tmp_path)], capture_output=True, text=True)
    assert "File too large" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"before"


def test_what_a_killed_writer_leaves_is_no_file_of_the_folder_and_can_be_swept(tmp_path: Path) -> None:
    (tmp_path / f".x.{'0' * 32}").write_bytes(b"half")
    (tmp_path / ".hidden").write_bytes(b"")
    folder = Folder(str(tmp_path))
    assert folder.sizes() == {".hidden": 0}
    folder.sweep()
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


# plan


@given(count=some.integers(1, 3000), word=some.text(max_size=3))
@settings(max_examples=50, deadline=None)
def test_every_number_stands_at_exactly_one_place(count: int, word: str) -> None:
    assert sorted(permuted(np.arange(count), count, word)) == list(range(count))


@given(samples=some.integers(1, 2000), each=some.integers(1, 2500))
@settings(max_examples=50, deadline=None)
def test_every_picture_is_in_exactly_one_of_equal_shards(samples: int, each: int) -> None:
    plan = Plan(samples, each, "word")
    shards = [plan.numbers(shard) for shard in range(plan.shards)]
    assert sorted(np.concatenate(shards)) == list(range(samples))
    assert [len(shard) for shard in shards] == [plan.size(shard) for shard in range(plan.shards)]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_shard_of_a_thousand_million_pictures_is_drawn_without_the_others() -> None:
    numbers = Plan(10**9, 10_000, "word").numbers(77_777)
    assert len(set(numbers.tolist())) == 10_000 and numbers.min() >= 0 and 9e8 < numbers.max() < 10**9


# pictures


@given(height=some.integers(1, 20), width=some.integers(1, 20), colours=some.booleans())
@settings(max_examples=30, deadline=None)
def test_every_encoded_picture_decodes_to_its_pixels(height: int, width: int, colours: bool) -> None:
    wanted = pixels(1, height, width, *([3] if colours else []))[0]
    data = encode(wanted)
    assert data == encode(wanted.copy()) and look(data) == Look(width, height, "png")
    with Image.open(BytesIO(data)) as picture:
        assert picture.mode == ("RGB" if colours else "L") and np.array_equal(np.asarray(picture), wanted)


def test_every_unusable_picture_is_refused_under_a_name() -> None:
    whole, gif = encode(pixels(1, 40, 40)[0]), BytesIO()
    Image.fromarray(pixels(1, 4, 4)[0]).save(gif, "GIF")
    assert look(b"") is Refused.EMPTY
    assert look(b"<html>") is Refused.NOT_A_PICTURE
    assert look(gif.getvalue()) is Refused.NOT_A_PICTURE
    assert look(whole[: len(whole) // 2]) is Refused.TRUNCATED
    assert look(whole[:60] + b"\0\0\0\0" + whole[64:]) is Refused.DAMAGED


# IDX


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.mark.parametrize("compressed", [True, False])
def test_every_idx_file_gives_its_array_plain_or_compressed(tmp_path: Path, compressed: bool) -> None:
    wanted = pixels(5, 3, 4)
    data = idx_bytes(wanted)
    (tmp_path / ("x.gz" if compressed else "x")).write_bytes(gzip.compress(data) if compressed else data)
    assert np.array_equal(idx.read(Folder(str(tmp_path)), "x", 3), wanted)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:9], "cut short"),
        (lambda data: data + b"0", "too long"),
        (lambda data: b"\0\0\x0d" + data[3:], "magic 0x00000d03, expected 0x00000803"),
        (lambda data: b"", "magic"),
        (lambda data: gzip.compress(data)[:-20], "damaged"),
        (lambda data: gzip.compress(data)[:30] + b"xxxx" + gzip.compress(data)[34:], "damaged"),
    ],
)
def test_every_damaged_idx_file_is_refused_by_name(tmp_path: Path, damage, words: str) -> None:
    (tmp_path / "x").write_bytes(damage(idx_bytes(pixels(5, 3, 4))))
    with pytest.raises(ValueError, match=f"{tmp_path}/x.*{words}"):
        idx.read(Folder(str(tmp_path)), "x", 3)


def test_idx_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(idx_bytes(pixels(5, 3, 4)))
    (tmp_path / "y").write_bytes(idx_bytes(pixels(6)))
    with pytest.raises(ValueError, match="x holds 5 pictures, y 6 labels"):
        idx.pair(Folder(str(tmp_path)), "x", "y")
    with pytest.raises(FileNotFoundError, match=r"neither z\.gz nor z"):
        idx.pair(Folder(str(tmp_path)), "z", "y")


# data sets


def test_an_unknown_data_set_is_refused_with_those_that_are_called_alike() -> None:
    with pytest.raises(ValueError, match=r"no data set 'minst'; do you mean mnist\? prepare.py --list shows the \d+"):
        find("minst")


@pytest.mark.slow
@DEBIAN
@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "fashion_offset", "mnist"])
def test_every_split_has_its_pictures_of_every_class_and_shares_none(name: str, tmp_path: Path) -> None:
    dataset, keys = find(name), []
    assert name in known() and dataset.name == name
    for split in dataset.splits:
        found = dataset.pictures(split, Origin(downloads=Folder(str(tmp_path))))
        assert isinstance(found, Arrays)
        assert set(found.labels.tolist()) == set(range(len(dataset.classes)))
        keys += found.keys
    assert len(keys) == len(set(keys)) == sum(dataset.splits.values())


def test_every_picture_of_a_task_is_in_one_split_whatever_their_number() -> None:
    splits = [thousand("name", split, 1234).tolist() for split in THOUSAND]
    assert [len(split) for split in splits] == [800, 200, 234]
    assert sorted(number for split in splits for number in split) == list(range(1234))


@DEBIAN
def test_every_garment_lies_where_its_label_says(tmp_path: Path) -> None:
    found = fashion_offset.read("val200", Origin())
    garments = fashion_mnist.read("test", Origin())
    for key, canvas, label in zip(found.keys, found.pixels, found.labels, strict=True):
        across, down = (int(place[0]) for place in fashion_offset.offsets(np.array([int(key)])))
        assert np.array_equal(canvas[down : down + 28, across : across + 28], garments.pixels[int(key)])
        assert int(canvas.sum()) == int(garments.pixels[int(key)].sum())
        first, last = (int(word) for word in fashion_offset.DATASET.classes[label].split()[::2][:2])
        assert first <= across <= last


@DEBIAN
def test_fashion_mnist_that_differs_in_one_byte_is_refused(tmp_path: Path) -> None:
    for name in fashion_mnist.FILES["test"]:
        data = bytearray(gzip.decompress((fashion_mnist.DEBIAN / f"{name}.gz").read_bytes()))
        data[-1] ^= 1 if "images" in name else 0
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte is not the published file"):
        fashion_mnist.read("test", Origin(str(tmp_path)))


def test_a_source_for_a_data_set_that_has_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it takes no --source"):
        find("digits").pictures("test", Origin("/x"))


# shards


@dataclass(frozen=True)
class Given:
    """Pictures just as a test says them."""

    them: list[Picture]

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.them)


def test_the_same_pictures_give_the_same_bytes(tmp_path: Path) -> None:
    packed = [pack(3, pictures(50), tmp_path / f"{n}.tar").shard.sha256 for n in range(2)]
    assert packed[0] == packed[1]


def test_every_row_of_the_index_says_where_a_pictures_bytes_are(tmp_path: Path) -> None:
    packed = pack(3, pictures(50), tmp_path / "000003.tar")
    data = (tmp_path / "000003.tar").read_bytes()
    with tarfile.open(tmp_path / "000003.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert packed.rows.num_rows == packed.shard.samples == 50 and len(members) == 100
    for row, picture in zip(packed.rows.to_pylist(), pictures(50), strict=True):
        assert data[row["offset"] : row["offset"] + row["size"]] == members[row["member"]] == encode(picture.data)
        assert (row["shard"], row["key"], row["labels"]) == (3, picture.key, list(picture.labels))
        assert (row["width"], row["height"]) == (9, 7)
        assert members[f"{picture.key}.cls"] == str(picture.labels[0]).encode()


def test_stock_webdataset_reads_every_shard(tmp_path: Path) -> None:
    pack(0, pictures(20), tmp_path / "000000.tar")
    read = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode("l8"))
    for sample, picture in zip(read, pictures(20), strict=True):
        assert (sample["__key__"], sample["cls"]) == (picture.key, picture.labels[0])
        assert np.array_equal(sample["png"].squeeze(), picture.data)


def test_every_picture_is_packed_or_counted_as_refused(tmp_path: Path) -> None:
    whole = encode(pixels(1, 40, 40)[0])
    jpeg = BytesIO()
    Image.fromarray(pixels(1, 8, 8)[0]).save(jpeg, "JPEG")
    given = [("a", whole, (1,)), ("b", whole[:200], (2,)), ("c", jpeg.getvalue(), (1, 2)), ("d", b"", ())]
    packed = pack(0, Given([Picture(*one) for one in given]), tmp_path / "000000.tar")
    assert packed.refused == [("b", "truncated"), ("d", "empty")]
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert tar.getnames() == ["a.png", "a.cls", "c.jpg", "c.json"]
        assert json.load(tar.extractfile("c.json")) == {"labels": [1, 2]}  # type: ignore[arg-type]


@pytest.mark.parametrize(("keys", "words"), [(["a.b"], "cannot name"), (["a/b"], "cannot name"), (["a", "a"], "two")])
def test_a_key_that_webdataset_would_misread_is_refused(tmp_path: Path, keys: list[str], words: str) -> None:
    given = Given([Picture(key, pixels(1, 4, 4)[0], (0,)) for key in keys])
    with pytest.raises(ValueError, match=words):
        pack(0, given, tmp_path / "x.tar")


# sets


@pytest.fixture
def shard_set(tmp_path: Path) -> Path:
    """A whole set of one shard, whose manifest's index digest is right."""
    import pyarrow.parquet as pq

    from shards.storage import digest

    packed = pack(0, pictures(10), tmp_path / "000000.tar")
    pq.write_table(packed.rows, tmp_path / INDEX)
    made = Manifest("test/set", {}, ("a",) * 10, (packed.shard,), {INDEX: digest(tmp_path / INDEX)}, {})
    (tmp_path / MANIFEST).write_bytes(made.to_json())
    return tmp_path


def test_a_whole_set_is_read_as_it_was_written(shard_set: Path) -> None:
    found = ShardSet(str(shard_set))
    assert found.manifest.samples == found.rows(0).num_rows == 10
    assert Manifest.from_json(found.manifest.to_json(), "here") == found.manifest


def _short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda to: (to / MANIFEST).unlink(), "manifest.json does not exist: the set was not finished"),
        (lambda to: (to / "000000.tar").unlink(), "000000.tar is missing"),
        (lambda to: _short(to / "000000.tar"), r"000000.tar has \d+ bytes"),
        (lambda to: (to / INDEX).unlink(), "index.parquet is missing"),
        (lambda to: _short(to / INDEX), "index.parquet is damaged"),
        (lambda to: _short(to / MANIFEST) or _short(to / MANIFEST), "manifest.json is not a manifest"),
        (lambda to: (to / MANIFEST).write_bytes(b"\xff\xfe"), "manifest.json is not a manifest"),
        (lambda to: (to / MANIFEST).write_bytes(b"[]"), "manifest.json is not a manifest"),
        (lambda to: _edit(to, format=99), "manifest.json has format 99, this version reads 2"),
        (lambda to: _edit(to, name="other"), "manifest.json is damaged"),
        (lambda to: _edit(to, root=None), "manifest.json is not a manifest: KeyError 'root'"),
    ],
)
def test_every_damaged_set_is_refused_naming_the_file(shard_set: Path, damage, words: str) -> None:
    damage(shard_set)
    with pytest.raises(ValueError, match=f"{shard_set}/{words}"):
        ShardSet(str(shard_set)).rows(0)


def _edit(to: Path, **changed: object) -> None:
    values = json.loads((to / MANIFEST).read_bytes()) | changed
    (to / MANIFEST).write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_a_folder_that_is_not_there_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no shard set at {tmp_path}/x"):
        ShardSet(str(tmp_path / "x"))


def test_two_sets_that_differ_in_anything_have_different_roots() -> None:
    first = Manifest("a", {"x": 1}, ("c",), (Shard("000000.tar", 1, 2, "d"),), {INDEX: "e"}, {})
    others = [
        Manifest("b", {"x": 1}, ("c",), first.shards, {INDEX: "e"}, {}),
        Manifest("a", {"x": 2}, ("c",), first.shards, {INDEX: "e"}, {}),
        Manifest("a", {"x": 1}, ("d",), first.shards, {INDEX: "e"}, {}),
        Manifest("a", {"x": 1}, ("c",), (Shard("000000.tar", 1, 2, "f"),), {INDEX: "e"}, {}),
        Manifest("a", {"x": 1}, ("c",), first.shards, {INDEX: "f"}, {}),
        Manifest("a", {"x": 1}, ("c",), first.shards, {INDEX: "e"}, {"empty": 1}),
    ]
    assert len({first.root, *(other.root for other in others)}) == 1 + len(others)
