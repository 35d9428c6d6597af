"""Our shards are read by other people's libraries, and theirs are indexed by us where they lie."""

import gzip
import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image
from webdataset.tariterators import base_plus_ext

from shards.manifest import ShardSet
from shards.pack import Packed, pack
from shards.sources import Picture
from shards.sources.webdataset import expand, index_shard, split
from shards.storage import Folder, digest
from tests import tiny

pytestmark = pytest.mark.timeout(60)


def pixels(number: int, height: int = 9, width: int = 13) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def encoded(picture: np.ndarray, kind: str = "JPEG") -> bytes:
    data = BytesIO()
    Image.fromarray(picture).save(data, kind)
    return data.getvalue()


JPEG = encoded(pixels(0))


# ours, read by others


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return tiny.shard_set(tmp_path_factory.mktemp("ours") / "set")


def wanted(ours: ShardSet) -> list[tuple[str, int, np.ndarray]]:
    """Key, label and pixels of each picture, by the index."""
    found = []
    for number, shard in enumerate(ours.manifest.shards):
        for row in ours.rows(number).to_pylist():
            data = ours.folder.read(shard.name, row["offset"], row["offset"] + row["size"])
            with Image.open(BytesIO(data)) as picture:
                found.append((row["key"], row["labels"][0], np.asarray(picture)))
    return found


def test_stock_webdataset_reads_every_picture_and_label_of_our_sets(ours: ShardSet) -> None:
    urls = f"{ours.folder}/{{000000..{len(ours.manifest.shards) - 1:06}}}.tar"
    stream = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "jpg;png;webp", "cls")
    read, there = list(stream), wanted(ours)
    assert [(key, label) for key, _, label in read] == [(key, label) for key, label, _ in there]
    assert all(np.array_equal(one[1], other[2]) for one, other in zip(read, there, strict=True))


def test_hugging_face_datasets_streams_every_picture_and_label_of_our_sets(
    ours: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    files = [f"{ours.folder}/{shard.name}" for shard in ours.manifest.shards]
    stream = datasets.load_dataset(
        "webdataset", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path)
    )
    read, there = list(stream), wanted(ours)
    assert [(row["__key__"], row["cls"]) for row in read] == [(key, label) for key, label, _ in there]
    assert all(np.array_equal(np.asarray(row["png"]), one[2]) for row, one in zip(read, there, strict=True))


def test_pictures_of_several_labels_or_none_are_read_by_stock_webdataset_as_they_were_packed(tmp_path: Path) -> None:
    given = [Picture(f"p{n}", pixels(n), tuple(range(n))) for n in (0, 2, 3)]
    pack(0, given, tmp_path / "000000.tar")
    read = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode("rgb8"))
    assert [(sample["__key__"], sample["json"]["labels"]) for sample in read] == [
        (picture.key, list(picture.labels)) for picture in given
    ]
    for sample, picture in zip(read, given, strict=True):
        assert np.array_equal(sample["png"], picture.data)


# others', indexed by us


def check(packed: Packed, file: Path, number: int, pictures: list[tuple[str, bytes, list[int]]]) -> None:
    """The index says this of every picture, and the bytes at its place are the picture's own."""
    data, rows = file.read_bytes(), packed.rows.to_pylist()
    assert [(row["key"], row["labels"]) for row in rows] == [(key, labels) for key, _, labels in pictures]
    for row, (_, picture, _) in zip(rows, pictures, strict=True):
        assert data[row["offset"] : row["offset"] + row["size"]] == picture and row["shard"] == number
        with Image.open(BytesIO(picture)) as opened:
            assert (row["width"], row["height"]) == opened.size
    assert (packed.shard.name, packed.shard.samples) == (file.name, len(pictures))
    assert (packed.shard.bytes, packed.shard.sha256) == (len(data), digest(file))


def test_our_own_shards_are_indexed_as_they_were_packed(ours: ShardSet, tmp_path: Path) -> None:
    for number, shard in enumerate(ours.manifest.shards):
        packed = index_shard(ours.folder, shard.name, number)
        assert packed.rows.equals(ours.rows(number)) and (packed.shard, packed.refused) == (shard, [])
    made = pack(7, [Picture(f"p{n}", pixels(n), tuple(range(n))) for n in range(4)], tmp_path / "x.tar")
    assert index_shard(Folder(str(tmp_path)), "x.tar", 7) == made


