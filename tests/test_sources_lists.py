"""Laws of what is listed: class folders, list files, Parquet with embedded pictures, and the tasks of VTAB-1k."""

import csv
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar, cast

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from PIL import Image

from shards.datasets import Dataset, vtab
from shards.sources import LISTING, Origin, Ranges, folders, key, lists, located, parquet
from shards.sources.parquet import Rows
from shards.storage import Folder

pytestmark = pytest.mark.timeout(60)


def encoded(number: int) -> bytes:
    """A JPEG that no other number has."""
    file = BytesIO()
    Image.fromarray(np.full((2 + number % 3, 4, 3), number % 251, np.uint8)).save(file, "JPEG", comment=str(number))
    return file.getvalue()


def silent(line: str) -> None:
    raise AssertionError(f"nothing was to be said: {line}")


def origin(source: Any, *classes: str) -> Origin:
    return Origin(str(source), classes=classes, say=silent)


def seen(pictures: Ranges) -> list[tuple[str, str, list[int], int]]:
    """Key, file, labels and size of every picture."""
    rows = pictures.table.to_pylist()
    assert pictures.table.schema == LISTING and [row["offset"] for row in rows] == [0] * len(rows)
    return [(row["key"], pictures.files[row["file"]].as_py(), row["labels"], row["size"]) for row in rows]


# class folders

TREE = {
    "n02/n02_1.JPEG": 1,
    "n02/n02_10.JPEG": 2,
    "n01/n01_3.JPEG": 3,
    "n01/day/a b.png": 4,
    "n01/day/night/c.jpg": 5,
    "n10/x.webp": 6,
}
LISTED = [
    ("n01-day-a_b-", "n01/day/a b.png", [0]),
    ("n01-day-night-c", "n01/day/night/c.jpg", [0]),
    ("n01_3", "n01/n01_3.JPEG", [0]),
    ("n02_1", "n02/n02_1.JPEG", [1]),
    ("n02_10", "n02/n02_10.JPEG", [1]),
    ("n10-x", "n10/x.webp", [2]),
]


