"""Laws of the factory as a whole: any source, whoever is killed, wherever the shards lie."""

import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.config import Config, Data, Vit
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Feed
from shards import planned
from shards.build import build
from shards.clean import FOUND
from shards.datasets import Dataset, find
from shards.image import Processing
from shards.inplace import index
from shards.manifest import CONTAMINATION, DUPLICATES, INDEX, MANIFEST, REFUSED, ShardSet
from shards.plan import Plan
from shards.recipe import Clean, Recipe
from shards.sources import Arrays, Origin, Ranges, key, listing
from shards.storage import Folder
from shards.verify import verify
from tests.faults import Asked, Fault, Faults, fits
from tests.rings import count
from tests.test_prepare import contents, prepare

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixty pictures in three class folders, sorted by class."""
    chance = np.random.default_rng(0)
    for number in range(60):
        path = tmp_path / "pictures" / "abc"[number // 20] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return tmp_path / "pictures"


def made(source: Path | str, target: Path | str, form: str = "folder", **options: object) -> ShardSet:
    name = str(options.pop("name", "test"))
    recipe = Recipe(name, "all", **{"samples_per_shard": 12, **options})  # type: ignore[arg-type]
    build(recipe, lambda: find(form).pictures("all", Origin(str(source))), Folder(str(target)))
    return ShardSet(str(target))


def rows(shards: ShardSet) -> list[dict]:
    return [row for shard in range(len(shards.counts)) for row in shards.rows(shard).to_pylist()]


# whoever is killed


@pytest.mark.slow
@pytest.mark.soak
def test_every_build_makes_the_same_bytes_though_tasks_and_nodes_are_killed(tmp_path: Path) -> None:
    kills = count(6, 20)
    command = [sys.executable, "-m", "tests.chaos", str(tmp_path), str(kills), "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"killed"')))
    assert Counter(said["killed"]) == {"task": kills - kills // 6, "node": kills // 6}
    assert len(said["made"]) >= 2 and len(set(said["made"])) == 1


# the plan


@pytest.mark.slow
def test_every_shard_mixes_classes_though_the_source_is_sorted_by_class(
    local_ray: None, pictures: Path, tmp_path: Path
) -> None:
    shards = made(pictures, tmp_path / "set")
    classes = [{row["labels"][0] for row in shards.rows(shard).to_pylist()} for shard in range(5)]
    assert classes == [{0, 1, 2}] * 5 and shards.manifest.classes == ("a", "b", "c")


@pytest.mark.parametrize("run", [1, 2, 7, 64])
@pytest.mark.parametrize("samples", [1, 63, 64, 1000])
def test_every_picture_has_one_place_and_runs_stay_together(samples: int, run: int) -> None:
    plan = Plan(samples, 100, "word", run)
    shards = [plan.numbers(shard) for shard in range(plan.shards)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(samples))
    assert [len(shard) for shard in shards] == [plan.size(shard) for shard in range(plan.shards)]
    runs = [set((shard // run).tolist()) for shard in shards]
    assert sum(map(len, runs)) <= -(-samples // run) + plan.shards - 1  # only where a shard ends is a run cut
    if samples == 1000:
        assert all((np.diff(shard) != 1).mean() > 0.9 for shard in shards)


def test_a_plan_on_disk_gives_every_shard_what_the_listing_says(tmp_path: Path) -> None:
    keys = [f"p{number}" for number in range(50)]
    table = listing(
        keys, [n % 7 for n in range(50)], range(50), [n + 1 for n in range(50)], [[n % 3, 1] for n in range(50)]
    )
    source = Ranges("/root", planned.pa.array([f"f{n}" for n in range(7)]), table, ("a", "b", "c"))
    facts, plan = planned.checked(source, (), "test"), Recipe("a", "b", samples_per_shard=8).plan(50)
    planned.write(source, facts, plan, tmp_path / "plan.parquet")
    written = pq.read_table(tmp_path / "plan.parquet")
    assert written.column_names == ["sample", "key", "source", "offset", "length", "labels", "shard", "place"]
    read = planned.Planned(tmp_path / "plan.parquet")
    assert (read.plan, read.facts) == (plan, facts)
    for shard in range(plan.shards):
        found = read.shard(shard, None)
        assert isinstance(found, Ranges)
        for place, number in enumerate(plan.numbers(shard).tolist()):
            assert found.place(place) == (f"/root/f{number % 7}", number, number + 1)
            assert found.table["key"][place].as_py() == f"p{number}"
            assert found.table["labels"][place].as_py() == [number % 3, 1]


@pytest.mark.parametrize(
    ("keys", "labels", "words"),
    [
        (["a", "b", "a"], [[0], [0], [0]], "test has two pictures of the key 'a': /f and /g"),
        (["a", "b", "c"], [[0], [3], [1]], "test: picture b has the label 3, there are 3 classes"),
        (["a", "b", "c"], [[0], [2], [-1]], "test: picture c has the label -1, there are 3 classes"),
        ([], [], "test has no pictures"),
    ],
)
def test_every_listing_that_cannot_be_planned_is_refused(keys: list[str], labels: list, words: str) -> None:
    count = len(keys)
    files = planned.pa.array(["f", "f", "g"])
    source = Ranges("/", files, listing(keys, range(count), [0] * count, [-1] * count, labels))
    with pytest.raises(ValueError, match=words):
        planned.checked(source, ("x", "y", "z"), "test")


def test_a_build_that_was_planned_goes_on_without_looking_at_the_source(
    local_ray: None, pictures: Path, tmp_path: Path
) -> None:
    whole = made(pictures, tmp_path / "whole")
    target, folder = tmp_path / "set", Folder(str(tmp_path / "set"))
    (pictures / "a" / "000.png").rename(tmp_path / "away.png")
    source = find("folder").pictures("all", Origin(str(pictures)))
    assert len(source) == 59
    (tmp_path / "away.png").rename(pictures / "a" / "000.png")

    def fails() -> Ranges:
        raise AssertionError("the plan is there")

    recipe = Recipe("test", "all", samples_per_shard=12)
    from shards import build as module

    plan, _ = module._planned(
        recipe, lambda: find("folder").pictures("all", Origin(str(pictures))), folder, tmp_path / "plan.parquet"
    )
    assert plan.plan.samples == 60
    build(recipe, fails, folder)
    assert contents(target) == contents(Path(whole.folder.absolute))


# what is left out


def test_every_picture_of_the_source_is_in_one_shard_or_refused_with_its_reason(
    local_ray: None, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "a" / "003.png").write_bytes(b"")
    (pictures / "b" / "023.png").write_bytes((pictures / "b" / "023.png").read_bytes()[:200])
    (pictures / "c" / "043.png").write_bytes(b"<html>")
    shards = made(pictures, tmp_path / "set", refused_limit=0.05)
    refused = shards.beside(REFUSED)
    assert refused is not None
    assert {(row["key"], row["reason"]) for row in refused.to_pylist()} == {
        ("a-003", "empty"),
        ("b-023", "truncated"),
        ("c-043", "not a picture"),
    }
    keys = [row["key"] for row in rows(shards)] + refused["key"].to_pylist()
    assert sorted(keys) == sorted(key(f"{path.parent.name}/{path.name}") for path in pictures.glob("*/*"))
    assert shards.manifest.refused == {"empty": 1, "not a picture": 1, "truncated": 1}
    assert verify(shards.folder.url) == ""
    (tmp_path / "set" / REFUSED).write_bytes(b"x")
    assert verify(shards.folder.url).endswith("refused.parquet: its digest is not that of the manifest")


def test_a_higher_limit_of_refusals_goes_on_with_what_was_made(local_ray: None, pictures: Path, tmp_path: Path) -> None:
    (pictures / "a" / "003.png").write_bytes(b"")
    with pytest.raises(ValueError, match="more than 1% of 60 pictures are refused: 1 empty"):
        made(pictures, tmp_path / "set")
    assert made(pictures, tmp_path / "set", refused_limit=0.02).manifest.samples == 59


# wherever they lie


@pytest.mark.slow
def test_a_source_in_a_bucket_gives_the_bytes_of_one_in_a_folder_whatever_stays_together(
    local_ray: None, s3: str, pictures: Path, tmp_path: Path
) -> None:
    for path in pictures.glob("*/*"):
        Folder(s3).put(path, f"pictures/{path.parent.name}/{path.name}")
    for run in (1, 5):
        local = made(pictures, tmp_path / f"local-{run}", run=run)
        words = ("--name", "test", "--source", f"{s3}/pictures", "--samples-per-shard", "12", "--run", run)
        done = prepare("folder", *words, "--to", tmp_path / f"remote-{run}")
        assert done.returncode == 0, done.stderr
        assert contents(Path(local.folder.absolute)) == contents(tmp_path / f"remote-{run}" / "test" / "all")


@pytest.mark.slow
def test_a_set_made_and_verified_through_a_faulty_store_is_the_one_of_a_folder(
    local_ray: None, faulty: tuple[str, Faults], pictures: Path, tmp_path: Path
) -> None:
    url, faults = faulty
    for path in pictures.glob("*/*"):
        Folder(url).put(path, f"pictures/{path.parent.name}/{path.name}")
    wanted = made(pictures, tmp_path / "quiet")
    kinds = [Fault.SLOW_DOWN, Fault.INTERNAL, Fault.RESET, Fault.TRUNCATED, Fault.LOST, Fault.SHORT, Fault.EXPIRED]
    asked = itertools.count(1)

    def fifth(request: Asked) -> Fault | None:
        number = next(asked)
        fitting = [kind for kind in kinds if fits(kind, request.method)]
        return fitting[number // 5 % len(fitting)] if number % 5 == 0 else None

    faults.choose(fifth)
    words = ("--name", "test", "--source", f"{url}/pictures", "--samples-per-shard", "12", "--to", f"{url}/sets")
    done = prepare("folder", *words)
    assert done.returncode == 0, done.stderr
    whole = prepare("verify", f"{url}/sets/test/all")
    assert whole.returncode == 0, whole.stdout
    assert sum(faults.injected.values()) >= 10
    faults.calm()
    bucket = Folder(f"{url}/sets/test/all")
    assert {name: bucket.read(name) for name, _ in bucket.find()} == contents(Path(wanted.folder.absolute))


def images(shards: ShardSet) -> dict[str, np.ndarray]:
    """What a run would be fed with, by key."""
    corpus = Corpus([shards])
    feed = Feed(corpus, Config("x", 3, model=Vit(image_size=20), data=Data(eval_crop=1.0)))
    batches = list(feed.evaluation(16))
    feed.close()
    return {
        key: np.append(pixels.numpy().reshape(-1), labels.numpy())
        for batch in batches
        for key, pixels, labels in zip(batch.keys, batch.images, batch.labels, strict=True)
        if key
    }


@pytest.mark.parametrize("where", ["beside", "elsewhere"])
def test_shards_made_elsewhere_are_served_as_ours_are(
    local_ray: None, pictures: Path, tmp_path: Path, where: str
) -> None:
    ours, foreign = made(pictures, tmp_path / "ours"), tmp_path / "foreign"
    foreign.mkdir()
    with webdataset.ShardWriter(str(foreign / "%05d.tar"), maxcount=25, verbose=0) as writer:
        for path in sorted(pictures.glob("*/*")):
            label = "abc".index(path.parent.name)
            writer.write({"__key__": f"{path.parent.name}-{path.stem}", "png": path.read_bytes(), "cls": label})
    before = contents(foreign)
    target = foreign if where == "beside" else tmp_path / "description"
    for _ in range(2):  # the second finds it done
        index(str(foreign), Folder(str(target)), "foreign", ("a", "b", "c"))
    theirs = ShardSet(str(target))
    assert {name: data for name, data in contents(foreign).items() if name.endswith(".tar")} == before
    assert theirs.manifest.tars == ("" if where == "beside" else str(foreign)) and theirs.manifest.samples == 60
    served, wanted = images(theirs), images(ours)
    assert served.keys() == wanted.keys() and all(np.array_equal(served[one], wanted[one]) for one in wanted)
    assert verify(str(target)) == ""
    (foreign / "00001.tar").write_bytes((foreign / "00001.tar").read_bytes()[:-512])
    with pytest.raises(ValueError, match=f"{foreign}/00001.tar has "):
        ShardSet(str(target))


def test_shards_whose_labels_fit_no_class_are_not_described(local_ray: None, pictures: Path, tmp_path: Path) -> None:
    made(pictures, tmp_path / "ours")
    with pytest.raises(ValueError, match=f"{tmp_path}/ours has the label 2, there are 2 classes"):
        index(str(tmp_path / "ours"), Folder(str(tmp_path / "set")), "foreign", ("a", "b"))
    assert not (tmp_path / "set" / MANIFEST).exists()


# processing


def test_scaled_sets_differ_from_kept_ones_and_say_so(local_ray: None, pictures: Path, tmp_path: Path) -> None:
    shards = made(pictures, tmp_path / "set", processing=Processing(short_side=10))
    assert {(row["width"], row["height"], row["member"][-3:]) for row in rows(shards)} == {(15, 10, "jpg")}
    assert shards.manifest.recipe["processing"]["short_side"] == 10
    with pytest.raises(ValueError, match="another shard set: processing is"):
        made(pictures, tmp_path / "set")


# the command


@pytest.mark.slow
def test_a_folder_of_pictures_becomes_a_set_by_one_command(pictures: Path, tmp_path: Path) -> None:
    words = ("folder", "--name", "birds", "--source", pictures, "--to", tmp_path / "sets", "--samples-per-shard", "20")
    done = prepare(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"birds/all: 60 pictures in 3 shards, 0.2 MB, at {tmp_path}/sets/birds/all" in done.stdout
    told = prepare("describe", tmp_path / "sets/birds/all", "--sheet", tmp_path / "sheet.png")
    assert told.returncode == 0 and "classes     3, none empty" in told.stdout, told.stderr
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["folder"], "--name is missing: what your data set is called (folder is the form it comes in)"),
        (["folder", "--name", "x", "--to", "x"], "x needs --source: the folder that holds the class folders"),
        (["folder", "--name", "x", "--to", "x", "--source", "/nowhere"], "/nowhere"),
        (
            ["folder", "--name", "x", "--to", "x", "--source", "gs://b/x"],
            "gs://b/x needs a driver that is not installed",
        ),
        (["digits", "--name", "x"], "--name is for pictures without a recipe of their own; digits has its name"),
        (["digits", "--split", "x"], "digits has no split 'x'; there are: train800, val200, test"),
        (["digits", "--to", "x", "--classes", "/none"], "--classes /none: No such file or directory"),
        (["digits", "--to", "x", "--quality", "0"], "quality is 0; it lies between 1 and 100"),
        (["digits", "--to", "x", "--refused-limit", "2"], "refused_limit is 2.0; it is a share between 0 and 1"),
        (["index"], "index takes the folder or URL of the shards first, then --to"),
        (["index", "/nowhere"], "--to is missing: the folder or URL for the description of the shards"),
        (["index", "/nowhere", "--to", "/tmp/x"], "there is no *.tar in /nowhere"),
        (["describe"], "describe takes the folder or URL of a shard set, and perhaps --sheet FILE.png"),
        (["describe", "/nowhere"], "there is no shard set at /nowhere: no such folder, or an empty one"),
    ],
)
def test_every_mistake_is_answered_in_one_line(words: list[str], answer: str, tmp_path: Path) -> None:
    ended = prepare(*words)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and answer in ended.stderr


def test_a_data_set_with_other_counts_than_it_should_have_is_refused() -> None:
    def read(split: str, origin: Origin) -> Arrays:
        return Arrays(["a"], np.zeros((1, 4, 4), np.uint8), np.zeros(1, np.uint8), ("x", "y"))

    def dataset(classes: int, count: int) -> Dataset:
        return Dataset("few", "", "", "", classes, {"train": count}, read)

    assert len(dataset(2, 1).pictures("train", Origin())) == 1
    with pytest.raises(ValueError, match="few/train has 1 pictures, 7 expected"):
        dataset(2, 7).pictures("train", Origin())
    with pytest.raises(ValueError, match="few/train has 2 classes, 3 expected"):
        dataset(3, 1).pictures("train", Origin())


# duplicates and test sets


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Forty different pictures with shapes in them, in two class folders."""
    chance = np.random.default_rng(3)
    for number in range(40):
        small = chance.integers(0, 256, (6, 8, 3), np.uint8)
        path = tmp_path / "scenes" / "ab"[number // 20] / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC).save(path, quality=92)
    return tmp_path / "scenes"


def changed(path: Path, target: Path, **how: bool) -> None:
    """A copy that somebody has worked on."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as picture:
        made = picture.resize((80, 60)) if how.get("small") else picture.copy()
        made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if how.get("mirrored") else made
        made.convert("L" if how.get("grey") else "RGB").save(target, quality=60)


def left(shards: ShardSet) -> dict[str, tuple[str, str, str | None]]:
    table = shards.beside(DUPLICATES)
    assert table is not None
    return {row["key"]: (row["reason"], row["of"], row["test_set"]) for row in table.to_pylist()}


@pytest.mark.parametrize("duplicates", ["drop", "merge"])
def test_every_duplicate_leaves_with_its_reason_and_labels_are_united_if_that_is_wanted(
    local_ray: None, scenes: Path, tmp_path: Path, duplicates: str
) -> None:
    shutil.copy(scenes / "a" / "003.jpg", scenes / "b" / "twin.jpg")
    changed(scenes / "a" / "005.jpg", scenes / "b" / "small.jpg", small=True)
    changed(scenes / "a" / "007.jpg", scenes / "a" / "turned.jpg", mirrored=True)
    shards = made(scenes, tmp_path / "set", clean=Clean(duplicates))  # type: ignore[arg-type]
    assert left(shards) == {
        "b-twin": ("exact duplicate of", "a-003", None),
        "b-small": ("near duplicate of", "a-005", None),
        "a-turned": ("near duplicate of", "a-007", None),
    }
    labels = {row["key"]: row["labels"] for row in rows(shards)}
    assert len(labels) == 40 and labels.keys().isdisjoint(left(shards))
    both = [0, 1] if duplicates == "merge" else [0]
    assert (labels["a-003"], labels["a-005"], labels["a-007"], labels["b-020"]) == (both, both, [0], [1])
    assert shards.manifest.removed == {"exact duplicate": 1, "near duplicate": 2}
    assert verify(shards.folder.url) == ""


def test_no_picture_of_a_test_set_stays_and_a_page_shows_which_were_there(
    local_ray: None, scenes: Path, tmp_path: Path
) -> None:
    tests = tmp_path / "tests"
    for number, how in enumerate(({}, {"small": True}, {"grey": True}, {"mirrored": True})):
        changed(scenes / "a" / f"{number:03}.jpg", tests / "x" / f"t{number}.jpg", **how)
    shutil.copy(scenes / "b" / "030.jpg", tests / "x" / "same.jpg")
    held = made(tests, tmp_path / "held")
    clean = Clean("keep", (held.folder.absolute,))
    shards = made(scenes, tmp_path / "set", clean=clean)
    assert left(shards) == {
        **{f"a-{number:03}": ("in test set", f"x-t{number}", "test/all") for number in range(4)},
        "b-030": ("in test set", "x-same", "test/all"),
    }
    assert shards.manifest.samples == 35 and shards.manifest.removed == {"in test/all": 5}
    page = (tmp_path / "set" / "contamination.html").read_text()
    assert page.count("<img") >= 10 and "5 of the 5 pictures of 1 test set were found" in page
    assert shards.manifest.files.keys() == {INDEX, DUPLICATES, CONTAMINATION, "contamination.html"}
    again = made(scenes, tmp_path / "again", clean=clean)
    assert again.manifest == shards.manifest


@pytest.fixture
def held_out(scenes: Path, tmp_path: Path) -> list[str]:
    """Three test sets: the second holds the first's picture, too, and that twice; the third nothing of the corpus."""
    for target in ("first/x/same", "second/y/again", "first/x/other"):
        number = 5 if target.endswith("other") else 3
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes / "a" / f"{number:03}.jpg", tmp_path / f"{target}.jpg")
    changed(scenes / "a" / "003.jpg", tmp_path / "second" / "y" / "small.jpg", small=True)
    shutil.move(scenes / "b" / "039.jpg", tmp_path / "second" / "y" / "strange.jpg")
    (tmp_path / "third" / "z").mkdir(parents=True)
    shutil.move(scenes / "b" / "038.jpg", tmp_path / "third" / "z" / "strange.jpg")
    return [made(tmp_path / n, tmp_path / f"held-{n}", name=n).folder.absolute for n in ("first", "second", "third")]


