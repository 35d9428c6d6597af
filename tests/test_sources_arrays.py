"""Laws of the small data sets: what comes in arrays, and what comes in files with labels beside them."""

import dataclasses
import gzip
import io
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.io import savemat

from shards.datasets import Dataset, cifar10, cifar100, dsprites, flowers, pets, smallnorb, svhn
from shards.sources import Arrays, Origin, Pictures, Ranges, annotated, archives, cifar, matlab, norb, sprites
from shards.storage import Folder

pytestmark = pytest.mark.timeout(60)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def small(dataset: Dataset, **splits: int) -> Dataset:
    """The data set as if it had so many pictures."""
    return dataclasses.replace(dataset, splits=splits)


def pixels(pictures: Pictures) -> np.ndarray:
    return np.stack([np.asarray(picture.data) for picture in pictures])


def tarred(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    """The bytes of a tar of these files, which it writes to `path`."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path.read_bytes()


def laid(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# CIFAR


class Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes strings and bytes as Python 2 wrote its one kind of strings."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def string(self, thing: str | bytes) -> None:
        data = thing.encode() if isinstance(thing, str) else thing
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)  # type: ignore[attr-defined]

    dispatch[str] = dispatch[bytes] = string


def of_python_2(thing: object) -> bytes:
    written = io.BytesIO()
    Python2(written, 2).dump(thing)
    return written.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def of_python_3(thing: object) -> bytes:
    return pickle.dumps(thing, 2)


TEN, HUNDRED = (cifar.TEN, cifar10), (cifar.HUNDRED, cifar100)
EACH = 3  # pictures of a batch


def cifar_files(kind: cifar.Kind, classes: tuple[str, ...], write: Callable[[object], bytes]) -> list[dict[str, bytes]]:
    """The files of the python and of the binary version, with the same pictures."""
    python, binary = {}, {}
    for split in kind.python.batches:
        names = zip(kind.python.batches[split], kind.binary.batches[split], strict=True)
        for number, (pickled, records) in enumerate(names):
            data = noise(EACH, 3072, seed=number + (split == "test") * 7)
            labels = [(number + place) % len(classes) for place in range(EACH)]
            python[f"{kind.python.folder}/{pickled}"] = write(
                {b"data": data, kind.labels: labels, b"batch_label": b"1"}
            )
            before = np.array([[9] * (kind.before - 1) + [label] for label in labels], np.uint8)
            binary[f"{kind.binary.folder}/{records}"] = np.hstack([before, data]).tobytes()
    python[f"{kind.python.folder}/{kind.python.names}"] = write({kind.names: [name.encode() for name in classes]})
    binary[f"{kind.binary.folder}/{kind.binary.names}"] = "".join(f"{name}\n" for name in classes).encode() + b"\n"
    return [python, binary]


@pytest.mark.parametrize(("kind", "module"), [TEN, HUNDRED])
@pytest.mark.parametrize("write", [of_python_2, of_python_3])
def test_cifar_is_the_same_whichever_version_it_comes_from(kind, module, write, tmp_path: Path) -> None:
    sources = []
    for version, files in zip((kind.python, kind.binary), cifar_files(kind, module.CLASSES, write), strict=True):
        laid(tmp_path / version.archive / "unpacked", files)
        archived = tmp_path / version.archive / "packed"
        archived.mkdir()
        tarred(archived / version.archive, files)
        unpacked = tmp_path / version.archive / "unpacked"
        sources += [unpacked, unpacked / version.folder, archived, archived / version.archive]
    for split, batches in kind.python.batches.items():
        dataset = small(module.DATASET, **{split: EACH * len(batches)})
        first = np.concatenate(
            [noise(EACH, 3072, seed=number + (split == "test") * 7) for number in range(len(batches))]
        )
        for source in sources:
            found = dataset.pictures(split, Origin(str(source)))
            assert isinstance(found, Arrays) and found.pixels.shape == (len(first), 32, 32, 3)
            assert np.array_equal(found.pixels[1, 2, 5], first[1, [69, 69 + 1024, 69 + 2048]])
            assert np.array_equal(found.pixels.transpose(0, 3, 1, 2).reshape(-1, 3072), first)
            assert found.labels.tolist() == [n + place for n in range(len(batches)) for place in range(EACH)]
            assert list(found.keys)[:2] == [f"{split}-00000", f"{split}-00001"]


class Asks:
    """What unpickles to the answer of a call."""

    def __init__(self, call: Callable[..., Any], *given: object) -> None:
        self.call, self.given = call, given

    def __reduce__(self) -> tuple:
        return self.call, self.given


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (Asks(os.system, "touch {}"), r"asks for (posix|nt)\.system"),
        (Asks(eval, "open('{}', 'w')"), "asks for (builtins|__builtin__).eval"),
        (Asks(os.mkdir, "{}"), r"asks for (posix|nt)\.mkdir"),
        (Asks(np.load, "{}"), "asks for numpy"),
        (np.zeros((1, 3072), object), "not of bytes"),
        (np.zeros((1, 3072), "f4"), "not of bytes"),
        (np.float32(1), "asks for numpy.*scalar"),
    ],
)
def test_no_pickle_gets_to_run_what_it_asks_for(thing, words: str, tmp_path: Path) -> None:
    if isinstance(thing, Asks):
        thing.given = tuple(str(one).format(tmp_path / "run") for one in thing.given)
    (tmp_path / "test_batch").write_bytes(of_python_3({b"data": thing, b"labels": [0]}))
    with pytest.raises(ValueError, match=f"{tmp_path}/test_batch is not a pickle of CIFAR: .*{words}"):
        cifar10.DATASET.pictures("test", Origin(str(tmp_path)))
    assert not (tmp_path / "run").exists()


@given(place=some.integers(0, 400), byte=some.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_pickle_damaged_in_any_byte_is_read_or_refused_by_name(place: int, byte: int) -> None:
    data = bytearray(of_python_3({b"data": noise(1, 300), b"labels": [3], b"filenames": [b"a.png"]}))
    data[place % len(data)] = byte
    try:
        assert isinstance(cifar.unpickled(bytes(data), "x/batch"), dict)
    except ValueError as error:
        assert str(error).startswith("x/batch is not a pickle of CIFAR: ")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"test_batch": b""}, "test_batch is not a pickle"),
        ({"test_batch": of_python_3([1])}, "test_batch is not a pickle"),
        ({"test_batch": of_python_3({b"data": noise(2, 3071), b"labels": [0, 1]})}, "no array"),
        ({"test_batch": of_python_3({b"data": noise(2, 3072), b"fine_labels": [0, 1]})}, "no list of numbers"),
        ({"test_batch": of_python_3({b"data": noise(2, 3072), b"labels": [0]})}, "2 pictures and 1 labels"),
        ({"test_batch": of_python_3({b"data": noise(2, 3072), b"labels": [0, 10]})}, "picture 1 has the label 10"),
        ({"test_batch.bin": bytes(3073 * 2 - 1)}, "test_batch.bin has 6,145 bytes, not a multiple"),
        ({"test_batch.bin": b""}, "test_batch.bin has 0 bytes"),
        ({"test_batch.bin": b"\x0b" + bytes(3072)}, "picture 0 has the label 11"),
        ({"test_batch.bin": bytes(3073), "batches.meta.txt": b"a\nb\n"}, "meta.txt does not name the 10 classes"),
        ({"data_batch_1": b""}, "holds neither cifar-10-python.tar.gz nor test_batch nor"),
    ],
)
def test_what_is_no_cifar_is_refused_by_name(files: dict[str, bytes], words: str, tmp_path: Path) -> None:
    laid(tmp_path, files)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refused:
        cifar10.DATASET.pictures("test", Origin(str(tmp_path)))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_an_archive_without_one_of_its_batches_is_refused(tmp_path: Path) -> None:
    files = cifar_files(cifar.TEN, cifar10.CLASSES, of_python_3)[0]
    del files["cifar-10-batches-py/data_batch_4"]
    tarred(tmp_path / "x.tar.gz", files)
    with pytest.raises(ValueError, match=r"x\.tar\.gz holds no data_batch_4"):
        cifar10.DATASET.pictures("train", Origin(str(tmp_path / "x.tar.gz")))
    with pytest.raises(ValueError, match=r"x\.tar\.gz holds neither train nor train\.bin"):
        cifar100.DATASET.pictures("train", Origin(str(tmp_path / "x.tar.gz")))


def test_every_data_set_says_what_its_source_must_be() -> None:
    for module in (cifar10, cifar100, pets, flowers, svhn, dsprites, smallnorb):
        for dataset in getattr(module, "DATASETS", None) or (module.DATASET,):
            with pytest.raises(ValueError, match=f"{dataset.name} needs --source: .*{re.escape(dataset.source[:12])}"):
                dataset.pictures(next(iter(dataset.splits)), Origin())


# archives


def test_every_file_of_an_archive_is_given_compressed_or_not(tmp_path: Path) -> None:
    files = {f"folder/{number}": noise(size).tobytes() for number, size in enumerate((0, 1, 511, 512, 513, 70_000))}
    for mode in ("w", "w:gz"):
        tarred(tmp_path / "a.tgz", {f"./{name}": data for name, data in files.items()}, mode)
        assert dict(archives.members(Folder(str(tmp_path)), "a.tgz")) == files


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_that_is_cut_or_damaged_anywhere_is_refused_by_name(mode: str, tmp_path: Path) -> None:
    data = tarred(tmp_path / "a.tgz", {"a": noise(3000).tobytes(), "b": noise(700, seed=1).tobytes()}, mode)
    headers = [0, 3584] if mode == "w" else range(20, len(data), 97)  # gzip does not guard the name in its header
    # An archive ends with two blocks of zeros, then is filled up.
    kept = 3584 + 512 + 1024 if mode == "w" else len(data)
    damaged = [data[:place] for place in range(0, kept, 251)]
    damaged += [data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :] for place in headers]
    for broken in damaged:
        (tmp_path / "a.tgz").write_bytes(broken)
        with pytest.raises(ValueError, match=f"{tmp_path}/a.tgz is damaged: .*; fetch it again"):
            list(archives.members(Folder(str(tmp_path)), "a.tgz"))


@pytest.mark.parametrize("name", ["../out", "/out", "in/../../out"])
def test_no_path_of_an_archive_leaves_the_folder_it_is_unpacked_to(name: str, tmp_path: Path) -> None:
    tarred(tmp_path / "a.tgz", {"in/file": b"1", name: b"2"})
    origin = Origin(downloads=Folder(str(tmp_path / "downloads" / "here")), say=lambda line: None)
    with pytest.raises(
        ValueError, match=f"a.tgz has a member that is no file inside it: '{re.escape(name)}' at byte 1,"
    ):
        archives.unpacked(origin, Folder(str(tmp_path)), "a.tgz", lambda name: True)
    assert not list(tmp_path.rglob("out")) and not list(tmp_path.rglob("a.json"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_member_that_is_neither_file_nor_folder_is_refused(kind: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = kind, "/etc"
        tar.addfile(member)
    with pytest.raises(ValueError, match="no file inside it: 'link' at byte 0"):
        list(archives.members(Folder(str(tmp_path)), "a.tgz"))


def test_an_archive_is_unpacked_once_and_again_if_that_was_ended_or_it_has_changed(tmp_path: Path) -> None:
    files = {f"in/{number}.jpg": noise(100, seed=number).tobytes() for number in range(150)}
    data = tarred(tmp_path / "a.tgz", {**files, "in/notes.txt": b"x"})
    said: list[str] = []
    origin = Origin(downloads=Folder(str(tmp_path / "kept")), say=said.append)

    def unpack() -> Folder:
        return archives.unpacked(origin, Folder(str(tmp_path)), "a.tgz", lambda name: name.endswith(".jpg"))

    (tmp_path / "a.tgz").write_bytes(data[:-20])
    with pytest.raises(ValueError, match="damaged"):
        unpack()
    assert not (tmp_path / "kept" / "a.json").exists()
    (tmp_path / "a.tgz").write_bytes(data)
    for _ in range(3):
        to = Path(unpack().absolute)
        assert {str(path.relative_to(to)): path.read_bytes() for path in to.rglob("*.*")} == files
    assert len(said) == 2
    tarred(tmp_path / "a.tgz", {"in/0.jpg": b"other"})
    assert unpack().read("in/0.jpg") == b"other" and len(said) == 3


# Pets and Flowers


PETS = {"Abyssinian_100": 1, "american_bulldog_7": 2, "pug_52": 26, "yorkshire_terrier_9": 37}


def pets_list(names: dict[str, int]) -> bytes:
    lines = "".join(f"{name} {number} {1 + name[0].islower()} 1\n" for name, number in names.items())
    return f"#Image CLASS-ID SPECIES BREED ID\n# 1:Cat 2:Dog\n{lines}".encode()


def pets_files() -> tuple[dict[str, bytes], dict[str, bytes]]:
    pictures = {f"images/{name}.jpg": noise(500, seed=number).tobytes() for name, number in PETS.items()}
    notes = {
        "annotations/list.txt": pets_list(PETS),
        "annotations/trainval.txt": pets_list({name: PETS[name] for name in ("pug_52", "Abyssinian_100")}),
        "annotations/test.txt": pets_list({name: PETS[name] for name in ("yorkshire_terrier_9", "american_bulldog_7")}),
        "annotations/trimaps/pug_52.png": b"x",
    }
    return {**pictures, "images/pug_52.mat": b"x", "images/._pug_52.jpg": b"x"}, notes


@pytest.mark.parametrize("archived", [("images", "annotations"), ("images",), ("annotations",), ()])
def test_every_pet_has_the_bytes_and_the_breed_it_is_listed_with(archived: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    pictures, notes = pets_files()
    for name, files in (("images", pictures), ("annotations", notes)):
        if name in archived:
            tarred(source / f"{name}.tar.gz", files)
        else:
            laid(source, files)
    origin = Origin(str(source), Folder(str(tmp_path / "kept")), say=lambda line: None)
    dataset, seen = small(pets.DATASET, trainval=2, test=2), {}
    for split in ("trainval", "test"):
        found = dataset.pictures(split, origin)
        assert isinstance(found, Ranges) and found.table["size"].to_pylist() == [-1, -1]
        seen |= {picture.key: (picture.data, picture.labels) for picture in found}
        assert list(seen)[-2:] == [
            line.split()[0] for line in notes[f"annotations/{split}.txt"].decode().split("\n")[2:4]
        ]
    assert seen == {name: (pictures[f"images/{name}.jpg"], (number - 1,)) for name, number in PETS.items()}
    assert not list((tmp_path / "kept").rglob("*.mat")) and not list((tmp_path / "kept").rglob("*.png"))


LINES = some.lists(some.tuples(some.integers(0, 36), some.integers(1, 300)), min_size=1, unique=True)


@given(chosen=LINES, blank=some.sampled_from(["", "# note\n", "\n", "  \n"]))
@settings(max_examples=50, deadline=None)
def test_every_line_of_a_list_of_pets_is_a_picture_of_its_breed(chosen: list[tuple[int, int]], blank: str) -> None:
    names = [f"{pets.BREEDS[breed]}_{number}" for breed, number in chosen]
    lines = [f"{name} {breed + 1} 1 1\n" for name, (breed, _) in zip(names, chosen, strict=True)]
    found, labels = annotated.listed(blank + blank.join(lines), pets.BREEDS, "list")
    assert found == names and labels.tolist() == [breed for breed, _ in chosen]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Abyssinian_1 1 1", "line 1 is not a name and three numbers"),
        ("# x\nAbyssinian_1 one 1 1", "line 2 is not a name and three numbers"),
        ("Abyssinian_1 2 1 1", "line 1: Abyssinian_1 is of no breed that is number 2"),
        ("Abyssinian_1 0 1 1", "no breed that is number 0"),
        ("Abyssinian_1 38 1 1", "no breed that is number 38"),
        ("../Abyssinian_1 1 1 1", "no breed that is number 1"),
        ("Abyssinian_1 1 1 1\n\nAbyssinian_1 1 1 1", "line 3: Abyssinian_1 is there twice"),
        ("# x", "lists no picture"),
    ],
)
def test_a_list_of_pets_that_is_wrong_in_any_way_is_refused_by_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"list.*{words}"):
        annotated.listed(text, pets.BREEDS, "list")


def flower_labels(count: int = 9) -> np.ndarray:
    return (np.arange(count, dtype=np.uint8) * 11) % 102 + 1


SETS = {"trnid": [[3, 1]], "valid": [[9, 2, 5]], "tstid": [[4, 6, 7, 8]]}


@pytest.mark.parametrize("archived", [True, False])
def test_every_flower_has_the_bytes_and_the_label_of_its_number(archived: bool, tmp_path: Path) -> None:
    files = {f"jpg/image_{number:05}.jpg": noise(300, seed=number).tobytes() for number in range(1, 10)}
    source = tmp_path / "source"
    source.mkdir()
    tarred(source / "102flowers.tgz", files) if archived else laid(source, files)
    savemat(source / "imagelabels.mat", {"labels": flower_labels()[None]})
    savemat(source / "setid.mat", {name: np.array(numbers, np.uint16) for name, numbers in SETS.items()})
    origin = Origin(str(source), Folder(str(tmp_path / "kept")), say=lambda line: None)
    for split, name in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        found = small(flowers.DATASET, **{split: len(SETS[name][0])}).pictures(split, origin)
        assert [(picture.key, picture.data, picture.labels) for picture in found] == [
            (f"image_{number:05}", files[f"jpg/image_{number:05}.jpg"], (int(flower_labels()[number - 1]) - 1,))
            for number in SETS[name][0]
        ]


@pytest.mark.parametrize(
    ("labels", "chosen", "words"),
    [
        (flower_labels(), [[1, 10]], "setid.mat: trnid has 10 at place 1, not a whole number from 1 to 9"),
        (flower_labels(), [[0]], "setid.mat: trnid has 0 at place 0"),
        (flower_labels(), [[2, 3, 2]], "setid.mat: trnid has a picture twice"),
        (flower_labels(), [[1.5]], r"setid.mat: trnid has 1.5 at place 0"),
        (np.array([1, 103]), [[1]], "imagelabels.mat: labels has 103 at place 1"),
        (np.array([1, np.nan]), [[1]], "imagelabels.mat: labels has nan at place 1"),
        ("words", [[1]], "imagelabels.mat holds no array of numbers 'labels'"),
    ],
)
def test_flowers_whose_numbers_do_not_fit_are_refused_by_file(labels, chosen, words: str, tmp_path: Path) -> None:
    (tmp_path / "jpg").mkdir()
    savemat(tmp_path / "imagelabels.mat", {"labels": labels})
    savemat(tmp_path / "setid.mat", {**SETS, "trnid": np.array(chosen)})
    with pytest.raises(ValueError, match=f"{tmp_path}/{words}"):
        flowers.DATASET.pictures("train", Origin(str(tmp_path)))


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    origin = Origin(str(tmp_path), Folder(str(tmp_path / "kept")))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds neither the folder annotations nor annotations.tar"):
        pets.DATASET.pictures("test", origin)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/imagelabels.mat does not exist"):
        flowers.DATASET.pictures("test", origin)
    (tmp_path / "annotations").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/annotations/test.txt does not exist"):
        pets.DATASET.pictures("test", origin)


def test_pets_and_cifar_are_the_same_from_a_store_as_if_they_lay_in_a_folder(tmp_path: Path) -> None:
    pictures, notes = pets_files()
    packed = {"images.tar.gz": pictures, "annotations.tar.gz": notes}
    packed["cifar-10-binary.tar.gz"] = cifar_files(cifar.TEN, cifar10.CLASSES, of_python_3)[1]
    store = Folder(f"memory://{tmp_path.name}")
    for name, files in packed.items():
        store.write(f"source/{name}", tarred(tmp_path / name, files))
    found = []
    for source, kept in ((str(tmp_path), Folder(str(tmp_path / "kept"))), ((store / "source").url, store / "kept")):
        origin = Origin(source, kept, say=lambda line: None)
        cats = [pets.read(split, origin) for split in ("trainval", "test")]
        digits = small(cifar10.DATASET, train=5 * EACH).pictures("train", origin)
        files = [archives.apart(split.place(number)[0]) for split in cats for number in range(2)]
        rows = [row for split in cats for row in split.table.select(["key", "labels"]).to_pylist()]
        found.append((rows, [folder.read(name) for folder, name in files], pixels(digits).tobytes()))
    assert found[0] == found[1] and len(found[0][0]) == len(PETS)


# SVHN


@pytest.mark.parametrize("compressed", [True, False])
def test_every_digit_of_a_house_number_is_labelled_with_itself(compressed: bool, tmp_path: Path) -> None:
    wanted, digits = noise(12, 32, 32, 3), np.arange(12) % 10
    labels = np.where(digits == 0, 10, digits)[:, None].astype(np.uint8)
    saved = {"X": wanted.transpose(1, 2, 3, 0), "y": labels}
    savemat(tmp_path / "test_32x32.mat", saved, do_compression=compressed)
    found = small(svhn.DATASET, test=12).pictures("test", Origin(str(tmp_path)))
    assert np.array_equal(pixels(found), wanted)
    assert [picture.labels for picture in found] == [(digit,) for digit in digits]
    assert [svhn.DATASET.classes[digit] for digit in digits] == [str(digit) for digit in digits]
    assert found.table["key"].to_pylist()[-1] == "test-000011"


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"X": noise(32, 32, 3, 2)}, "holds no array of numbers 'y'"),
        ({"X": noise(32, 32, 3, 2), "y": [[1], [2], [3]]}, "holds 2 pictures and 3 labels"),
        ({"X": noise(32, 32, 3, 2), "y": [[1], [0]]}, "y has 0 at place 1, not a whole number from 1 to 10"),
        ({"X": noise(32, 32, 3, 2), "y": [[11], [1]]}, "y has 11 at place 0"),
        ({"X": noise(2, 32, 32, 3), "y": [[1], [2]]}, "holds no pictures: X is uint8"),
        ({"X": noise(32, 32, 3, 2) * 1.0, "y": [[1], [2]]}, "holds no pictures: X is float64"),
    ],
)
def test_what_are_no_digits_is_refused_by_name(saved: dict[str, Any], words: str, tmp_path: Path) -> None:
    savemat(tmp_path / "test_32x32.mat", saved)
    with pytest.raises(ValueError, match=f"{tmp_path}/test_32x32.mat.* ?{words}"):
        svhn.DATASET.pictures("test", Origin(str(tmp_path)))


def test_a_file_of_matlab_that_is_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    savemat(tmp_path / "x.mat", {"X": noise(50, 7), "y": noise(9)}, do_compression=True)
    data = (tmp_path / "x.mat").read_bytes()
    for place in (0, 3, 100, 130, 200, len(data) - 30, len(data) - 1):
        (tmp_path / "x.mat").write_bytes(data[:place])
        with pytest.raises(ValueError, match=f"{tmp_path}/x.mat (is damaged|holds no array)"):
            matlab.read(Folder(str(tmp_path)), "x.mat", "X", "y")


# dSprites


class Poison:
    """What breaks whoever unpickles it."""

    def __reduce__(self) -> tuple:
        return eval, ("1 / 0",)


def sprite_arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    factors = np.random.default_rng(1).integers(0, sprites.FACTORS, (count, 6))
    return noise(count, 64, 64) % 2, factors


def save_sprites(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    images, factors = sprite_arrays(count)
    poison = np.array({"title": Poison()}, object)
    np.savez_compressed(path, imgs=images, latents_classes=factors, latents_values=factors / 9, metadata=poison)
    return images, factors


@pytest.mark.parametrize("place", [4, 3])
def test_every_sprite_is_in_one_split_with_its_pixels_and_vtabs_label(place: int, tmp_path: Path) -> None:
    images, factors = save_sprites(tmp_path / sprites.FILE, 200)
    splits = {"train": 160, "val": 20, "test": 20}
    dataset = small(dsprites.DATASETS[0] if place == 4 else dsprites.DATASETS[1], **splits)
    width, seen = {4: 2, 3: 2.5}[place], []
    for split, source in zip(splits, (tmp_path, tmp_path / sprites.FILE, tmp_path), strict=True):
        found = dataset.pictures(split, Origin(str(source)))
        assert found.table["key"].to_pylist() == [picture.key for picture in found]
        assert found.table["labels"].to_pylist() == [list(picture.labels) for picture in found]
        for picture in found.take(np.arange(len(found))[::-1]):
            number = int(picture.key)
            assert np.array_equal(picture.data, images[number] * 255)
            assert picture.labels == (int(np.floor(factors[number, place] / width)),)
            seen.append(number)
    assert sorted(seen) == list(range(200))


@pytest.mark.slow
def test_both_tasks_on_sprites_split_the_pictures_alike_and_name_every_value_of_theirs() -> None:
    for dataset, task, column in zip(dsprites.DATASETS, (sprites.location, sprites.orientation), (4, 3), strict=True):
        values = sprites.FACTORS[column]
        factors = np.zeros((values, 6), np.int64)
        factors[:, column] = np.arange(values)
        for value, label in enumerate(task(factors)):
            first, last = (int(word) for word in re.findall(r"\d+", dataset.classes[label])[:2])
            assert first <= value <= last
    assert [len(dsprites.numbers(split, 737_280)) for split in dsprites.EDGES] == [589_824, 73_728, 73_728]


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"imgs": noise(3, 64, 64) % 2}, "latents_classes"),
        ({"imgs": noise(3, 64, 64), "latents_classes": np.zeros((3, 6), int)}, "other pixels than 0 and 1"),
        ({"imgs": noise(3, 64, 63) % 2, "latents_classes": np.zeros((3, 6), int)}, r"imgs is uint8 \(3, 64, 63\)"),
        ({"imgs": noise(3, 64, 64) % 2, "latents_classes": np.zeros((2, 6), int)}, "3 pictures, latents_classes is"),
        (
            {"imgs": noise(1, 64, 64) % 2, "latents_classes": np.array([[0, 3, 0, 0, 0, 0]])},
            "picture 0 has the factors",
        ),
        ({"imgs": noise(1, 64, 64) % 2, "latents_classes": np.array([Poison()], object)}, "allow_pickle=False"),
        ({"imgs": np.array([Poison()], object), "latents_classes": np.zeros((1, 6), int)}, "imgs is object"),
    ],
)
def test_what_are_no_sprites_is_refused_by_name(saved: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", **saved)
    with pytest.raises(ValueError, match=f"{tmp_path}/x.npz is not dSprites: .*{words}"):
        sprites.read(str(tmp_path / "x.npz"))


def test_an_npz_that_is_cut_or_damaged_is_refused_by_name(tmp_path: Path) -> None:
    save_sprites(tmp_path / "x.npz", 20)
    data = (tmp_path / "x.npz").read_bytes()
    spoilt = data[:4000] + bytes([data[4000] ^ 0xFF]) + data[4001:]
    for broken in (b"", data[:100], data[:-50], spoilt):
        (tmp_path / "x.npz").write_bytes(broken)
        with pytest.raises(ValueError, match=f"{tmp_path}/x.npz is damaged"):
            sprites.read(str(tmp_path / "x.npz"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/{sprites.FILE} does not exist"):
        sprites.read(str(tmp_path))


# smallNORB


def matrix(array: np.ndarray) -> bytes:
    """The bytes of a binary matrix, written as its readme has it."""
    magic = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[array.dtype.name]
    lengths = [*array.shape, *[1] * (3 - array.ndim)]
    return (
        np.array([magic, array.ndim, *lengths], "<u4").tobytes() + array.astype(array.dtype.newbyteorder("<")).tobytes()
    )


def toys(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of pictures, and instance, elevation, azimuth and lighting of each."""
    number = np.arange(count)
    info = np.stack([number % 10, number % 9, number % 18 * 2, number % 6], axis=1)
    return noise(count, 2, 96, 96), info.astype(np.int32)


def save_toys(folder: Path, split: str, pairs: np.ndarray, info: np.ndarray, compressed: bool = False) -> None:
    for part, array in (("dat", pairs), ("info", info)):
        data, name = matrix(array), f"{norb.FILES[split]}-{part}.mat"
        laid(folder, {f"{name}.gz": gzip.compress(data, 1)} if compressed else {name: data})


@pytest.mark.parametrize("compressed", [True, False])
def test_every_toy_is_seen_by_the_first_camera_from_the_angles_of_its_label(compressed: bool, tmp_path: Path) -> None:
    for number, split in enumerate(("train", "test")):
        pairs, info = toys(20 + number)
        save_toys(tmp_path, split, pairs, info, compressed)
        for dataset, degrees in zip(smallnorb.DATASETS, (info[:, 2] * 10, 30 + info[:, 1] * 5), strict=True):
            found = small(dataset, **{split: len(pairs)}).pictures(split, Origin(str(tmp_path)))
            assert np.array_equal(pixels(found), pairs[:, 0])
            assert isinstance(dataset.classes, tuple)
            assert [dataset.classes[one.labels[0]] for one in found] == [f"{angle} degrees" for angle in degrees]


@given(shape=some.lists(some.integers(0, 5), min_size=1, max_size=5), bytewise=some.booleans())
@settings(max_examples=50, deadline=None)
def test_every_binary_matrix_gives_its_array_and_none_that_is_cut_or_too_long(shape: list[int], bytewise: bool) -> None:
    array = noise(*shape) if bytewise else noise(*shape).astype(np.int32) * -70_000
    found = norb.parse(matrix(array), "x")
    assert found.shape == tuple(shape) and np.array_equal(found, array)
    for broken in (matrix(array)[:-1], matrix(array) + b"0", matrix(array)[:7], b""):
        with pytest.raises(ValueError, match=r"^x is (cut short|too long|no binary matrix)"):
            norb.parse(broken, "x")


def _spoilt(array: np.ndarray, value: int, *place: int) -> np.ndarray:
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("pairs", "info", "words"),
    [
        (toys(2)[0], toys(3)[1], "dat.mat holds 2 pairs"),
        (toys(2)[0][:, :1], toys(2)[1], r"dat.mat holds uint8 \(2, 1, 96, 96\), not pairs"),
        (toys(2)[0], _spoilt(toys(2)[1], 9, 1, 1), "info.mat gives picture 1 the elevation 9"),
        (toys(2)[0], _spoilt(toys(2)[1], 3, 0, 2), "info.mat gives picture 0 the azimuth 3"),
        (toys(2)[0], _spoilt(toys(2)[1], -2, 0, 2), "info.mat gives picture 0 the azimuth -2"),
    ],
)
def test_toys_that_do_not_fit_are_refused_by_file(pairs, info, words: str, tmp_path: Path) -> None:
    save_toys(tmp_path, "test", pairs, info)
    with pytest.raises(ValueError, match=f"{tmp_path}/{norb.FILES['test']}-{words}"):
        norb.views(Folder(str(tmp_path)), "test")


def test_toys_of_a_damaged_or_missing_file_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither smallnorb.*dat\.mat\.gz nor smallnorb.*dat\.mat"):
        norb.views(Folder(str(tmp_path)), "train")
    save_toys(tmp_path, "train", *toys(2), compressed=True)
    name = tmp_path / f"{norb.FILES['train']}-dat.mat.gz"
    name.write_bytes(name.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        norb.views(Folder(str(tmp_path)), "train")