def planted(root: Folder, tree: dict[str, int] | None = None) -> str:
    for name, number in (TREE if tree is None else tree).items():
        root.write(name, encoded(number))
    return root.absolute


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://listed"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["disk", "memory", "http", "bucket"])
def everywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Folder, str]]:
    """A folder to write to, and the URL at which it is read."""
    if request.param == "bucket":
        s3 = request.getfixturevalue("s3")
        yield Folder(s3), s3
    elif request.param == "memory":
        url = request.getfixturevalue("memory")
        yield Folder(url), url
    elif request.param == "disk":
        yield Folder(str(tmp_path)), str(tmp_path)
    else:
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            yield Folder(str(tmp_path)), f"http://127.0.0.1:{server.server_port}"
            server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, and parts of its files, as web servers do."""

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked:
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_class_folders_give_the_same_pictures_wherever_they_lie(everywhere: tuple[Folder, str]) -> None:
    written, url = everywhere
    planted(written, {name: number for name, number in TREE.items() if " " not in name})
    found = folders.read(origin(url))
    assert found.classes == ("n01", "n02", "n10")
    assert [row[:3] for row in seen(found)] == [row for row in LISTED if " " not in row[1]]
    for _, file, _, size in seen(found):
        with fsspec.open(located(found.root, file)) as opened:
            data = cast(Any, opened).read()
        assert data == encoded(TREE[file]) and size == len(data)


def test_pictures_are_taken_in_the_order_of_names_whatever_order_the_disk_gives(tmp_path: Path, monkeypatch) -> None:
    planted(Folder(str(tmp_path)))
    wanted = folders.read(origin(tmp_path))
    scan = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with scan(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *error: object) -> None:
            pass

        def __iter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self.entries)

    find = Folder.find
    monkeypatch.setattr(os, "scandir", Backwards)
    monkeypatch.setattr(Folder, "find", lambda folder: reversed(list(find(folder))))
    assert seen(folders.read(origin(tmp_path))) == seen(wanted)
    assert [file for _, file, _, _ in seen(wanted)] == [file for _, file, _ in LISTED]


def test_every_picture_of_a_listing_can_be_read_and_carries_its_label(tmp_path: Path) -> None:
    planted(Folder(str(tmp_path)))
    found = {picture.key: picture for picture in folders.read(origin(tmp_path))}
    assert len(found) == len(LISTED)
    for name, file, labels in LISTED:
        (picture,) = [picture for each, picture in found.items() if each.startswith(name) and each == key(file)]
        assert picture.data == encoded(TREE[file]) and list(picture.labels) == labels


def test_a_listing_is_the_same_as_if_it_were_made_in_any_number_of_parts(tmp_path: Path, monkeypatch) -> None:
    planted(Folder(str(tmp_path)), {f"c{number % 7}/{number}.jpg": number for number in range(30)})
    wanted, made = seen(folders.read(origin(tmp_path))), []

    def far(work: Callable[..., Any], arguments: Any) -> Iterator[Any]:
        for argument in arguments:
            made.append(argument)
            yield pickle.loads(pickle.dumps(work))(*pickle.loads(pickle.dumps(argument)))

    for parts in (1, 2, 3, 7, 100):
        made.clear()
        monkeypatch.setattr(folders, "_PARTS", parts)
        assert seen(folders.read(replace(origin(tmp_path), spread=far))) == wanted
        assert len(made) in (parts, min(parts, 7))


def test_every_file_that_is_no_picture_is_left_out_and_counted(tmp_path: Path) -> None:
    planted(Folder(str(tmp_path)))
    for name in ("README", "n01/notes.txt", "n01/.hidden.jpg", "n02/.thumbs/n02_1.jpg", ".git/a/x.jpg"):
        Folder(str(tmp_path)).write(name, b"x")
    said: list[str] = []
    found = folders.read(replace(origin(tmp_path), say=said.append))
    assert len(found) == len(TREE) and found.classes == ("n01", "n02", "n10")
    assert said == [f"{tmp_path}: 4 files that are no pictures are left out, README the first"]


def test_links_are_what_they_lead_to_as_if_they_were_copies(tmp_path: Path) -> None:
    planted(Folder(str(tmp_path / "real")))
    linked = tmp_path / "linked"
    (linked / "n02").mkdir(parents=True)
    (linked / "n01").symlink_to(tmp_path / "real" / "n01")
    (linked / "n10").symlink_to("../real/n10")
    for name in ("n02_1.JPEG", "n02_10.JPEG"):
        (linked / "n02" / name).symlink_to(tmp_path / "real" / "n02" / name)
    (linked / "n10" / "round").symlink_to(linked / "n10")
    assert seen(folders.read(origin(linked))) == seen(folders.read(origin(tmp_path / "real")))


def test_given_classes_number_the_folders_whatever_their_order_and_may_be_more(tmp_path: Path) -> None:
    planted(Folder(str(tmp_path)))
    found = folders.read(origin(tmp_path, "n10", "n09", "n02", "n01"))
    assert found.classes == ("n10", "n09", "n02", "n01")
    assert {file[:3]: labels for _, file, labels, _ in seen(found)} == {"n01": [3], "n02": [2], "n10": [0]}
    with pytest.raises(ValueError, match=r"has 1 classes that the class list of 2 does not have: n10"):
        folders.read(origin(tmp_path, "n01", "n02"))


@pytest.mark.parametrize(
    ("tree", "source", "kind", "words"),
    [
        ({}, "", ValueError, "--source"),
        ({}, "nowhere", FileNotFoundError, "nowhere does not exist"),
        ({"empty/": 0}, "empty", ValueError, "empty holds no class folders"),
        ({"a/x.jpg": 1}, "a/x.jpg", ValueError, "x.jpg is a file, not a folder"),
        ({"a/x.jpg": 1, "b.jpg": 2, "c.jpg": 2}, ".", ValueError, "b.jpg lies in no class folder (2 such pictures)"),
        ({"a/x.txt": 1, "b/": 2}, ".", ValueError, "holds no picture in its 2 class folders"),
        ({"a/x.jpg": 1, "b/": 2}, ".", ValueError, "has 1 folders without a picture, b the first"),
    ],
)
def test_every_folder_that_holds_no_classes_of_pictures_is_refused(
    tmp_path: Path, tree: dict[str, int], source: str, kind: type[Exception], words: str
) -> None:
    for name, number in tree.items():
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            Folder(str(tmp_path)).write(name, encoded(number))
    with pytest.raises(kind, match=re.escape(words)) as raised:
        folders.read(origin(tmp_path / source if source else ""))
    assert "\n" not in str(raised.value) and type(raised.value) is kind


def test_a_store_without_such_a_folder_or_with_a_file_in_its_place_is_refused(s3: str) -> None:
    Folder(s3).write("file", b"x")
    with pytest.raises(FileNotFoundError, match=rf"{s3}/nowhere does not exist, or is empty"):
        folders.read(origin(f"{s3}/nowhere"))
    with pytest.raises(ValueError, match=rf"{s3}/file is a file, not a folder"):
        folders.read(origin(f"{s3}/file"))


def test_the_mark_of_a_folder_in_a_bucket_is_no_file_of_a_class(s3: str) -> None:
    files, root = Folder(s3).place
    planted(Folder(s3), {"a/x.jpg": 1})
    files.pipe_file(f"{root}/a/", b"")
    files.pipe_file(f"{root}/a/day/", b"")
    assert [file for _, file, _, _ in seen(folders.read(origin(s3)))] == ["a/x.jpg"]


# list files


def listed(root: Path, name: str, text: str, *classes: str, **more: Any) -> Ranges:
    (root / name).write_text(text, newline="")
    return lists.read(origin(root, *classes), name, **more)


# Names as they are in the wild: any letter but those that lists or paths are cut by.
words = some.text(some.characters(exclude_characters="/\\\0", exclude_categories=["C", "Z"]), min_size=1, max_size=6)
paths = some.lists(words.filter(lambda word: word not in (".", "..")), min_size=1, max_size=3).map("/".join)
entries = some.lists(
    some.tuples(paths, some.lists(some.integers(0, 2**31 - 1), min_size=1, max_size=3)),
    min_size=1,
    max_size=6,
    unique_by=lambda entry: key(f"{entry[0]} x.jpg"),
)
WRITTEN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def expected(rows: list[tuple[str, list[int]]]) -> list[tuple[str, str, list[int], int]]:
    return [(key(path), path, labels, -1) for path, labels in rows]


@given(rows=entries)
@WRITTEN
def test_a_list_gives_every_picture_it_names_in_its_order_whatever_its_form(
    tmp_path: Path, rows: list[tuple[str, list[int]]]
) -> None:
    rows = [(f"{path} x.jpg", labels) for path, labels in rows]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "Labels", "File"])
        writer.writerows([n, "; ".join(map(str, labels)), path] for n, (path, labels) in enumerate(rows))
    lines = [json.dumps({"path": path, "labels": labels}) for path, labels in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name in ("a.csv", "a.jsonl"):
        assert seen(lists.read(origin(tmp_path), name)) == expected(rows)
    one = [(path, labels[:1]) for path, labels in rows]
    text = "".join(f"{path} {label}\n" for path, (label,) in one)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert seen(lists.read(origin(tmp_path), "a.txt")) == expected(one)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_path_means_the_same_file_whatever_slashes_it_is_written_with(tmp_path: Path, ends: str) -> None:
    forms = ["images/a b/1.jpg\t3", "./images//2.jpg 3", "\\images\\3.jpg  3", "", "  /images/4.jpg 3 "]
    text = ends.join([*forms, f"{tmp_path}/images/5.jpg 3"])
    found = listed(tmp_path, "train.txt", f"\ufeff{text}")
    wanted = ["images/a b/1.jpg", *(f"images/{number}.jpg" for number in range(2, 6))]
    assert seen(found) == expected([(path, [3]) for path in wanted])


def test_every_picture_that_a_list_names_can_be_read(tmp_path: Path) -> None:
    planted(Folder(str(tmp_path / "task")), {f"images/{number}.jpg": number for number in range(4)})
    (tmp_path / "task" / "a.txt").write_text("images/3.jpg 1\nimages/0.jpg 0\n")
    found = list(lists.read(origin(tmp_path), "a.txt", folder="task"))
    assert [(picture.key, picture.data, picture.labels) for picture in found] == [
        ("images-3", encoded(3), (1,)),
        ("images-0", encoded(0), (0,)),
    ]


def test_a_list_in_a_bucket_is_read_as_if_it_were_on_the_disk(s3: str, tmp_path: Path) -> None:
    text = "a.jpg 1\nb c.jpg 2\n"
    Folder(s3).write("lists/a.txt", text.encode())
    assert seen(lists.read(origin(s3), "a.txt", folder="lists")) == seen(listed(tmp_path, "a.txt", text))
    with pytest.raises(FileNotFoundError, match=rf"{s3}/b\.txt does not exist"):
        lists.read(origin(s3), "b.txt")


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("label\nx;1.jpg,tabby cat", [["tabby cat"]]),
        ("label\nx,tabby cat;dog", [["tabby cat", "dog"]]),
        ("label\nx,dog ; tabby cat;", [["dog", "tabby cat"]]),
        ("labels\nx,dog cat\ny,cat", [["dog", "cat"], ["cat"]]),
        ("class\nx,0\ny,2 1", [["cat"], ["tabby cat", "dog"]]),
    ],
)
def test_every_cell_of_several_labels_is_taken_apart_and_every_name_left_whole(
    tmp_path: Path, text: str, labels: list[list[str]]
) -> None:
    classes = ("cat", "dog", "tabby cat")
    found = listed(tmp_path, "a.csv", f"path,{text}", *classes)
    assert [[classes[number] for number in row["labels"]] for row in found.table.to_pylist()] == labels
    if not any(word in text for word in "012"):
        named = listed(tmp_path, "a.csv", f"path,{text}")
        assert [[named.classes[number] for number in row["labels"]] for row in named.table.to_pylist()] == labels
        assert list(named.classes) == sorted({name for each in labels for name in each})


@given(names=some.lists(some.sampled_from(["ant", "bee", "cat", "Dog", "éland"]), min_size=1, max_size=12))
@WRITTEN
def test_names_without_a_class_list_become_the_classes_in_their_order_whatever_order_they_come_in(
    tmp_path: Path, names: list[str]
) -> None:
    lines = [json.dumps({"path": f"{number}.jpg", "label": name}) for number, name in enumerate(names)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = lists.read(origin(tmp_path), "a.jsonl")
    assert found.classes == tuple(sorted(set(names)))
    assert [found.classes[row["labels"][0]] for row in found.table.to_pylist()] == names


def test_a_list_is_the_same_as_if_it_were_taken_in_at_once(tmp_path: Path, monkeypatch) -> None:
    text = "".join(f"{number}.jpg {'zyx'[number % 3]}\n" for number in range(20))
    wanted = listed(tmp_path, "a.txt", text)
    for at_once in (1, 3, 20):
        monkeypatch.setattr(lists, "_AT_ONCE", at_once)
        found = listed(tmp_path, "a.txt", text)
        assert seen(found) == seen(wanted) and found.classes == wanted.classes == ("x", "y", "z")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "x.jpg 1\ny.jpg one", "line 2: 'one' is not a label: no number"),
        ("a.txt", "x.jpg one\ny.jpg 1", "line 2: '1' is not a label: no name, as in the lines before"),
        ("a.txt", "x.jpg 1\n\ny.jpg", "line 3: 'y.jpg' has no label behind it"),
        ("a.txt", "x.jpg -1", "line 1: label -1 is negative"),
        ("a.txt", "x.jpg 2147483648", "line 1: label 2147483648 is out of range"),
        ("a.txt", "x.jpg 1\ny.jpg 1\n./x.jpg 2", "line 3: x.jpg is there twice (line 1)"),
        ("a.txt", "x.jpg 1\nx.png 1", "line 2: x.png has the key x of x.jpg (line 1)"),
        ("a.txt", "a/../../x.jpg 1", "line 1: a/../../x.jpg leaves the folder"),
        ("a.txt", "..\\x.jpg 1", r"line 1: ..\x.jpg leaves the folder"),
        ("a.txt", "http://a/x.jpg 1", "line 1: http://a/x.jpg leaves the folder"),
        ("a.txt", "\n \n", "a.txt names no picture"),
        ("a.csv", "", "line 1: no column is called path or file"),
        ("a.csv", "path,size\nx,1", "line 1: no column is called label or labels or class; the header is: path, size"),
        ("a.csv", "path,label\nx.jpg", "line 2: 1 cells, where the header has 2"),
        ("a.csv", "path,label\nx.jpg,", "line 2: x.jpg has no label"),
        ("a.csv", 'path,label\n"x\n.jpg",1\ny,?', "line 4: '?' is not a label"),
        ("a.csv", "path,label\n,1", "line 2: no path"),
        ("a.jsonl", '{"path": "x", "label": 1}\n{', "line 2: no JSON"),
        ("a.jsonl", "[1]", "line 1: no object with a member path or"),
        ("a.jsonl", '{"path": "x"}', "line 1: no object with a member label or"),
        ("a.jsonl", '{"path": "x", "label": true}', "line 1: true is not a label"),
        ("a.jsonl", '{"path": "x", "label": [1, 2.0]}', "line 1: 2.0 is not a label"),
        ("a.jsonl", '{"path": "x", "labels": []}', "line 1: x has no label"),
        ("a.jsonl", '{"path": 7, "label": 1}', "line 1: 7 is not a path"),
    ],
)
def test_every_mistake_in_a_list_is_told_by_file_and_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        listed(tmp_path, name, text)
    assert str(raised.value).startswith(f"{tmp_path}/{name}") and "\n" not in str(raised.value)


def test_every_label_outside_the_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2: label 2 is out of range: there are 2 classes"):
        listed(tmp_path, "a.txt", "x 1\ny 2", "cat", "dog")
    with pytest.raises(ValueError, match="line 1: 'cow' is not a label: neither a number nor one of the 2 classes"):
        listed(tmp_path, "a.txt", "x cow", "cat", "dog")
    with pytest.raises(ValueError, match="line 1: label 3 is out of range: there are 3 classes"):
        listed(tmp_path, "a.txt", "x 3", count=3)
    with pytest.raises(ValueError, match="line 1: 'cat' is not a label: no number"):
        listed(tmp_path, "a.txt", "x cat", count=3)


def test_a_list_that_is_not_there_or_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/a\.txt does not exist"):
        lists.read(origin(tmp_path), "a.txt")
    (tmp_path / "a.txt").write_bytes(encoded(1))
    with pytest.raises(ValueError, match=rf"{tmp_path}/a\.txt is no text in UTF-8"):
        lists.read(origin(tmp_path), "a.txt")
    with pytest.raises(ValueError, match="--source"):
        lists.read(Origin(), "a.txt")


# Parquet


def hub(path: Path, numbers: range, *, names: tuple[str, ...] = ("cat", "dog", "eel"), group: int = 4) -> None:
    """A file as the hub's own library writes it; picture n has the label n % 3."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    pictures = [{"bytes": encoded(number), "path": f"{number}.jpg"} for number in numbers]
    made = datasets.Dataset.from_dict({"image": pictures, "label": [n % 3 for n in numbers]}, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.to_parquet(path, batch_size=group)


def plain(path: Path, pictures: Any, labels: Any, *, group: int = 4, **names: str) -> None:
    """A file that nobody's library but Arrow has written."""
    table = pa.table({names.get("image", "image"): pictures, names.get("label", "label"): labels})
    pq.write_table(table, path, row_group_size=group)


def named(path: Path, *names: str) -> None:
    """Three rows, of which the hub's library would refuse the last where there are but two names."""
    said = json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})
    table = pa.table({"image": structs(range(3)), "label": [0, 1, 2]})
    pq.write_table(table.replace_schema_metadata({"huggingface": said}), path)