@pytest.mark.parametrize("place", ["folder", "store"])
@pytest.mark.parametrize("label", ["cls", "json"])
def test_every_shard_of_stock_shardwriter_is_indexed_in_place(tmp_path: Path, label: str, place: str) -> None:
    extension, kind = ("jpg", "JPEG") if label == "cls" else ("png", "PNG")
    pictures = [(f"n{n % 3}/a b.d/sample-é{n:03}", encoded(pixels(n, 5 + n, 40 - n), kind), [n]) for n in range(25)]
    with webdataset.ShardWriter(str(tmp_path / "%06d.tar"), maxcount=10, verbose=False) as writer:
        for key, data, labels in pictures:
            said = labels[0] if label == "cls" else {"caption": "a thing", "label": labels[0]}
            writer.write({"__key__": key, extension: data, label: said})
    folder, names = stored(tmp_path) if place == "store" else expand(str(tmp_path))
    assert names == ["000000.tar", "000001.tar", "000002.tar"]
    for number, name in enumerate(names):
        packed = index_shard(folder, name, number)
        check(packed, tmp_path / name, number, pictures[10 * number : 10 * number + 10])
        assert packed.refused == [] and packed.rows["member"][0].as_py().endswith(f".{extension}")


def stored(local: Path) -> tuple[Folder, list[str]]:
    """The files of a folder in a store that is reached by fsspec alone."""
    there = Folder(f"memory://{local.name}")
    for path in local.iterdir():
        there.write(path.name, path.read_bytes())
    return expand(there.url)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


def written(file: Path, members: list[tuple[str, bytes]], dialect: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(file, "w", format=dialect) as tar:
        for name, data in members:
            add(tar, name, data)
    return file


def index(file: Path, field: str = "") -> Packed:
    return index_shard(Folder(str(file.parent)), file.name, 0, field)


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """What img2dataset leaves (output_format=webdataset): a tar, a table and a report a shard; no label anywhere."""
    members, rows = [], []
    for n in range(4):
        about = {"key": f"{n:09}", "caption": f"the {n}th", "status": "success", "width": 13, "class_id": 10.0 * n}
        members += [(f"{n:09}.jpg", encoded(pixels(n))), (f"{n:09}.txt", about["caption"].encode())]
        members.append((f"{n:09}.json", json.dumps(about, indent=4).encode()))
        rows.append(about)
    written(tmp_path / "00000.tar", members, tarfile.PAX_FORMAT)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 5, "successes": 4}))
    return tmp_path


def test_every_picture_of_img2dataset_is_refused_for_want_of_a_label_until_a_field_is_chosen(downloaded: Path) -> None:
    folder, names = expand(str(downloaded))
    assert names == ["00000.tar"]
    packed = index_shard(folder, names[0], 3)
    assert packed.refused == [(f"{n:09}", "no label") for n in range(4)] and packed.rows.num_rows == 0
    pictures = [(f"{n:09}", encoded(pixels(n)), [10 * n]) for n in range(4)]
    check(index_shard(folder, names[0], 3, "class_id"), downloaded / names[0], 3, pictures)
    with pytest.raises(ValueError, match=r"00000.tar: 000000000.json at byte .* gives no label \('the 0th' is none\)"):
        index_shard(folder, names[0], 3, "caption")


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar_gives_the_same_rows_but_for_their_places(tmp_path: Path, dialect: int) -> None:
    pictures = [(f"{'deep/' * 25}p{n}", encoded(pixels(n)), [n]) for n in range(5)]
    members = [(f"{key}{end}", data) for key, jpeg, (label,) in pictures for end, data in files(jpeg, label)]
    check(index(written(tmp_path / "x.tar", members, dialect)), tmp_path / "x.tar", 0, pictures)


def files(jpeg: bytes, label: int) -> list[tuple[str, bytes]]:
    return [(".JPEG", jpeg), (".cls", f" {label}\n".encode()), (".seg.png", b"a mask of the same sample")]