def test_every_test_picture_that_was_found_is_named_in_however_many_test_sets_it_lies(
    local_ray: None, scenes: Path, held_out: list[str], tmp_path: Path
) -> None:
    shutil.copy(scenes / "a" / "003.jpg", scenes / "b" / "twin.jpg")
    changed(scenes / "a" / "003.jpg", scenes / "b" / "turned.jpg", mirrored=True)
    shards = made(scenes, tmp_path / "set", clean=Clean("drop", tuple(held_out)))
    table = shards.beside(CONTAMINATION)
    assert table is not None and table.schema.equals(FOUND)
    every = [(row["test_set"], row["of"], row["key"]) for row in table.to_pylist()]
    copies = ("a-003", "b-turned", "b-twin")
    assert every == [  # in the order of the test sets, of their pictures and of the corpus's listing
        (f"{name}/all", of, key)
        for name, url in zip(("first", "second", "third"), held_out, strict=True)
        for of in (row["key"] for row in rows(ShardSet(url)))
        for key in {"x-other": ("a-005",), "y-strange": (), "z-strange": ()}.get(of, copies)
    ]
    exact = {(row["of"], row["key"]) for row in table.to_pylist() if (row["score"], row["distance"]) == (1, 0)}
    assert exact >= {("x-same", "a-003"), ("x-same", "b-twin"), ("y-again", "a-003"), ("x-other", "a-005")}
    assert {("y-small", "a-003"), ("x-same", "b-turned")}.isdisjoint(exact)
    for gone, (reason, of, test_set) in left(shards).items():
        assert reason == "in test set" and (test_set, of, gone) in every
    assert {key for _, _, key in every} == left(shards).keys()
    page = (tmp_path / "set" / "contamination.html").read_text()
    assert f"{len({each[:2] for each in every})} of the 6 pictures of 3 test sets were found" in page