def structs(numbers: range) -> pa.Array:
    return pa.array([{"bytes": encoded(number), "path": None} for number in numbers])


def wanted(rows: Rows) -> list[tuple[str, bytes, tuple[int, ...]]]:
    return [(f"{n}", encoded(n), (n % 3,)) for n in range(len(rows))]


def had(rows: Rows) -> list[tuple[str, Any, tuple[int, ...]]]:
    return [(picture.key, picture.data, picture.labels) for picture in rows]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    hub(tmp_path / "train-00000-of-00002.parquet", range(10))
    hub(tmp_path / "train-00001-of-00002.parquet", range(10, 15))
    return tmp_path


def test_every_row_of_the_hubs_files_is_a_picture_with_its_label_and_class(two: Path) -> None:
    found = parquet.read(origin(two), "train")
    assert pq.ParquetFile(two / "train-00000-of-00002.parquet").num_row_groups == 3
    assert found.classes == ("cat", "dog", "eel") and len(found) == 15 and found.table.schema == LISTING
    assert found.table["offset"].to_pylist() == [*range(10), *range(5)] and had(found) == wanted(found)
    one = parquet.read(origin(two / "train-00001-of-00002.parquet"))
    assert had(one) == wanted(found)[10:]


def test_parquet_gives_the_same_pictures_wherever_it_lies(everywhere: tuple[Folder, str], tmp_path: Path) -> None:
    written, url = everywhere
    hub(tmp_path / "made" / "x.parquet", range(9))
    written.write("data/train-0.parquet", (tmp_path / "made" / "x.parquet").read_bytes())
    found = parquet.read(origin(f"{url}/data"))
    assert len(found) == 9 and had(found) == wanted(found)


