"""Laws of VTAB's tasks when they are made of the data as published, in small archives of those formats."""

import csv
import gzip
import io
import json
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.io import savemat

from shards.datasets import Dataset, dsprites, pets, vtab
from shards.sources import (
    Origin,
    Picture,
    camelyon,
    classed,
    clevr,
    kitti,
    names,
    norb,
    records,
    retinopathy,
    sprites,
    tfds,
)
from shards.sources.trees import Files, found
from shards.storage import Folder

pytestmark = pytest.mark.timeout(120)

Content = dict[str, bytes]
Expected = Mapping[str, list[tuple[Any, int]]]
"""By split of TensorFlow Datasets: the name of each picture there, and its label."""


def origin(source: Path | str, downloads: Path | None = None) -> Origin:
    return Origin(str(source), Folder(str(downloads or Path(source) / "downloads")), say=lambda line: None)


def laid(folder: Path, files: Content) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zipped(path: Path, files: Content) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("__MACOSX")
        for name, data in {"__MACOSX/._x": b"1", **files}.items():
            archive.writestr(name, data)


def tarred(path: Path, files: Content) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in {f"{Path(next(iter(files))).parent}/.DS_Store": b"1", **files}.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def data(name: object) -> bytes:
    """What stands for a picture of this name: it is not decoded here."""
    return f"picture {name}".encode()