@given(path=some.text(some.sampled_from("aB._-é /"), min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
def test_every_name_that_is_not_hidden_is_split_as_webdataset_splits_it(path: str) -> None:
    last = path.rpartition("/")[2]
    if not last or last.startswith("."):
        assert split(path) is None
        return
    key, extension = base_plus_ext(path)
    assert split(path) == (None if key is None else (key, extension.lower()))


def test_samples_are_those_that_stock_webdataset_sees_whatever_else_is_in_the_tar(tmp_path: Path) -> None:
    names = ["__index__/x.jpg", "__remark__", "a/._p.jpg", "LICENCE", "p.jpg", "p.cls", "a/p.jpg", "a/p.cls", "q.cls"]
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w") as tar:
        for name in names:
            folder = tarfile.TarInfo("a")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            link = tarfile.TarInfo(f"link-{name}")
            link.type, link.linkname = tarfile.SYMTYPE, name
            tar.addfile(link)
            add(tar, name, JPEG if name.endswith("jpg") else b"1")
    packed = index(file)
    check(packed, file, 0, [("p", JPEG, [1]), ("a/p", JPEG, [1])])
    assert packed.refused == [("q", "no picture")]
    seen = [sample["__key__"] for sample in webdataset.WebDataset(str(file), shardshuffle=False)]
    assert [key for key in seen if key != "a/"] == ["p", "a/p", "q"]  # "a/" is what it makes of a hidden file


def test_of_several_pictures_in_a_sample_the_first_extension_is_taken_whatever_their_order(tmp_path: Path) -> None:
    members = [("a.webp", b""), ("a.PNG", encoded(pixels(1), "PNG")), ("a.Jpg", JPEG), ("a.cls", b"2")]
    for order in (members, members[::-1]):
        check(index(written(tmp_path / "x.tar", order)), tmp_path / "x.tar", 0, [("a", JPEG, [2])])


@pytest.mark.parametrize(
    ("about", "labels"),
    [
        ({"label": 3}, [3]),
        ({"labels": [3, 1]}, [3, 1]),
        ({"labels": []}, []),
        ({"cls": "4"}, [4]),
        ({"class": 5.0}, [5]),
        ({"label": None, "class": 6}, [6]),
        ({"class": 7, "cls": 8, "labels": 9}, [9]),
        ({"labels": None}, None),
        ({}, None),
        ([1, 2], None),
    ],
)
def test_every_usual_field_of_a_json_gives_its_labels(tmp_path: Path, about: Any, labels: list[int] | None) -> None:
    packed = index(written(tmp_path / "x.tar", [("a.jpg", JPEG), ("a.json", json.dumps(about).encode())]))
    assert packed.rows["labels"].to_pylist() == ([] if labels is None else [labels])
    assert packed.refused == ([("a", "no label")] if labels is None else [])


def test_a_chosen_field_decides_whatever_other_labels_there_are(tmp_path: Path) -> None:
    file = written(tmp_path / "x.tar", [("a.jpg", JPEG), ("a.cls", b"1"), ("a.json", b'{"label": 2, "fine": 3}')])
    found = [index(file, field).rows["labels"].to_pylist() for field in ("", "label", "fine", "coarse")]
    assert found == [[[1]], [[2]], [[3]], []]


def test_every_sample_is_in_the_index_or_refused_under_a_name(tmp_path: Path) -> None:
    members = [("a.jpg", JPEG), ("a.cls", b"0"), ("b.txt", b"?"), ("c.jpg", JPEG), ("d.jpg", JPEG[:300])]
    members += [("d.cls", b"1"), ("e.jpg", b""), ("e.cls", b"1"), ("f.jpg", b"<html>"), ("f.cls", b"2")]
    packed = index(written(tmp_path / "x.tar", members))
    check(packed, tmp_path / "x.tar", 0, [("a", JPEG, [0])])
    refused = {"b": "no picture", "c": "no label", "d": "truncated", "e": "empty", "f": "not a picture"}
    assert dict(packed.refused) == refused and len(packed.refused) == len(refused)


@pytest.mark.parametrize("given", [b"cat", b"", b"-1", b"1.5", b"[1]", b"\xff", b"3000000000", b"true", "²".encode()])
@pytest.mark.parametrize("kind", ["cls", "json"])
def test_every_label_that_is_no_number_is_refused_naming_its_place(tmp_path: Path, given: bytes, kind: str) -> None:
    said = given if kind == "cls" else b'{"label": ' + given.replace(b"[1]", b'["x"]') + b"}"
    file = written(tmp_path / "x.tar", [("a.jpg", JPEG), (f"a.{kind}", said)])
    with pytest.raises(ValueError, match=f"{file}: a.{kind} at byte 1,536 gives no label"):
        index(file)


@pytest.mark.parametrize("names", [["a.jpg", "a.JPG", "a.cls"], ["a.jpg", "b.jpg", "a.cls"]])
def test_every_key_that_is_there_twice_is_refused_naming_its_place(tmp_path: Path, names: list[str]) -> None:
    file = written(tmp_path / "x.tar", [(name, JPEG if name.lower().endswith("jpg") else b"1") for name in names])
    with pytest.raises(ValueError, match=rf"{file}: two samples have the key 'a', the second at byte [\d,]+;"):
        index(file)


def test_a_name_that_is_no_text_is_spelt_out_and_its_picture_found(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "café.jpg", JPEG)
        add(tar, "café.cls", b"1")
    check(index(tmp_path / "x.tar"), tmp_path / "x.tar", 0, [(r"caf\xe9", JPEG, [1])])


# damage


@pytest.fixture(scope="module")
def sound() -> bytes:
    data = BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for n in range(3):
            add(tar, f"{'long-' * 30}é{n}.jpg", JPEG)
            add(tar, f"{'long-' * 30}é{n}.cls", b"1")
    return data.getvalue()


@given(some.data())
@settings(max_examples=150, deadline=None)
def test_a_tar_cut_anywhere_before_its_end_is_refused_naming_file_and_byte(
    tmp_path_factory: pytest.TempPathFactory, sound: bytes, choice: some.DataObject
) -> None:
    end = len(sound.rstrip(b"\0")) // 512 * 512 + 512
    cut = choice.draw(some.integers(0, end + 511))
    file = tmp_path_factory.getbasetemp() / "cut.tar"
    file.write_bytes(sound[:cut])
    with pytest.raises(ValueError, match=rf"^{file} is (empty|.*at byte [\d,]+.*; fetch or make it again)"):
        index(file)
    file.write_bytes(sound[: end + 512])
    assert index(file).shard.samples == 3


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:700], r"is cut short: it ends at byte 700, within a.jpg, which starts at byte 512"),
        (lambda data: data[: data.index(b"b.jpg")], r"is cut short: it ends at byte [\d,]+ without the mark"),
        (lambda data: data.replace(b"b.jpg", b"b.jpx"), r"is damaged: at byte [\d,]+ is no header"),
        (lambda data: data + data, r"goes on behind its end at byte [\d,]+"),
        (lambda data: b"<html>" * 1000, "is no tar"),
        (lambda data: b"", "is empty"),
        (gzip.compress, "is compressed and cannot be read by place: unpack it or make shards anew"),
    ],
)
def test_every_damaged_tar_is_refused_naming_file_and_byte(
    tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    members = [("a.jpg", JPEG), ("a.cls", b"1"), ("b.jpg", JPEG), ("b.cls", b"1")]
    file = written(tmp_path / "x.tar", members, tarfile.USTAR_FORMAT)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"^{file} {words}"):
        index(file)