class Counted(pq.ParquetFile):
    """Tells which row groups were read, and which columns beside."""

    groups: ClassVar[Counter[int]] = Counter()
    columns: ClassVar[list[Any]] = []

    def read_row_group(self, i: int, *given: Any, **named: Any) -> pa.Table:
        Counted.groups[self.metadata.num_rows * 1000 + i] += 1
        return super().read_row_group(i, *given, **named)

    def read(self, columns: Any = None, **named: Any) -> pa.Table:  # type: ignore[override]
        Counted.columns.append(columns)
        return super().read(columns=columns, **named)


@given(numbers=some.lists(some.integers(0, 14), max_size=30))
@settings(WRITTEN, max_examples=30)
def test_any_pictures_come_in_the_order_asked_for_and_every_row_group_is_read_once_if_at_all(
    tmp_path: Path, numbers: list[int]
) -> None:
    if not (tmp_path / "train-00000-of-00002.parquet").exists():
        hub(tmp_path / "train-00000-of-00002.parquet", range(10))
        hub(tmp_path / "train-00001-of-00002.parquet", range(10, 15))
    whole = parquet.read(origin(tmp_path))
    some_of_it = pickle.loads(pickle.dumps(whole.take(np.array(numbers, np.int64))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq, "ParquetFile", Counted)
        Counted.groups = Counter()
        assert had(some_of_it) == [wanted(whole)[number] for number in numbers]
    needed = {(n // 4 if n < 10 else (n - 10) // 4, n < 10) for n in numbers}
    assert set(Counted.groups.values()) <= {1} and len(Counted.groups) == len(needed)
    assert len(some_of_it.files) == len({first for _, first in needed})


def test_no_picture_is_read_when_rows_are_listed(two: Path, monkeypatch) -> None:
    monkeypatch.setattr(pq, "ParquetFile", Counted)
    Counted.groups, Counted.columns = Counter(), []
    assert len(parquet.read(origin(two))) == 15
    assert not Counted.groups and Counted.columns == [["label", "image.path"]] * 2


def test_what_waits_on_the_disk_is_never_more_than_what_was_begun_and_is_gone_in_the_end(
    two: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch
) -> None:
    kept = tmp_path_factory.mktemp("kept")
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    whole = parquet.read(origin(two))
    sizes = [len([path for path in kept.glob("*/*")]) for _ in whole]
    assert max(sizes) == 1 and not list(kept.iterdir())
    pictures = iter(whole)
    next(pictures)
    assert len(list(kept.glob("*/*"))) == 1
    pictures.close()  # type: ignore[attr-defined]
    assert not list(kept.iterdir())


@pytest.mark.parametrize(
    "image",
    [
        structs(range(6)),
        pa.array([encoded(number) for number in range(6)]),
        pa.array([encoded(number) for number in range(6)], pa.large_binary()),
        pa.array([{"path": "x", "bytes": encoded(n)} for n in range(6)]),
    ],
    ids=["no path", "binary", "large", "one path for all"],
)
@pytest.mark.parametrize("names", [{}, {"image": "img", "label": "fine_label"}, {"image": "pixels", "label": "class"}])
def test_every_column_of_bytes_serves_and_keys_are_rows_where_paths_tell_nothing(
    tmp_path: Path, image: pa.Array, names: dict[str, Any]
) -> None:
    plain(tmp_path / "my data.parquet", image, pa.array([n % 3 for n in range(6)], pa.uint8()), **names)
    found = parquet.read(origin(tmp_path))
    stem = key("my data.parquet")
    assert had(found) == [(f"{stem}-{n:06}", encoded(n), (n % 3,)) for n in range(6)] and found.classes == ()


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int8()), pa.list_(pa.int16(), 2)])
def test_every_one_of_several_labels_is_kept(tmp_path: Path, kind: pa.DataType) -> None:
    labels = [[1, 2], [0, 5], [3, 3], [4, 1], [9, 8]]
    plain(tmp_path / "x.parquet", structs(range(5)), pa.array(labels, kind), group=2, label="labels")
    assert [list(picture.labels) for picture in parquet.read(origin(tmp_path))] == labels