def test_what_was_found_of_test_sets_has_always_the_same_bytes_and_others_are_never_believed(
    local_ray: None, scenes: Path, held_out: list[str], tmp_path: Path
) -> None:
    wanted = Clean("keep", tuple(held_out))
    shards = made(scenes, tmp_path / "set", clean=wanted)
    assert made(scenes, tmp_path / "again", clean=wanted).manifest == shards.manifest
    assert verify(shards.folder.url) == ""
    nothing = made(scenes, tmp_path / "nothing", clean=Clean("keep", (held_out[2],)))
    assert nothing.beside(CONTAMINATION) == FOUND.empty_table() and not nothing.manifest.removed
    path = tmp_path / "set" / CONTAMINATION
    path.write_bytes(path.read_bytes().replace(b"x-same", b"x-sane"))
    with pytest.raises(ValueError, match=f"{CONTAMINATION} is damaged: its digest is not that of the manifest"):
        shards.beside(CONTAMINATION)
    assert verify(shards.folder.url).endswith(f"{CONTAMINATION}: its digest is not that of the manifest")


def test_a_test_set_that_is_none_is_refused_before_anything_is_made(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no shard set at /nowhere"):
        made(scenes, tmp_path / "set", clean=Clean("keep", ("/nowhere",)))
    assert not (tmp_path / "set").exists()


def test_a_set_can_be_made_of_another(local_ray: None, pictures: Path, tmp_path: Path) -> None:
    first = made(pictures, tmp_path / "first")
    second = made(tmp_path / "first", tmp_path / "second", "set", samples_per_shard=30)
    assert {row["key"]: row["labels"] for row in rows(first)} == {row["key"]: row["labels"] for row in rows(second)}
    assert (len(first.counts), len(second.counts)) == (5, 2)