def kept(split: str, labelled: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """In the order of TensorFlow Datasets, by its rule written anew."""
    return sorted(labelled, key=lambda one: int(md5(f"{split}{one[0]}".encode()).hexdigest(), 16))


# the order


@pytest.mark.parametrize(("split", "places"), [("split1", "416285793"), ("split2", "925473681")])
def test_the_order_is_that_of_tensorflow_datasets_own_test(split: str, places: str) -> None:
    given = [1, 2, 3, 4, 5, "6", "7", 8, 9]
    assert [given[place] for place in tfds.order(split, given)] == [int(x) if x not in "67" else x for x in places]


def test_the_first_pictures_of_cifar_10_are_those_that_tensorflow_datasets_shows() -> None:
    shown = ["train_16399", "train_01680", "train_47917", "train_17307", "train_27051", "train_48736"]
    assert [f"train_{place:05}" for place in tfds.order("train", range(50_000))[:6]] == shown


@given(some.lists(some.text(max_size=9), unique=True, max_size=30))
def test_every_name_has_one_place_whatever_the_order_it_is_given_in(given: list[str]) -> None:
    found = [given[place] for place in tfds.order("train", given)]
    assert sorted(found) == sorted(given)
    assert found == [given[::-1][place] for place in tfds.order("train", given[::-1])]


# the tasks, each of a small archive


def of_caltech(folder: Path) -> Expected:
    each = {"accordion": 32, "BACKGROUND_Google": 33, "Faces_easy": 31}
    files = [f"{name}/image_{number:04}.jpg" for name, count in each.items() for number in range(count)]
    inner = {f"101_ObjectCategories/{name}": data(name) for name in files}
    inner["101_ObjectCategories/BACKGROUND_Google/tmp"] = b"no picture"
    tarred(folder / "inner.tar.gz", inner)
    zipped(folder / classed.CALTECH_ZIP, {f"caltech-101/{classed.CALTECH_TAR}": (folder / "inner.tar.gz").read_bytes()})
    (folder / "inner.tar.gz").unlink()
    np.random.seed(1234)
    drawn = []
    for name in sorted(each):
        there = [file.partition("/")[2] for file in sorted(files) if file.startswith(name)]
        there += ["tmp"] * (name == "BACKGROUND_Google")
        drawn += [f"{name}/{file}" for file in np.random.choice(there, 30, replace=False) if file != "tmp"]
    label = {name: names.CALTECH.index(name.lower()) for name in each}
    split = {"train": drawn, "test": [name for name in files if name not in drawn]}
    return {which: [(name, label[name.partition("/")[0]]) for name in chosen] for which, chosen in split.items()}


def of_dtd(folder: Path) -> Expected:
    chosen = {split: [f"{names.DTD[(place * 7) % 47]}/x_{split}_{place}.jpg" for place in range(9)] for split in SPLITS}
    files = {f"dtd/images/{name}": data(name) for listed in chosen.values() for name in listed}
    for split, listed in chosen.items():
        files[f"dtd/labels/{classed.TEXTURES[split]}.txt"] = "".join(f"{name}\n" for name in listed).encode()
    tarred(folder / "dtd-r1.0.1.tar.gz", files)
    return {
        split: [(name, names.DTD.index(name.partition("/")[0])) for name in listed] for split, listed in chosen.items()
    }


def of_sun(folder: Path) -> Expected:
    classes = [("/a/abbey", 0), ("/c/church/outdoor", names.SUN.index("church/outdoor")), ("/y/youth_hostel", 396)]
    chosen = {
        split: [(f"{classes[n % 3][0]}/sun_{split}{n}.jpg", classes[n % 3][1]) for n in range(9)] for split in SPLITS
    }
    tarred(folder / "SUN397.tar.gz", {f"SUN397{name}": data(name) for listed in chosen.values() for name, _ in listed})
    for split, listed in chosen.items():
        (folder / classed.SCENES[split]).write_text("".join(f"{name}\n" for name, _ in listed))
    return chosen


def of_eurosat(folder: Path) -> Expected:
    files = [(f"{name}_{number}.jpg", label) for label, name in enumerate(names.EUROSAT) for number in range(1, 4)]
    top = {f"2750/{names.EUROSAT[label]}/{name}": data(f"{names.EUROSAT[label]}_{name}") for name, label in files}
    zipped(folder / "EuroSAT.zip", {"2750/notes.txt": b"no picture", **top})
    return {"train": [(f"{names.EUROSAT[label]}_{name}", label) for name, label in files]}


def of_resisc(folder: Path) -> Expected:
    each = [(f"{name}_{name}_001.jpg", label) for label, name in enumerate(names.RESISC)]
    laid(
        folder,
        {
            f"NWPU-RESISC45/{names.RESISC[label]}/{name.removeprefix(names.RESISC[label] + '_')}": data(name)
            for name, label in each
        },
    )
    return {"train": each}


def of_eyes(folder: Path) -> Expected:
    chosen = {split: [(f"{number}_{split[:2]}", number % 5) for number in range(9)] for split in SPLITS}
    for split, listed in chosen.items():
        where, name, usage = retinopathy.LISTS[split]
        laid(folder / where, {f"{image}.jpeg": data(image) for image, _ in listed})
        rows = [(image, level, usage) for image, level in listed]
        new = not (folder / name).exists()
        with (folder / name).open("a", newline="") as file:
            csv.writer(file).writerows([("image", "level", "Usage")] * new + rows)
    return chosen


def scene(name: str, depths: list[float]) -> dict[str, Any]:
    objects = [{"pixel_coords": [10, 20, depth], "shape": "cube"} for depth in depths]
    return {"image_filename": name, "objects": objects, "split": "x"}


def of_clevr(label: Callable[[int], int]) -> Callable[[Path], Expected]:
    """Scene number n has 3 + n % 8 objects, of which the last is nearest, in class n % 6."""

    def written(folder: Path) -> Expected:
        files, chosen = {}, {}
        for split, theirs in clevr.FOLDERS.items():
            named = [f"CLEVR_{theirs}_{number:06}.png" for number in range(20)]
            scenes = [
                scene(name, [12.0] * (2 + number % 8) + [7.9 + 0.5 * (number % 6)]) for number, name in enumerate(named)
            ]
            # Not in the order of the pictures.
            files[f"CLEVR_v1.0/scenes/CLEVR_{theirs}_scenes.json"] = json.dumps({"scenes": scenes[::-1]}).encode()
            files.update({f"CLEVR_v1.0/images/{theirs}/{name}": data(name) for name in named})
            chosen[split] = [(name, label(number)) for number, name in enumerate(named)]
        zipped(folder / "CLEVR_v1.0.zip", files)
        return chosen

    return written


def of_kitti(folder: Path) -> Expected:
    count, distances = 60, [7.99, 8.0, 8.01, 20.0, 20.01, None]
    drives = [f"2011_09_26_drive_{number % 20:04}_sync" for number in range(2 * count)]
    rand = np.random.default_rng(0).permutation(2 * count)[:count]  # a picture's line, of more lines than pictures
    mapping = "".join(f"2011_09_26 {drive} {number:010}\n" for number, drive in enumerate(drives))
    listed = ",".join(str(line + 1) for line in rand)
    zipped(
        folder / "devkit_object.zip",
        {"mapping/train_rand.txt": listed.encode(), "mapping/train_mapping.txt": mapping.encode()},
    )
    labels, pictures = {}, {}
    for number in range(count):
        near = distances[number % 6]
        lines = [seen("Pedestrian", 1.0), seen("DontCare", -1000), seen("Van", 50.0)] * (near is not None)
        lines += [seen("Truck", near)] if near is not None else [seen("Cyclist", 3.0)]
        labels[f"training/label_2/{number:06}.txt"] = "\n".join(lines).encode()
        pictures[f"training/image_2/{number:06}.png"] = data(f"{number:06}.png")
    zipped(folder / "data_object_label_2.zip", labels)
    zipped(folder / "data_object_image_2.zip", pictures)
    of = [drives[line] for line in rand]
    np.random.seed(seed=123)
    videos = sorted(set(of))
    test = set(np.random.choice(videos, len(videos) // 10, replace=False))
    validation = set(np.random.choice(sorted(set(videos) - test), len(videos) // 10, replace=False))
    split = ["test" if drive in test else "validation" if drive in validation else "train" for drive in of]
    right = [0, 0, 1, 1, 2, 3]
    return {
        which: [(f"{number:06}.png", right[number % 6]) for number in range(count) if split[number] == which]
        for which in SPLITS
    }


def seen(kind: str, depth: float) -> str:
    return f"{kind} 0.00 0 -1.57 614.24 181.78 727.31 284.77 1.57 1.73 4.15 1.00 1.75 {depth} -1.62"


def of_mazes(folder: Path) -> Expected:
    chosen = {split: [(f"{split}/{number}.jpg", number % 6) for number in range(9)] for split in SPLITS}
    files = {}
    for split, listed in chosen.items():
        made = [record(written(image=data(name), filename=name.encode(), label=label)) for name, label in listed]
        files[f"dmlab-{split}.tfrecord-00000-of-00002"] = b"".join(made[:5])
        files[f"dmlab-{split}.tfrecord-00001-of-00002"] = b"".join(made[5:])
    tarred(folder / records.ARCHIVE, files)
    return chosen


def of_camelyon(folder: Path) -> Expected:
    h5py = pytest.importorskip("h5py")
    chosen = {}
    for number, (split, part) in enumerate(camelyon.PARTS.items()):
        labels = np.arange(9, dtype=np.uint8) // 3 % 2
        for letter, array in (("x", pixels(9, 96, 96, 3, seed=number)), ("y", labels.reshape(-1, 1, 1, 1))):
            file = io.BytesIO()
            with h5py.File(file, "w") as written:
                written.create_dataset(letter, data=array, chunks=True, compression="gzip")
            name = f"camelyonpatch_level_2_split_{part}_{letter}.h5.gz"
            (folder / name).write_bytes(gzip.compress(file.getvalue()))
        chosen[split] = [(f"{part}_{place}", int(label)) for place, label in enumerate(labels)]
    return chosen


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def of_cifar(folder: Path) -> Expected:
    labels = {"train": [place * 3 % 100 for place in range(20)], "test": [place * 7 % 100 for place in range(9)]}
    files = {}
    for split, each in labels.items():
        before = np.array([[9, label] for label in each], np.uint8)
        files[f"cifar-100-binary/{split}.bin"] = np.hstack([before, pixels(len(each), 3072)]).tobytes()
    tarred(folder / "cifar-100-binary.tar.gz", files)
    return {split: list(enumerate(each)) for split, each in labels.items()}


def of_svhn(folder: Path) -> Expected:
    labels = {split: np.arange(count) % 10 + 1 for split, count in (("train", 20), ("test", 9))}
    for split, each in labels.items():
        savemat(folder / f"{split}_32x32.mat", {"X": pixels(32, 32, 3, len(each)), "y": each[:, None]})
    return {split: [(place, int(label) % 10) for place, label in enumerate(each)] for split, each in labels.items()}


def of_pets(folder: Path) -> Expected:
    listed = {"train": range(0, 25), "test": range(25, 37)}
    notes, images, chosen = {}, {}, {}
    for split, breeds in listed.items():
        lines = "".join(f"{pets.BREEDS[breed]}_{breed} {breed + 1} 1 1\n" for breed in breeds)
        notes[f"annotations/{'trainval' if split == 'train' else split}.txt"] = f"# a\n{lines}".encode()
        chosen[split] = [(f"{pets.BREEDS[breed]}_{breed}.jpg", breed) for breed in breeds]
        images.update({f"images/{name}": data(name) for name, _ in chosen[split]})
    tarred(folder / "annotations.tar.gz", {"annotations/README": b"", **notes})
    tarred(folder / "images.tar.gz", images)
    return chosen


def of_flowers(folder: Path) -> Expected:
    ids = {"train": [3, 1, 9, 8, 7], "validation": [2, 4, 5], "test": [6, 10, 11, 12]}
    labels = np.arange(12) * 9 + 1
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), map(np.array, ids.values()), strict=True)))
    tarred(folder / "102flowers.tgz", {f"jpg/image_{n:05}.jpg": data(f"image_{n:05}.jpg") for n in range(1, 13)})
    return {split: [(f"image_{n:05}.jpg", int(labels[n - 1]) - 1) for n in each] for split, each in ids.items()}


def of_sprites(column: int, width: float) -> Callable[[Path], Expected]:
    def written(folder: Path) -> Expected:
        chance = np.random.default_rng(0)
        factors = np.stack([chance.integers(0, count, 40) for count in sprites.FACTORS], 1)
        np.savez_compressed(folder / sprites.FILE, imgs=pixels(40, 64, 64) % 2, latents_classes=factors)
        return {"train": [(place, int(values[column] // width)) for place, values in enumerate(factors)]}

    return written


def of_norb(column: int, width: int) -> Callable[[Path], Expected]:
    def written(folder: Path) -> Expected:
        chosen = {}
        for split, start in norb.FILES.items():
            info = np.array([[0, place % 9, place % 18 * 2, 0] for place in range(20)], "<i4")
            for part, array, magic in (("dat", pixels(20, 2, 96, 96), 0x1E3D4C55), ("info", info, 0x1E3D4C54)):
                shape = [*array.shape, 1][: max(3, array.ndim)]
                head = struct.pack(f"<{2 + len(shape)}I", magic, array.ndim, *shape)
                (folder / f"{start}-{part}.mat.gz").write_bytes(gzip.compress(head + array.tobytes()))
            chosen[split] = [(place, int(values[column]) // width) for place, values in enumerate(info)]
        return chosen

    return written


SPLITS = ("train", "validation", "test")
NATIVE = lambda counts: vtab.native(*(counts[split] for split in SPLITS))  # noqa: E731
CARVED = lambda share: lambda counts: vtab.carved(share, counts["train"], counts["test"])  # noqa: E731
SCENES = lambda counts: vtab.carved(90, counts["train"], counts["validation"], "validation")  # noqa: E731
DIVIDED = lambda share, behind: lambda counts: vtab.divided(share, behind, counts["train"])  # noqa: E731
HALVED = lambda counts: vtab.halved(counts["train"], counts["test"])  # noqa: E731

MADE: dict[str, tuple[Callable[[Path], Expected], Callable[[Mapping[str, int]], vtab.Rule]]] = {
    "caltech101": (of_caltech, CARVED(90)),
    "cifar100": (of_cifar, CARVED(90)),
    "dtd": (of_dtd, NATIVE),
    "flowers": (of_flowers, NATIVE),
    "pets": (of_pets, CARVED(80)),
    "sun397": (of_sun, NATIVE),
    "svhn": (of_svhn, CARVED(90)),
    "camelyon": (of_camelyon, NATIVE),
    "eurosat": (of_eurosat, DIVIDED(60, 80)),
    "resisc45": (of_resisc, DIVIDED(60, 80)),
    "retinopathy": (of_eyes, NATIVE),
    "clevr_count": (of_clevr(lambda number: number % 8), SCENES),
    "clevr_distance": (of_clevr(lambda number: number % 6), SCENES),
    "dmlab": (of_mazes, NATIVE),
    "kitti": (of_kitti, NATIVE),
    "dsprites_location": (of_sprites(4, 2), DIVIDED(80, 90)),
    "dsprites_orientation": (of_sprites(3, 2.5), DIVIDED(80, 90)),
    "smallnorb_azimuth": (of_norb(2, 2), HALVED),
    "smallnorb_elevation": (of_norb(1, 1), HALVED),
}


def small(name: str, counts: Mapping[str, int]) -> Dataset:
    """The task as if so many pictures had been published, 4 of them to learn from and 2 to choose by."""
    dataset = next(dataset for dataset in vtab.DATASETS if dataset.name == f"vtab_{name}")
    folder = next(row[1] for row in vtab.TASKS if row[0] == name)
    assert isinstance(dataset.classes, tuple)
    original = replace(vtab.ORIGINALS[name], rule=MADE[name][1](counts))
    return replace(
        dataset,
        splits={split: original.rule.count(split) for split in dataset.splits},
        read=lambda split, origin: vtab.read(folder, len(dataset.classes), original, split, origin),  # type: ignore[arg-type]
    )


def expected(name: str, split: str, published: Expected) -> list[tuple[Any, int]]:
    """VTAB's rule, task by task, as its paper and its code have it."""
    inside = {which: kept(which, each) for which, each in published.items()}
    train, test = inside["train"], inside.get("test", [])
    match name, split:
        case _, "train800":
            return train[:4]
        case (("dtd" | "flowers" | "sun397" | "camelyon" | "retinopathy" | "dmlab" | "kitti"), _):
            return inside["validation"][:2] if split == "val200" else test
        case (("clevr_count" | "clevr_distance"), "test"):
            return inside["validation"]
        case (("smallnorb_azimuth" | "smallnorb_elevation"), _):
            return test[:2] if split == "val200" else test[len(test) // 2 :]
        case (("eurosat" | "resisc45"), _):
            first, behind = len(train) * 6 // 10, len(train) * 8 // 10
            return train[first : first + 2] if split == "val200" else train[behind:]
        case (("dsprites_location" | "dsprites_orientation"), _):
            first, behind = len(train) * 8 // 10, len(train) * 9 // 10
            return train[first : first + 2] if split == "val200" else train[behind:]
        case _, "val200":
            first = len(train) * (8 if name == "pets" else 9) // 10
            return train[first : first + 2]
    return test


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vtab, "LEARNT", 4)
    monkeypatch.setattr(vtab, "CHOSEN", 2)


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("name", MADE)
def test_every_task_has_of_the_published_data_the_pictures_and_labels_of_vtab(name: str, tmp_path: Path) -> None:
    published = MADE[name][0](tmp_path)
    dataset = small(name, {split: len(each) for split, each in published.items()})
    keys: list[str] = []
    for split in dataset.splits:
        wanted = expected(name, split, published)
        pictures = list(dataset.pictures(split, origin(tmp_path)))
        assert [picture.labels for picture in pictures] == [(label,) for _, label in wanted]
        for picture, (called, _) in zip(pictures, wanted, strict=True):
            assert is_called(picture, called)
        keys += [picture.key for picture in pictures]
        assert len(pictures) >= 2 and all(0 <= label < len(dataset.classes) for _, label in wanted)  # type: ignore[arg-type]
    assert len(set(keys)) == len(keys)


def is_called(picture: Picture, called: Any) -> bool:
    """Whether it is the picture that has this name in TensorFlow Datasets."""
    if isinstance(picture.data, bytes):
        return picture.data == data(called)
    return picture.key.rpartition("-")[2].rpartition("_")[2].lstrip("0") == str(called).rpartition("_")[2].lstrip("0")


def test_every_task_is_there_and_has_the_sizes_of_the_published_splits() -> None:
    assert list(MADE) == list(vtab.ORIGINALS) == [row[0] for row in vtab.TASKS]
    edges = {name: original.rule.parts["val200"] for name, original in vtab.ORIGINALS.items()}
    firsts = {name: first for name, (split, first, _) in edges.items() if split == "train"}
    assert firsts == {
        "caltech101": 2_754,
        "cifar100": 45_000,
        "pets": 2_944,
        "svhn": 65_931,
        "eurosat": 16_200,
        "resisc45": 18_900,
        "clevr_count": 63_000,
        "clevr_distance": 63_000,
        "dsprites_location": 589_824,
        "dsprites_orientation": 589_824,
    }
    assert sum(original.rule.count("test") for original in vtab.ORIGINALS.values()) == 387_904
    assert {original.rule.count(split) for original in vtab.ORIGINALS.values() for split in ("train800",)} == {800}
    assert {original.rule.count(split) for original in vtab.ORIGINALS.values() for split in ("val200",)} == {200}


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("name", ["caltech101", "dtd", "sun397", "eurosat", "clevr_count", "dmlab", "kitti"])
def test_what_an_archive_unpacks_to_gives_the_same_pictures_as_if_it_were_packed(name: str, tmp_path: Path) -> None:
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    packed.mkdir()
    published = MADE[name][0](packed)
    laid(plain, {path.name: path.read_bytes() for path in packed.iterdir() if path.suffix == ".txt"})
    for path in sorted(packed.iterdir()):
        unpack(path, plain)
    dataset = small(name, {split: len(each) for split, each in published.items()})
    for split in dataset.splits:
        theirs = [list(dataset.pictures(split, origin(folder, tmp_path / "d"))) for folder in (packed, plain)]
        assert theirs[0] == theirs[1]


def unpack(path: Path, target: Path) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(target)
        for inner in target.rglob("*.tar.gz"):
            unpack(inner, target)
            inner.unlink()
    elif path.name.endswith(".tar.gz"):
        with tarfile.open(path) as tar:
            tar.extractall(target, filter="data")


@pytest.mark.usefixtures("four")
def test_an_archive_may_be_the_source_itself_or_lie_in_a_bucket(tmp_path: Path, s3: str) -> None:
    published = of_eurosat(tmp_path)
    Folder(s3).write("EuroSAT.zip", (tmp_path / "EuroSAT.zip").read_bytes())
    dataset = small("eurosat", {split: len(each) for split, each in published.items()})
    places = [tmp_path, tmp_path / "EuroSAT.zip", s3, f"{s3}/EuroSAT.zip"]
    theirs = [list(dataset.pictures("test", origin(str(place), tmp_path / "d"))) for place in places]
    assert theirs[0] == theirs[1] == theirs[2] == theirs[3] and len(theirs[0]) == 6


@pytest.mark.usefixtures("four")
def test_the_communitys_list_is_taken_where_both_are_there(tmp_path: Path) -> None:
    published = of_eurosat(tmp_path)
    dataset = small("eurosat", {split: len(each) for split, each in published.items()})
    laid(tmp_path / "eurosat", {"train800.txt": b"a.jpg 1\nb.jpg 2\nc.jpg 3\nd.jpg 9\n"})
    assert dataset.pictures("train800", origin(tmp_path)).table["key"].to_pylist() == ["a", "b", "c", "d"]
    assert len(dataset.pictures("val200", origin(tmp_path))) == 2


def test_data_of_another_size_than_published_are_refused(tmp_path: Path) -> None:
    of_eurosat(tmp_path)
    (eurosat,) = [dataset for dataset in vtab.DATASETS if dataset.name == "vtab_eurosat"]
    with pytest.raises(ValueError, match=r"has 30 pictures in what TensorFlow Datasets calls train, 27,000 expected"):
        eurosat.pictures("train800", origin(tmp_path))


@pytest.mark.parametrize("name", vtab.ORIGINALS)
def test_a_folder_with_nothing_of_a_task_is_refused_by_what_is_missing(name: str, tmp_path: Path) -> None:
    dataset = next(dataset for dataset in vtab.DATASETS if dataset.name == f"vtab_{name}")
    with pytest.raises(
        FileNotFoundError, match=r"; and of vtab-1k there is neither .*/test\.txt nor test\.txt"
    ) as refused:
        dataset.pictures("test", origin(tmp_path))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


# labels


@pytest.mark.parametrize(
    ("depths", "label"),
    [
        ([8.0], 0),
        ([8.0001, 99], 1),
        ([12, 8.5, 11], 1),
        ([8.51], 2),
        ([9.0], 2),
        ([9.0000001], 2),  # as single precision knows it
        ([9.25], 3),
        ([9.5], 3),
        ([10.0], 4),
        ([10.01], 5),
        ([100.0], 5),
    ],
)
def test_the_nearest_object_decides_and_an_edge_is_of_the_nearer_class(depths: list[float], label: int) -> None:
    assert clevr.distance([[0, 0, depth] for depth in depths]) == label


def test_every_number_of_objects_has_a_class_from_three_to_ten() -> None:
    assert [clevr.count([[0, 0, 9]] * count) for count in range(3, 11)] == list(range(8))
    for count in (0, 2, 11):
        with pytest.raises(ValueError, match=f"{count} objects, not 3 to 10"):
            clevr.count([[0, 0, 9]] * count)


@pytest.mark.parametrize(
    ("objects", "label"),
    [
        ([], 3),
        ([("Pedestrian", 2), ("Tram", 3), ("DontCare", -1000), ("Misc", 4)], 3),
        ([("Car", 8.0)], 0),
        ([("Car", 8.01), ("Cyclist", 2)], 1),
        ([("Van", 20.0), ("Car", 60)], 1),
        ([("Truck", 20.01)], 2),
        ([("Car", -3.2), ("Car", 30)], 0),
        ([("Car", 90.0)], 2),
    ],
)
def test_only_vehicles_count_and_the_nearest_decides(objects: list[tuple[str, float]], label: int) -> None:
    assert kitti.distance("\n".join(seen(*one) for one in objects)) == label


@given(some.lists(some.integers(0, 60), min_size=10, max_size=200))
def test_no_drive_is_in_two_splits_and_every_one_is_in_one(numbers: list[int]) -> None:
    drives = [f"drive {number:02}" for number in numbers]
    if len(set(drives)) < 3:
        return
    split = kitti.divided(drives)
    assert sorted(drive for each in split.values() for drive in each) == sorted(set(drives))
    assert len(split["test"]) == len(split["validation"]) == max(1, len(set(drives)) // 10)


def test_location_and_orientation_are_halves_and_two_and_a_halves_whatever_the_other_factors() -> None:
    factors = np.stack([np.arange(40) % count for count in sprites.FACTORS], 1)
    assert sprites.orientation(factors).tolist() == [int(value / 2.5) for value in range(40)]
    assert sprites.location(factors[:32]).tolist() == [value // 2 for value in range(32)]
    assert [len(dsprites.PLACES), len(dsprites.ANGLES)] == [16, 16]


# the evened form of retinas


def photograph(radius: int, brightness: int = 120) -> bytes:
    image = np.zeros((3 * radius, 4 * radius, 3), np.uint8)
    cv2.circle(image, (2 * radius, 3 * radius // 2), radius, (brightness // 2, brightness, brightness), -1)
    image[:, :, 1] += np.where(image[:, :, 1] > 0, np.arange(4 * radius) % 16, 0).astype(np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


@pytest.mark.parametrize("radius", [90, 300, 700])
def test_every_eye_gets_one_size_and_grey_around_it(radius: int) -> None:
    image = cv2.imdecode(np.frombuffer(retinopathy.evened(photograph(radius)), np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (540, 540, 3)
    assert abs(image[:20, :20].astype(int) - 128).max() <= 4 and abs(image.mean() - 128) < 4


def test_an_eye_is_the_same_as_if_its_photograph_had_been_darker() -> None:
    bright, dark = (
        cv2.imdecode(np.frombuffer(retinopathy.evened(photograph(300, light)), np.uint8), cv2.IMREAD_COLOR).astype(int)
        for light in (200, 100)
    )
    inner = slice(100, 440)  # away from the edge of the eye, whose contrast differs
    assert abs(bright[inner, inner] - dark[inner, inner]).mean() < 3


def test_a_black_photograph_is_scaled_by_its_height_and_no_photograph_stays_what_it_is() -> None:
    black = cv2.imencode(".png", np.zeros((300, 400, 3), np.uint8))[1].tobytes()
    image = cv2.imdecode(np.frombuffer(retinopathy.evened(black), np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (540, 540, 3) and (image == 128).all()
    assert retinopathy.evened(b"") == b"" and retinopathy.evened(b"no picture") == b"no picture"


# TensorFlow's records


def masked(checksum: int) -> int:
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(payload: bytes) -> bytes:
    head = struct.pack("<Q", len(payload))
    return head + struct.pack("<I", records.masked(head)) + payload + b"data"


def _message(file: Any, name: str) -> Any:
    message = file.message_type.add()
    message.name = name
    return message


def _field(message: Any, name: str, number: int, kind: int, label: int = 1, type_name: str = "") -> None:
    field = message.field.add(name=name, number=number, type=kind, label=label)
    if type_name:
        field.type_name = type_name


def _example_class() -> Any:
    """`tf.train.Example` as its .proto file describes it, in the protocol buffers' own library."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    for name, kind in (("BytesList", 12), ("FloatList", 2), ("Int64List", 3)):
        _field(_message(file, name), "value", 1, kind, label=3)
    feature = _message(file, "Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate([("bytes", "BytesList"), ("float", "FloatList"), ("int64", "Int64List")], 1):
        feature.field.add(name=f"{name}_list", number=number, type=11, label=1, type_name=f".t.{kind}", oneof_index=0)
    features = _message(file, "Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    _field(entry, "key", 1, 9)
    _field(entry, "value", 2, 11, type_name=".t.Feature")
    _field(features, "feature", 1, 11, label=3, type_name=".t.Features.FeatureEntry")
    _field(_message(file, "Example"), "features", 1, 11, type_name=".t.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


EXAMPLE = _example_class()


def written(**values: Any) -> bytes:
    """An Example that the library wrote: bytes, numbers, or lists of floats, numbers or bytes."""
    made = EXAMPLE()
    for name, value in values.items():
        feature = made.features.feature[name]
        each = value if isinstance(value, list) else [value]
        if each and isinstance(each[0], bytes):
            feature.bytes_list.value.extend(each)
        elif each and isinstance(each[0], float):
            feature.float_list.value.extend(each)
        else:
            feature.int64_list.value.extend(each)
    return made.SerializeToString()


VALUES = some.one_of(
    some.lists(some.binary(max_size=300), min_size=1, max_size=3),
    some.lists(some.integers(-(2**63), 2**63 - 1), max_size=5),
    some.lists(some.floats(width=32), min_size=1, max_size=4),
)


@given(some.dictionaries(some.text(max_size=8), VALUES, max_size=5))
@settings(deadline=None)
def test_every_example_is_read_as_the_librarys_own_writer_meant_it(values: dict[str, list[Any]]) -> None:
    payload = written(**values)
    found = records.example(payload)
    assert found.keys() == values.keys()
    for name, each in values.items():
        read = [payload[one.start : one.end] if isinstance(one, records.Span) else one for one in found[name]]
        assert read == ([] if each and isinstance(each[0], float) else each)


@given(place=some.integers(0, 200), byte=some.integers(0, 255))
@settings(deadline=None, max_examples=300)
def test_an_example_damaged_in_any_byte_is_read_or_refused(place: int, byte: int) -> None:
    payload = bytearray(written(image=b"picture", filename=b"a.jpg", label=[3, 1 << 40]))
    payload[place % len(payload)] = byte
    try:
        records.example(bytes(payload))
    except ValueError as error:
        assert "no Example" in str(error)


def test_the_checksum_is_that_of_the_standard() -> None:
    # RFC 3720, appendix B.4: 32 bytes of zeros, of ones, and the numbers from 0.
    for payload, checksum in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)):
        assert records.masked(payload) == masked(checksum)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-5], r"tfrecord ends within the record at byte"),
        (lambda data: data[:7], r"tfrecord is no file of records, or is damaged at byte 0"),
        (lambda data: b"\x01" + data[1:], r"tfrecord is no file of records, or is damaged at byte 0"),
        (lambda data: data + b"PK", r"tfrecord is no file of records, or is damaged at byte"),
        (lambda data: record(b"no example"), r"tfrecord, record at byte 12: no Example"),
        (lambda data: record(written(image=b"x", filename=b"y")), r"record at byte 12 has no 'label'"),
        (lambda data: record(written(image=b"x", filename=b"y", label=[1, 2])), r"record at byte 12: too many values"),
        (lambda data: record(written(image=b"x", filename=3, label=1)), r"not bytes, bytes and a number"),
    ],
)
def test_records_that_are_not_as_they_should_be_are_refused_by_place(damage: Any, words: str, tmp_path: Path) -> None:
    sound = record(written(image=b"x", filename=b"y", label=1))
    (tmp_path / "dmlab-test.tfrecord").write_bytes(damage(sound))
    with pytest.raises(ValueError, match=words):
        records.mazes("test", origin(tmp_path))


# what is damaged


@pytest.mark.parametrize("size", [0, 10, 2000, -1])
def test_a_zip_that_is_cut_short_is_refused_by_name(size: int, tmp_path: Path) -> None:
    of_eurosat(tmp_path)
    whole = (tmp_path / "EuroSAT.zip").read_bytes()
    (tmp_path / "EuroSAT.zip").write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"EuroSAT\.zip is damaged or no zip: .*fetch it again"):
        classed.satellites("train", origin(tmp_path))


def test_a_damaged_member_of_a_zip_is_refused_by_name_when_it_is_read(tmp_path: Path) -> None:
    zipped(tmp_path / "EuroSAT.zip", {"2750/AnnualCrop/AnnualCrop_1.jpg": pixels(400).tobytes()})
    damaged = bytearray((tmp_path / "EuroSAT.zip").read_bytes())
    place = damaged.index(b"AnnualCrop_1.jpg") + 60
    damaged[place : place + 40] = bytes(40)
    (tmp_path / "EuroSAT.zip").write_bytes(damaged)
    pictures = classed.satellites("train", origin(tmp_path)).pictures
    assert len(pictures) == 1
    with pytest.raises(ValueError, match=r"EuroSAT\.zip: 2750/AnnualCrop/AnnualCrop_1\.jpg is damaged"):
        list(pictures)


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("make", "read", "spoil", "words"),
    [
        (
            of_eurosat,
            classed.satellites,
            lambda at: zipped(at / "EuroSAT.zip", {"other/x.jpg": b"1"}),
            r"EuroSAT\.zip holds no AnnualCrop: it is another archive",
        ),
        (
            of_eurosat,
            classed.satellites,
            lambda at: zipped(at / "EuroSAT.zip", {"2750/AnnualCrop/1.jpg": b"1", "2750/Sea/1.jpg": b"1"}),
            r"Sea is none of the 10 classes",
        ),
        (
            of_caltech,
            classed.caltech,
            lambda at: laid(at / "101_ObjectCategories/accordion", {"image_0001.jpg": b"1"}),
            r"accordion holds 1 files, 30 are to be drawn",
        ),
        (
            of_sun,
            classed.scenes,
            lambda at: (at / "sun397_tfds_tr.txt").unlink(),
            r"comes with the package tensorflow-d",
        ),
        (
            of_dtd,
            classed.textures,
            lambda at: laid(at / "dtd/labels", {"train1.txt": b"tartan/tartan_0001.jpg\n"}),
            r"tartan is none of the 47 classes",
        ),
        (
            of_eyes,
            retinopathy.retinas,
            lambda at: (at / "trainLabels.csv").write_text("image,level\n1_left,0\n2_left,5\n"),
            r"trainLabels\.csv, line 3: no picture's name and a grade",
        ),
        (
            of_clevr(int),
            lambda split, at: clevr.scenes(clevr.count, split, at),
            lambda at: laid(at / "CLEVR_v1.0/scenes", {"CLEVR_train_scenes.json": b'{"scenes": [{}]}'}),
            r"CLEVR_train_scenes\.json: scene 0 is none of CLEVR's: KeyError",
        ),
        (
            of_clevr(int),
            lambda split, at: clevr.scenes(clevr.distance, split, at),
            lambda at: laid(at / "CLEVR_v1.0/scenes", {"CLEVR_train_scenes.json": b"[1]"}),
            r"CLEVR_train_scenes\.json holds no scenes",
        ),
        (
            of_clevr(int),
            lambda split, at: clevr.scenes(clevr.count, split, at),
            lambda at: laid(
                at / "CLEVR_v1.0/scenes",
                {"CLEVR_train_scenes.json": json.dumps({"scenes": [scene("x.png", [9.0])]}).encode()},
            ),
            r"scene 0 is none of CLEVR's: .*1 objects, not 3 to 10",
        ),
        (
            of_kitti,
            kitti.vehicles,
            lambda at: laid(at / "mapping", {"train_rand.txt": b"1,x", "train_mapping.txt": b"a b c\n"}),
            r"the files in mapping do not say where pictures come from",
        ),
        (
            of_kitti,
            kitti.vehicles,
            lambda at: laid(at / "training/label_2", {f"{number:06}.txt": b"Car 1 2" for number in range(60)}),
            r"label_2/0000..\.txt: line 1 has 3 words, an object has 15",
        ),
    ],
)
def test_data_that_are_not_as_published_are_refused_by_file(
    make: Callable[[Path], Expected], read: Callable[[str, Origin], Any], spoil: Spoil, words: str, tmp_path: Path
) -> None:
    make(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refused:
        read("train", origin(tmp_path))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_rar_is_refused_with_the_command_that_unpacks_it(tmp_path: Path) -> None:
    laid(tmp_path, {"NWPU-RESISC45.rar": b"Rar!"})
    with pytest.raises(ValueError, match=r"has to be unpacked first: unrar x NWPU-RESISC45\.rar"):
        classed.aerial("train", origin(tmp_path))


def test_camelyon_says_which_package_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = "camelyonpatch_level_2_split_test"
    laid(tmp_path, {f"{start}_x.h5": b"", f"{start}_y.h5": b""})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"_y\.h5 is read by the package h5py: pip install h5py"):
        camelyon.patches("test", origin(tmp_path))


def test_every_patch_has_its_own_pixels_whatever_the_order_they_are_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_camelyon(tmp_path)
    monkeypatch.setattr(camelyon, "_AT_ONCE", 4)
    found = camelyon.patches("test", origin(tmp_path)).pictures
    numbers = np.array([8, 0, 3, 4, 7])
    taken = found.take(numbers)
    assert np.array_equal([one.data for one in taken], pixels(9, 96, 96, 3, seed=2)[numbers])
    assert np.array_equal([one.data for one in found], pixels(9, 96, 96, 3, seed=2))
    assert taken.table["labels"].to_pylist() == [found.table["labels"].to_pylist()[number] for number in numbers]


def test_what_is_no_file_of_camelyon_is_refused_by_name(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    of_camelyon(tmp_path)
    start = tmp_path / "camelyonpatch_level_2_split_test"
    named = camelyon.patches("test", origin(tmp_path))
    (tmp_path / f"{start}_x.h5.gz").write_bytes(gzip.compress(b"no HDF5"))
    with pytest.raises(ValueError, match=r"test_x\.h5\.gz is no file of PatchCamelyon"):
        named.pictures.take(np.arange(2))
    (tmp_path / f"{start}_x.h5.gz").write_bytes(gzip.compress(b"no HDF5")[:-4])
    with pytest.raises(ValueError, match=r"test_x\.h5\.gz is damaged: .*; fetch it again"):
        named.pictures.take(np.arange(2))
    with h5py.File(f"{start}_x.h5", "w") as file:
        file.create_dataset("x", data=pixels(4, 96, 96, 3))
    with pytest.raises(ValueError, match=r"_x\.h5 holds uint8 \(4, 96, 96, 3\), not uint8 \(9, 96, 96, 3\)"):
        camelyon.patches("test", origin(tmp_path)).pictures.take(np.arange(2))


def test_the_files_of_a_tree_are_its_own_however_it_is_stored(tmp_path: Path) -> None:
    files = {"top/mark": b"0", "top/b/2.jpg": b"1", "top/a/1.jpg": b"2", "top/.hidden/x.jpg": b"3"}
    zipped(tmp_path / "a.zip", files)
    tarred(tmp_path / "a.tar.gz", files)
    laid(tmp_path / "in", files)
    trees = [
        found(origin(tmp_path), ("top",), ("a.zip",), "mark"),
        found(origin(tmp_path), ("top",), ("a.tar.gz",), "mark"),
        found(origin(tmp_path / "in"), ("top",), (), "mark"),
        Files(Folder(str(tmp_path / "in/top"))),
    ]
    for tree in trees:
        assert tree.names() == ["a/1.jpg", "b/2.jpg", "mark"] and tree.names("a") == ["a/1.jpg"]
        assert tree.read(["mark", "b/2.jpg"]) == [b"0", b"1"]
        with pytest.raises(FileNotFoundError, match=r"c/3\.jpg"):
            tree.read(["c/3.jpg"])
        pictures = pickle.loads(pickle.dumps(tree.pictures(["b/2.jpg", "a/1.jpg"], [5, 6]).take(np.array([1, 0]))))
        assert [(one.key, one.data, one.labels) for one in pictures] == [("a-1", b"2", (6,)), ("b-2", b"1", (5,))]