def test_the_hubs_names_are_found_whatever_wraps_them(tmp_path: Path) -> None:
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    for feature in (label, {"feature": label, "_type": "List"}, [label], {"feature": label, "_type": "Sequence"}):
        said = json.dumps({"info": {"features": {"label": feature}}})
        table = pa.table({"image": structs(range(2)), "label": [[0], [1]]})
        pq.write_table(table.replace_schema_metadata({"huggingface": said}), tmp_path / "x.parquet")
        assert parquet.read(origin(tmp_path)).classes == ("cat", "dog")


def test_a_row_without_bytes_is_a_picture_without_bytes_as_if_the_file_were_empty(tmp_path: Path) -> None:
    image = pa.array([{"bytes": encoded(0), "path": "0.jpg"}, None, {"bytes": None, "path": "2.jpg"}])
    plain(tmp_path / "x.parquet", image, [0, 1, 2])
    assert [data for _, data, _ in had(parquet.read(origin(tmp_path)))] == [encoded(0), b"", b""]


def test_given_classes_rename_or_reorder_those_of_the_file_and_every_picture_keeps_its_own(two: Path) -> None:
    def named(rows: Rows) -> list[str]:
        return [rows.classes[row["labels"][0]] for row in rows.table.to_pylist()]

    as_written = parquet.read(origin(two))
    reordered = parquet.read(origin(two, "eel", "dog", "cat"))
    assert reordered.classes == ("eel", "dog", "cat") and named(reordered) == named(as_written)
    renamed = parquet.read(origin(two, "Katze", "Hund", "Aal"))
    assert renamed.table == as_written.table and named(renamed)[:3] == ["Katze", "Hund", "Aal"]
    with pytest.raises(ValueError, match="has 3 classes, the class list 2"):
        parquet.read(origin(two, "cat", "dog"))