@pytest.mark.parametrize("url", ["{}", "memory://nowhere"])
def test_a_shard_that_is_not_there_is_named(tmp_path: Path, url: str) -> None:
    folder = Folder(url.format(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{folder}/x.tar does not exist"):
        index_shard(folder, "x.tar", 0)


def test_a_file_that_is_stored_with_holes_is_refused_naming_it(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.size = len(JPEG)
    holes = {"GNU.sparse.map": f"512,{len(JPEG)}", "GNU.sparse.size": f"{512 + len(JPEG)}"}
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", **holes}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, BytesIO(JPEG))
    with pytest.raises(ValueError, match=f"{tmp_path}/x.tar: a.jpg at byte 0 is stored with holes"):
        index(tmp_path / "x.tar")


# which shards


@given(
    first=some.integers(0, 30),
    count=some.integers(0, 30),
    digits=some.integers(3, 6),
    folder=some.sampled_from(["s3://bucket/a", "/data", "https://host/x/y", "memory://m"]),
)
@settings(max_examples=50, deadline=None)
def test_every_brace_pattern_means_its_files_in_order(first: int, count: int, digits: int, folder: str) -> None:
    low, high = (f"{number:0{digits}}" for number in (first, first + count))
    there, names = expand(f"{folder}/part-{{{low}..{high}}}.tar")
    assert there == Folder(f"{folder}/")
    assert names == [f"part-{number:0{digits}}.tar" for number in range(first, first + count + 1)]


def test_a_folder_means_every_tar_directly_in_it_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.tar", "a.tar", "a.parquet", ".hidden.tar", "c.tar.gz", "deep/d.tar"):
        (tmp_path / name).touch()
    assert expand(str(tmp_path)) == (Folder(str(tmp_path)), ["a.tar", "b.tar"])
    assert expand(f"{tmp_path}/b.tar")[1] == ["b.tar"]
    assert [name for _, name in webdataset_urls(f"{tmp_path}/{{a,b}}.tar")] == expand(f"{tmp_path}/{{a,b}}.tar")[1]


def webdataset_urls(url: str) -> list[tuple[str, str]]:
    places = [each["url"] for each in webdataset.SimpleShardList(url)]
    return [(place.rpartition("/")[0], place.rpartition("/")[2]) for place in places]


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("/x/{0..3.tar", ValueError, r"^/x/\{0\.\.3\.tar is no pattern of shards"),
        ("/x/{a,b}/0.tar", ValueError, "means files of 2 folders"),
        ("/x/{0,0}.tar", ValueError, "means the same file twice"),
        ("/x/{0..3}.tar.gz", ValueError, "is compressed and cannot be read by place"),
        ("memory://empty", FileNotFoundError, r"there is no \*\.tar in memory://empty"),
    ],
)
def test_every_url_that_means_no_shards_is_refused(url: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        expand(url)


def test_a_folder_of_compressed_tars_is_refused_naming_the_first(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").touch()
    with pytest.raises(ValueError, match=f"{tmp_path}/0.tar.gz is compressed and cannot be read by place"):
        expand(str(tmp_path))