def test_a_split_is_chosen_by_its_whole_name_and_several_are_told(tmp_path: Path) -> None:
    for number, split in enumerate(("test", "train", "train_extra", "trainval")):
        hub(tmp_path / f"{split}-00000-of-00001.parquet", range(number, number + 1))
    assert [data for _, data, _ in had(parquet.read(origin(tmp_path), "train"))] == [encoded(1)]
    said: list[str] = []
    assert len(parquet.read(replace(origin(tmp_path), say=said.append))) == 4
    assert said == [f"{tmp_path}: files of test, train, train_extra, trainval are taken together"]
    with pytest.raises(FileNotFoundError, match="no Parquet files called val; its files: test-00000"):
        parquet.read(origin(tmp_path), "val")


def test_files_that_are_links_are_read_as_if_they_were_there(two: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in sorted(two.glob("*.parquet")):
        (snapshot / path.name).symlink_to(path)
    assert had(parquet.read(origin(snapshot))) == had(parquet.read(origin(two)))


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b""), "x.parquet is no Parquet file, or is damaged"),
        (lambda path: path.write_bytes(encoded(1)), "x.parquet is no Parquet file, or is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "x.parquet is no Parquet file, or is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-90] + path.read_bytes()[-80:]), "x.parquet is "),
        (lambda path: plain(path, [1, 2], [1, 2]), "x.parquet has no column of pictures, called image or img"),
        (lambda path: plain(path, structs(range(2)), [1, 2], label="y"), "no column of labels, called label or"),
        (lambda path: plain(path, structs(range(2)), ["1", "2"]), "labels in the column label are string"),
        (lambda path: plain(path, structs(range(2)), [1, None]), "x.parquet, row 1: no label"),
        (lambda path: plain(path, structs(range(2)), [[1], []]), "x.parquet, row 1: no label"),
        (lambda path: plain(path, structs(range(2)), [[1], [2, None]]), "a label among several is null"),
        (lambda path: plain(path, structs(range(2)), [1, -1]), "row 1: label -1 is out of range: a split without"),
        (lambda path: plain(path, structs(range(2)), [[1, 2], [3, -2]]), "row 1: label -2 is out of range"),
        (lambda path: plain(path, structs(range(2)), [1, 1 << 40]), "x.parquet has a label out of range"),
        (lambda path: plain(path, structs(range(2))[:0], pa.array([], pa.int32())), "x.parquet holds no rows"),
        (lambda path: named(path, "cat", "dog"), "row 2: label 2 is out of range: there are 2 classes"),
        (
            lambda path: hub(path.with_name("x-1.parquet"), range(3), names=("a", "b", "c")),
            "x.parquet has other columns",
        ),
        (lambda path: path.rename(path.with_name("x-00000-of-00002.parquet")), "holds 1 of the 2 files of x"),
        (lambda path: path.unlink(), "holds no Parquet files; its folders: deeper"),
    ],
)
def test_every_parquet_that_is_not_as_it_should_be_is_refused_in_one_line(
    tmp_path: Path, damage: Damage, words: str
) -> None:
    (tmp_path / "deeper").mkdir()
    hub(tmp_path / "x.parquet", range(4))
    damage(tmp_path / "x.parquet")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)) as raised:
        parquet.read(origin(tmp_path))
    assert str(raised.value).startswith(str(tmp_path)) and "\n" not in str(raised.value)


def test_a_file_that_changed_since_it_was_listed_is_refused_by_name(two: Path) -> None:
    whole = parquet.read(origin(two))
    path = two / "train-00001-of-00002.parquet"
    sound = path.read_bytes()
    hub(path, range(10, 12))
    with pytest.raises(ValueError, match=rf"{path} has 2 rows, and row 4 was listed: it has changed"):
        list(whole)
    path.write_bytes(bytes(len(sound) // 2) + sound[len(sound) // 2 :])
    with pytest.raises(ValueError, match=rf"{path} is .*damaged"):
        list(whole)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path} does not exist"):
        list(whole)
    with pytest.raises(FileNotFoundError, match=rf"{path} does not exist"):
        parquet.read(origin(path))


def test_a_store_that_fails_is_never_told_as_damage(memory: str, two: Path, monkeypatch) -> None:
    for path in two.iterdir():
        Folder(memory).write(path.name, path.read_bytes())
    whole = parquet.read(origin(memory))

    def fails(*given: Any) -> bytes:
        raise OSError("the store is away") from ConnectionResetError()

    monkeypatch.setattr(Folder, "read", fails)
    for failing in (lambda: parquet.read(origin(memory)), lambda: list(whole)):
        with pytest.raises(OSError, match="the store is away") as raised:
            failing()
        assert type(raised.value) is OSError and str(raised.value) == "the store is away"


# VTAB-1k


def community(root: Path, count: dict[str, int], classes: int) -> Path:
    """A task's folder with lists of so many pictures."""
    first = 0
    for split, size in count.items():
        names = [f"images/{split.rstrip('0128')}/{number:06}.jpg" for number in range(first, first + size)]
        for number, name in enumerate(names):
            Folder(str(root)).write(name, encoded(first + number))
        lines = [f"{name} {number % classes}\n" for number, name in enumerate(names)]
        Folder(str(root)).write(f"{split}.txt", "".join(lines).encode())
        first += size
    return root


SMALL = {"train800": 4, "val200": 2, "test": 3}


@pytest.mark.parametrize("dataset", vtab.DATASETS, ids=lambda dataset: dataset.name)
def test_every_task_is_found_in_the_whole_and_by_itself(tmp_path: Path, dataset: Dataset) -> None:
    folder = next(row[1] for row in vtab.TASKS if f"vtab_{row[0]}" == dataset.name)
    task = community(tmp_path / "vtab-1k" / folder, SMALL, 2)
    small, data = replace(dataset, splits=SMALL), []
    for split in SMALL:
        whole = small.pictures(split, origin(tmp_path / "vtab-1k"))
        alone = small.pictures(split, origin(task))
        assert isinstance(whole, Ranges) and isinstance(alone, Ranges)
        assert seen(whole) == seen(alone) and whole.root == alone.root == str(task)
        data += [picture.data for picture in whole]
    assert data == [encoded(number) for number in range(sum(SMALL.values()))]


def test_the_tasks_are_those_of_the_paper_and_every_one_has_its_thousand() -> None:
    assert len({row[1] for row in vtab.TASKS}) == len({dataset.name for dataset in vtab.DATASETS}) == 19
    for dataset in vtab.DATASETS:
        assert list(dataset.splits) == ["train800", "val200", "test"]
        assert (dataset.splits["train800"], dataset.splits["val200"]) == (800, 200)
        assert dataset.licence and dataset.citation and dataset.source
        assert isinstance(dataset.classes, tuple) and len(set(dataset.classes)) == len(dataset.classes)
    assert sum(len(dataset.classes) for dataset in vtab.DATASETS if isinstance(dataset.classes, tuple)) == 940
    assert sum(dataset.splits["test"] or 0 for dataset in vtab.DATASETS) == 387_904


def test_a_task_whose_lists_do_not_fit_is_refused(tmp_path: Path) -> None:
    (kitti,) = [dataset for dataset in vtab.DATASETS if dataset.name == "vtab_kitti"]
    community(tmp_path / "kitti", SMALL, 4)
    with pytest.raises(ValueError, match="vtab_kitti/test has 3 pictures, 711 expected"):
        kitti.pictures("test", origin(tmp_path))
    small = replace(kitti, splits=SMALL)
    (tmp_path / "kitti" / "test.txt").write_text("a.jpg 1\nb.jpg 4\nc.jpg 0\n")
    with pytest.raises(ValueError, match=r"kitti/test\.txt, line 2: label 4 is out of range: there are 4 classes"):
        small.pictures("test", origin(tmp_path))
    with pytest.raises(ValueError, match="vtab_kitti/test has 3 classes, 4 expected"):
        (tmp_path / "kitti" / "test.txt").write_text("a.jpg 1\nb.jpg 2\nc.jpg 0\n")
        small.pictures("test", origin(tmp_path, "a", "b", "c"))
    with pytest.raises(
        FileNotFoundError, match=r"elsewhere holds neither .* of vtab-1k there is neither kitti/test\.txt"
    ):
        small.pictures("test", origin(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="vtab_kitti needs --source: the folder vtab-1k, or kitti in it"):
        small.pictures("test", Origin())
