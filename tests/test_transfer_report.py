"""The report on fine-tunings: results of a sweep in, tables beside the papers' out, in a terminal and a browser."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from pipeline.architectures.vit import vit_ti16
from pipeline.insight import tables as forms
from pipeline.insight import transfer
from pipeline.insight.clean import Held, clean, contaminated, right
from pipeline.insight.published import GROUPS, VTAB
from pipeline.insight.tables import Row, Table
from pipeline.insight.tested import Known, lines
from pipeline.models.weights.exported import find as find_model
from pipeline.models.weights.exported import put
from pipeline.transfer import protocols, tasks
from pipeline.transfer.finetune import Trial, perform
from pipeline.transfer.protocols import Recipe
from pipeline.transfer.results import Results as Kept
from pipeline.transfer.tasks import Task, named
from shards.build import build
from shards.datasets import find
from shards.manifest import CONTAMINATION, MANIFEST, ShardSet
from shards.recipe import Clean
from shards.recipe import Recipe as Making
from shards.sources import Origin
from shards.storage import Folder
from tests import test_finetune, tiny
from tests.browser import drawn
from tests.gang import run_job

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[1]
MODEL, ARCHITECTURE = "c0ffee00" * 8, "ab12cd34" * 8
COUNT = 1000

# --- results, as a sweep leaves them --------------------------------------------------------------------------------


def result(
    task: Task,
    accuracy: float,
    *,
    seed: int = 0,
    split: str = "test",
    rate: float = 0.01,
    right: Sequence[bool] | None = None,
    also: Mapping[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A result of so many pictures named rightly, the first ones unless `right` says which."""
    sets = dict.fromkeys(task.where(part) for part in (*task.training("test"), *task.testing))
    start = more.pop("start", "pretrained")
    trial = {
        "task": asdict(task),
        "data": [[where, f"root of {where}"] for where in (*sets, *(where for _, where in task.also))],
        "split": split,
        "start": start,
        "model": MODEL if start == "pretrained" else ARCHITECTURE,
        "protocol": "vit-1",
        "recipe": asdict(Recipe()),
        "rate": rate,
        "seed": seed,
        **more,
    }
    further = {name: judged(share) for name, share in (also or {}).items()}
    made = {"trial": trial, **judged(accuracy, right), "classes": 10, "seconds": 1.0, "also": further}
    return json.loads(json.dumps(made))


def judged(accuracy: float, right: Sequence[bool] | None = None) -> dict[str, Any]:
    bits = np.arange(COUNT) < round(accuracy * COUNT) if right is None else np.array(right, bool)
    packed = base64.b64encode(np.packbits(bits).tobytes()).decode()
    correct, count = int(bits.sum()), len(bits)
    return {"accuracy": correct / count, "correct": correct, "count": count, "right": packed}


def numbered(*results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{number:024x}": one for number, one in enumerate(results)}


def one(task: str) -> Task:
    (found,) = named(task)
    return found


def cells(table: Table, row: str) -> dict[str, str]:
    """By heading, the cells of the only row that begins so."""
    (found,) = [one for one in table.rows if one.cells[0].startswith(row)]
    return dict(zip(table.columns, found.cells, strict=True))


def titled(made: Sequence[Table], word: str) -> Table:
    (found,) = [table for table in made if word in table.title]
    return found


def vtab(**more: Any) -> list[dict[str, Any]]:
    """Three seeds of each of the 19 tasks, with numbers that all differ."""
    return [
        result(task, 0.5 + 0.02 * i + 0.003 * seed * (i % 3), seed=seed, **more)
        for i, task in enumerate(named("vtab"))
        for seed in range(3)
    ]


def everything() -> dict[str, dict[str, Any]]:
    """Some of all that there can be."""
    large = one("imagenet")
    return numbered(
        *(result(large, 0.8 + s / 1000, seed=s, also={"real": 0.86 + s / 1000, "v2": 0.7}) for s in range(3)),
        *(result(one("cifar10"), 0.97 + s / 500, seed=s) for s in range(3)),
        *(result(one("pets"), 0.91 + s / 500, seed=s, start="scratch") for s in range(3)),
        *vtab(),
        *vtab(protocol="bit-hyperrule-1", model="decade00" * 8)[:-3],
        *(
            result(task, accuracy + seed / 100, seed=seed, start=start, protocol="demo-1")
            for task, of in zip(named("demo"), ((0.95, 0.8), (0.9, 0.7), (0.6, 0.61)), strict=True)
            for start, accuracy in zip(("pretrained", "scratch"), of, strict=True)
            for seed in range(3)
        ),
    )


# --- what counts ----------------------------------------------------------------------------------------------------


def test_every_number_is_the_mean_over_the_seeds_with_their_sample_deviation() -> None:
    of_seed = (0.91, 0.92, 0.95)
    made = transfer.tables(numbered(*(result(one("cifar10"), a, seed=s) for s, a in enumerate(of_seed))))
    said = f"{100 * fmean(of_seed):.2f} ± {100 * stdev(of_seed):.2f}"
    assert cells(titled(made, "table 2"), "c0ffee00, vit-1")["CIFAR-10"] == said
    single = transfer.tables(numbered(result(one("cifar10"), 0.91)))
    assert cells(titled(single, "table 2"), "c0ffee00, vit-1")["CIFAR-10"] == "91.00"


@settings(max_examples=40, deadline=None)
@given(
    dev=st.lists(st.integers(0, COUNT), min_size=3, max_size=3),
    tested=st.lists(st.integers(0, COUNT), min_size=3, max_size=3),
)
def test_whatever_the_test_says_the_rate_that_counts_is_the_one_chosen_without_it(
    dev: list[int], tested: list[int]
) -> None:
    rates = (0.001, 0.01, 0.1)
    task = one("cifar10")
    results = [result(task, a / COUNT, split="dev", rate=rate) for rate, a in zip(rates, dev, strict=True)]
    results += [result(task, a / COUNT, rate=rate) for rate, a in zip(rates, tested, strict=True)]
    (line,) = lines(numbered(*results))
    chosen = max(range(3), key=lambda i: (dev[i], -rates[i]))
    assert line.tests["cifar10"].rate == rates[chosen]
    assert line.values["cifar10"].mean == pytest.approx(100 * tested[chosen] / COUNT)


def test_where_nothing_chose_among_several_tested_rates_no_number_stands_and_the_table_says_so() -> None:
    results = [result(one("pets"), 0.5, rate=0.01), result(one("pets"), 0.9, rate=0.1), result(one("cifar10"), 0.9)]
    table = titled(transfer.tables(numbered(*results)), "table 2")
    assert cells(table, "c0ffee00")["Pets"] == forms.ABSENT
    assert any("several learning rates were tested on pets" in note for note in table.notes)


def test_a_penalty_that_other_tasks_choose_is_theirs_and_not_that_of_its_own_pictures() -> None:
    recipe = asdict(Recipe("fewshot", shots=5))
    dev = {"cifar10": (0.9, 0.1), "pets": (0.1, 0.9), "flowers": (0.2, 0.8)}
    results = [
        result(one(task), accuracy, split=split, rate=rate, recipe=recipe)
        for task, of in dev.items()
        for rate, accuracy in zip((1.0, 2.0), of, strict=True)
        for split in ("dev", "test")
    ]
    (line,) = lines(numbered(*results))
    assert line.tests["cifar10"].rate == 2.0


def test_results_of_other_pictures_or_another_recipe_never_share_a_line() -> None:
    task = one("cifar10")
    again = result(task, 0.5, seed=1)
    again["trial"]["data"][0][1] = "made anew"
    larger = result(task, 0.6, seed=2, recipe=asdict(Recipe(size=512)))
    found = lines(numbered(result(task, 0.9), again, larger))
    assert sorted(line.values["cifar10"].mean for line in found) == [50.0, 60.0, 90.0]
    assert len({line.label for line in found}) == 3


def test_results_from_before_a_setting_was_there_stand_with_those_that_say_it() -> None:
    task = one("cifar10")
    old = result(task, 0.5, seed=1)
    del old["trial"]["recipe"]["shots"]
    (line,) = lines(numbered(result(task, 0.9), old))
    assert line.tests["cifar10"].accuracies() == (0.9, 0.5)


def test_every_model_protocol_and_start_has_a_line_in_the_order_of_their_names() -> None:
    task, models = one("cifar10"), {"a" * 64: Known("run step-200"), "b" * 64: Known("run step-1000")}
    results = [result(task, 0.5, model=model, protocol=p) for model in reversed(models) for p in ("vit-1", "linear-1")]
    results.append(result(task, 0.4, start="scratch"))
    assert [line.label for line in lines(numbered(*results), models)] == [
        "run step-200, linear-1",
        "run step-200, vit-1",
        "run step-1000, linear-1",
        "run step-1000, vit-1",
        "from scratch (ab12cd34), vit-1",
    ]


# --- VTAB-1k --------------------------------------------------------------------------------------------------------


def test_the_headline_is_the_mean_of_the_19_tasks_and_not_of_the_groups() -> None:
    (line,) = lines(numbered(*vtab()))
    accuracies = {task: fmean(line.tests[task].accuracies()) for task in VTAB}
    groups = {group: 100 * fmean(accuracies[task] for task in tasks) for group, tasks in GROUPS.items()}
    assert line.values["vtab"].mean == pytest.approx(100 * fmean(accuracies.values()))
    assert {group: line.values[group].mean for group in groups} == pytest.approx(groups)
    assert abs(line.values["vtab"].mean - fmean(groups.values())) > 0.1
    of_seed = [fmean(line.tests[task].accuracies()[seed] for task in VTAB) for seed in range(3)]
    assert line.values["vtab"].deviation == pytest.approx(100 * stdev(of_seed))


def test_the_deviation_of_a_mean_is_over_those_seeds_that_every_task_has() -> None:
    results = [one for one in vtab() if one["trial"]["seed"] < 2 or one["trial"]["task"]["name"] != "vtab_dmlab"]
    (line,) = lines(numbered(*results))
    of_seed = [fmean(line.tests[task].accuracies()[seed] for task in VTAB) for seed in range(2)]
    assert line.values["vtab"].deviation == pytest.approx(100 * stdev(of_seed))
    assert line.values["vtab"].mean == pytest.approx(100 * fmean(fmean(line.tests[t].accuracies()) for t in VTAB))


@pytest.mark.parametrize("absent", ["vtab_kitti", "vtab_caltech101"])
def test_without_every_task_there_is_no_mean_and_the_table_says_which_are_missing(absent: str) -> None:
    made = transfer.tables(numbered(*(one for one in vtab() if one["trial"]["task"]["name"] != absent)))
    table = titled(made, "VTAB-1k by task")
    (column,) = [i for i, heading in enumerate(table.columns) if heading.startswith("c0ffee00")]
    shown = {row.cells[0]: row.cells[column] for row in table.rows}
    assert shown["mean of 19"] == forms.ABSENT and shown[absent.removeprefix("vtab_")] == forms.ABSENT
    assert sum(cell == forms.ABSENT for cell in shown.values()) == 3, "the task, its group, and all"
    assert f"18 of the 19 tasks of VTAB-1k, so no mean of them; missing: {absent.removeprefix('vtab_')}." in " ".join(
        table.notes
    )


# --- beside the papers ----------------------------------------------------------------------------------------------


def test_every_published_number_stands_beside_ours_and_is_marked_by_its_source() -> None:
    made = transfer.tables(everything())
    table = titled(made, "table 2")
    assert cells(table, "ViT-H/14, JFT [1]") == {
        "model": "ViT-H/14, JFT [1]",
        "ImageNet": "88.55 ± 0.04",
        "ReaL": "90.72 ± 0.05",
        "V2": forms.ABSENT,
        "CIFAR-10": "99.50 ± 0.06",
        "CIFAR-100": "94.55 ± 0.04",
        "Pets": "97.56 ± 0.03",
        "Flowers": "99.68 ± 0.02",
        "VTAB (19)": "77.63 ± 0.23",
    }
    ours = cells(table, "c0ffee00, vit-1")
    assert (ours["ImageNet"], ours["ReaL"], ours["V2"]) == ("80.10 ± 0.10", "86.10 ± 0.10", "70.00 ± 0.00")
    assert "[1] ViT (Dosovitskiy et al. 2021), table 2" in table.notes
    for row in table.rows:
        mark = re.search(r" (\[\d+\])$", row.cells[0])
        assert row.ours != bool(mark)
        assert row.ours or (mark and any(note.startswith(mark[1]) for note in table.notes))
    for paper in ("BiT-M", "MaxViT-T", "CMT-S", "DeiT-B"):
        assert any(row.cells[0].startswith(paper) for row in table.rows), paper
    assert cells(titled(made, "tables 5"), "R50x1+ViT-L/16, 14 epochs")["exaFLOPs"] == "1668"
    task = titled(made, "VTAB-1k by task")
    assert task.columns[3:6] == ("ViT-H/14, JFT [1]", "ViT-L/16, JFT [1]", "ViT-L/16, 21k [1]")
    assert [row.cells[3] for row in task.rows][-1] == "77.6"


@settings(max_examples=5, deadline=None)
@given(st.randoms())
def test_the_tables_are_the_same_in_whatever_order_results_came_and_whatever_they_are_called(random: Random) -> None:
    results = list(everything().values())
    random.shuffle(results)
    assert transfer.tables(numbered(*results)) == transfer.tables(everything())


def test_a_table_without_a_number_of_ours_is_left_out() -> None:
    made = transfer.tables(numbered(result(one("digits"), 0.9, protocol="demo-1")))
    assert [table.title for table in made] == ["Pretrained beside from scratch"]
    assert transfer.tables(numbered(result(one("digits"), 0.9, split="dev"))) == ()


def test_every_task_of_the_demo_shows_pretrained_beside_scratch_and_whether_it_is_ahead() -> None:
    table = titled(transfer.tables(everything()), "beside from scratch")
    rows = {row.cells[0]: row.cells for row in table.rows}
    assert rows["digits"][1:4] == ("96.0 ± 1.0 (3)", "81.0 ± 1.0 (3)", "+15.0 ± 0.8")
    assert {task: cells[-1] for task, cells in rows.items()} == {
        "digits": "ahead",
        "mnist": "ahead",
        "fashion_offset": "no clear difference",
    }
    assert any(note.startswith("fashion_offset") for note in table.notes)


def test_from_scratch_by_another_recipe_is_not_compared() -> None:
    task = one("digits")
    other = result(task, 0.5, start="scratch", recipe=asdict(Recipe(size=512)))
    table = titled(transfer.tables(numbered(result(task, 0.9), other)), "beside from scratch")
    assert table.rows[0].cells[-1] == "not compared"


# --- without what the corpus holds ----------------------------------------------------------------------------------


def held(found: Sequence[bool] | np.ndarray) -> Held:
    """Where every picture has a label."""
    return Held(np.array(found, bool), np.ones(len(found), bool))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whatever_the_corpus_holds_the_clean_subset_is_the_accuracy_on_all_other_pictures(data: st.DataObject) -> None:
    task, pictures = one("cifar10"), data.draw(st.integers(1, 40))
    found, labelled, *rights = (
        np.array(data.draw(st.lists(st.booleans(), min_size=pictures, max_size=pictures))) for _ in range(5)
    )
    labelled[0] = True
    results = [result(task, 0, seed=seed, right=(one & labelled).tolist()) for seed, one in enumerate(rights)]
    for each in results:  # a picture without a label has a bit, but does not count
        each |= {"count": int(labelled.sum()), "accuracy": each["correct"] / int(labelled.sum())}
    (line,) = lines(numbered(*results))
    said = clean(line.tests["cifar10"], {"root of cifar10/test": Held(found, labelled)})
    assert said and (said.pictures, said.found) == (labelled.sum(), (found & labelled).sum())
    assert said.all.mean == pytest.approx(100 * fmean(one[labelled].mean() for one in rights))
    counted = labelled & ~found
    if counted.any():
        assert said.clean and said.clean.mean == pytest.approx(100 * fmean(one[counted].mean() for one in rights))
    else:
        assert said.clean is None


def test_a_test_set_that_the_corpus_was_not_held_against_is_named_and_gets_no_number() -> None:
    some = held(np.arange(COUNT) < 100)
    made = transfer.tables(everything(), {"root of cifar10/test": some, "root of imagenet_real/val": some})
    table = titled(made, "the corpus holds")
    shown = {row.cells[0].split(",")[0]: row.cells for row in table.rows}
    assert shown.keys() == {"CIFAR-10", "ReaL"}
    assert shown["CIFAR-10"][1:] == ("1,000", "100", "97.20 ± 0.20", f"{100 * 872 / 900:.2f} ± 0.22")
    assert "The corpus was not held against the test pictures, as they are now, of: " in table.notes[-1]
    assert {"ImageNet", "V2", "Pets", "VTAB-1k", "digits"} <= set(re.split(r"[:,.] ?", table.notes[-1]))


def test_a_result_whose_pictures_do_not_add_up_is_refused() -> None:
    whole, labelled = result(one("cifar10"), 0.5), np.ones(COUNT, bool)
    assert right(whole, labelled).sum() == COUNT / 2
    for damage in (
        {"correct": 499},
        {"count": 999},
        {"right": whole["right"][:40]},
        {"right": whole["right"][:-4] + "AAAAAAAA"},
    ):
        with pytest.raises(ValueError, match="a result is damaged"):
            right({**whole, **damage}, labelled)


def picture(path: Path, number: int, *, small: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    made = Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)
    (made.resize((80, 60)) if small else made).save(path, quality=85 if small else 92)


def prepared(source: Path, target: Path, dataset: str, split: str, against: Sequence[str] = ()) -> ShardSet:
    recipe = Making(dataset, split, samples_per_shard=5, clean=Clean("keep", tuple(against)))
    build(recipe, lambda: find("folder").pictures("all", Origin(str(source))), Folder(str(target / dataset / split)))
    return ShardSet(str(target / dataset / split))


@pytest.fixture(scope="module")
def corpus(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShardSet, ShardSet, ShardSet]:
    """A test set of twelve, another that has one of them twice, and a corpus that held two: as it is, and smaller."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        picture(folder / "test" / "ab"[number % 2] / f"{number:02}.jpg", number)
    for number in range(2, 4):
        picture(folder / "raw" / "x" / f"copy{number}.jpg", number, small=number == 3)
    for number in range(50, 60):
        picture(folder / "raw" / "x" / f"{number}.jpg", number)
    for name, number, small in (("again", 2, False), ("small", 2, True), ("other", 80, False)):
        picture(folder / "vtab" / "c" / f"{name}.jpg", number, small=small)
    test = prepared(folder / "test", folder / "sets", "cifar10", "test")
    vtab = prepared(folder / "vtab", folder / "sets", "vtab_cifar100", "test")
    against = [test.folder.absolute, vtab.folder.absolute]
    return folder, test, vtab, prepared(folder / "raw", folder / "sets", "corpus", "train", against)


def said_to_be_found(test: ShardSet, found: Mapping[str, Held]) -> set[str]:
    keys = [key for shard in range(len(test.counts)) for key in test.rows(shard, ["key"])["key"].to_pylist()]
    return {key for key, there in zip(keys, found[test.manifest.root].found, strict=True) if there}


def test_every_test_picture_that_a_corpus_held_is_found_again_in_however_many_test_sets_it_lies(
    corpus: tuple[Path, ShardSet, ShardSet, ShardSet],
) -> None:
    folder, test, vtab, made = corpus
    found = contaminated(made.folder.absolute)
    assert list(found) == [test.manifest.root, vtab.manifest.root]
    assert all(one.labelled.all() and one.every for one in found.values())
    assert said_to_be_found(test, found) == {"a-02", "b-03"} and said_to_be_found(vtab, found) == {"c-again", "c-small"}
    mask = found[test.manifest.root].found
    with pytest.raises(ValueError, match=r"was held against no test set.*--against"):
        contaminated(test.folder.absolute)
    for name in ("cifar10", "vtab_cifar100"):
        shutil.copytree(folder / "sets" / name, folder / "moved" / name)
    assert contaminated(made.folder.absolute, str(folder / "moved"))[test.manifest.root].found.tolist() == mask.tolist()
    shutil.rmtree(folder / "test" / "a")
    prepared(folder / "test", folder / "anew", "cifar10", "test")
    with pytest.raises(ValueError, match=r"has no picture a-02: it is not what .* was held against"):
        contaminated(made.folder.absolute, str(folder / "anew"))
    with pytest.raises(ValueError, match="--sets says where it is now"):
        contaminated(made.folder.absolute, str(folder / "nowhere"))


def test_a_corpus_that_names_one_test_picture_for_each_that_left_is_said_to_hold_at_least_so_many(
    corpus: tuple[Path, ShardSet, ShardSet, ShardSet], tmp_path: Path
) -> None:
    _, test, vtab, made = corpus
    shutil.copytree(str(made.folder.local), tmp_path / "old")
    (tmp_path / "old" / CONTAMINATION).unlink()
    files = {name: digest for name, digest in made.manifest.files.items() if name != CONTAMINATION}
    (tmp_path / "old" / MANIFEST).write_bytes(replace(made.manifest, files=files).to_json())
    old, now = contaminated(str(tmp_path / "old")), contaminated(made.folder.absolute)
    assert said_to_be_found(test, old) == said_to_be_found(test, now) and not said_to_be_found(vtab, old)
    data = [["vtab_cifar100/test", vtab.manifest.root]]
    results = numbered(result(one("vtab_cifar100"), 0, right=[True, False, True], data=data))
    for there, word in ((now, "2"), (old, "at least 0")):
        table = titled(transfer.tables(results, there), "the corpus holds")
        assert [row.cells[1:3] for row in table.rows] == [("3", word)]
        assert any(note.startswith("At least") for note in table.notes) == (there is old)


def test_whatever_a_real_fine_tuning_leaves_can_be_read_and_counted_again(tmp_path: Path) -> None:
    for split, sizes in test_finetune.SIZES.items():
        tiny.shard_set(tmp_path / "sets" / "digits" / split, sizes=sizes, classes=test_finetune.CLASSES)
    source = test_finetune.exported(tmp_path / "run", test_finetune.FAMILIES["vit"], tmp_path / "sets")
    task, data = test_finetune.TASK, str(tmp_path / "sets")
    recipe = replace(test_finetune.QUICK, steps=8)
    roots = tasks.roots(tasks.find(data, task))
    trials = [Trial(task, roots, "test", "pretrained", source.digest, "demo-1", recipe, 0.03, seed) for seed in (0, 1)]
    for trial in trials:
        for each, found in perform([trial], str(tmp_path / "run"), data, threads=1):
            Folder(str(tmp_path)).write(f"results/{each.name}.json", json.dumps(found).encode())
    read = transfer.read(Folder(str(tmp_path)))
    assert read.keys() == {trial.name for trial in trials}
    (line,) = lines(read, transfer.named(str(tmp_path / "run")))
    assert line.label == "run, demo-1" and line.tests["digits"].seeds == (0, 1)
    count = {name: ShardSet(f"{data}/{name}").manifest.samples for name, _ in roots}
    nothing = {root: held(np.zeros(count[name], bool)) for name, root in roots}
    for also, name in (("", "digits/test"), ("other", "digits/other")):
        said = clean(line.tests["digits"], nothing, also)
        assert said and said.pictures == count[name] and said.clean == said.all == line.values[also or "digits"]
    assert titled(transfer.tables(read, nothing), "the corpus holds").rows


# --- as files, in a terminal, in a browser --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder."""
    made = tmp_path_factory.mktemp("sweep")
    for name, one in everything().items():
        Folder(str(made)).write(f"results/{name}.json", json.dumps(one).encode())
    return made


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    """The report on it, with the clean subset."""
    results = transfer.read(Folder(str(folder)))
    there = {"root of cifar10/test": held(np.arange(COUNT) < 20)}
    made = transfer.tables(results, there)
    points = transfer.points_csv(results, there)
    target = Folder(str(folder / "report"))
    page = transfer.write(target, made, points, transfer.headline(results), str(folder))
    assert page == f"{folder}/report/report.html"
    return folder / "report"


def report(*words: str) -> subprocess.CompletedProcess[str]:
    return run_job("finetune.py", "report", *words, env={"PATH": "/usr/bin:/bin", "COLUMNS": "160"})


def test_the_command_prints_what_it_writes_and_where(folder: Path, tmp_path: Path) -> None:
    said = report(str(folder), "--to", str(tmp_path / "there"))
    assert said.returncode == 0, said.stderr
    assert said.stdout.rstrip().endswith(f"report: {tmp_path}/there/report.html")
    assert {file.name for file in (tmp_path / "there").iterdir()} == {"report.html", "report.md", "report.csv"}
    for word in ("88.55 ± 0.04", "mean of 19", "no clear difference", "[1] ViT (Dosovitskiy et al. 2021), table 2"):
        assert word in said.stdout, word


def exported(folder: Path, weight: float) -> str:
    """A model's folder, whose pretraining cost as many exaFLOPs; its digest."""
    told = {"exaflops": weight}
    put(Folder(str(folder)), {"w": torch.tensor([weight])}, vit_ti16, 2, mean=[0.5] * 3, std=[0.5] * 3, metrics=told)
    return find_model(str(folder)).digest


def test_every_model_that_is_shown_is_called_by_where_it_lies(tmp_path: Path) -> None:
    whole = exported(tmp_path / "vit_a" / "export", 1.0)
    first, second = (exported(tmp_path / "vit_a" / "milestones" / f"step-{n}", n) for n in (20, 100))
    alone = exported(tmp_path / "bit", 2.0)
    (tmp_path / "vit_a" / "milestones" / "step-200").mkdir()  # has only begun to be written
    same = find_model(str(tmp_path / "bit")).architecture
    of_run = {
        whole: Known("vit_a", same, 1.0),
        first: Known("vit_a step-20", same, 20.0),
        second: Known("vit_a step-100", same, 100.0),
        same: Known("vit_a", same),
    }
    assert transfer.named(f"{tmp_path}/vit_a/,{tmp_path}/bit") == {**of_run, alone: Known("bit", same, 2.0)}
    assert transfer.named(f"{tmp_path}/vit_a/milestones/step-20") == {name: of_run[name] for name in (first, same)}
    shutil.rmtree(tmp_path / "vit_a" / "export")
    assert transfer.named(f"{tmp_path}/vit_a") == {name: of_run[name] for name in (first, second, same)}
    assert transfer.named("") == {}


def test_every_model_is_called_by_where_it_was_when_it_was_fine_tuned(tmp_path: Path) -> None:
    folder, digests = Folder(str(tmp_path / "sweep")), [exported(tmp_path / "vit_a/milestones/step-20", 20.0)]
    digests.append(exported(tmp_path / "vit_b", 3.0))
    for where in ("vit_a/milestones/step-20", "vit_b"):
        Kept(folder).describe(find_model(str(tmp_path / where)))
    asked = ",".join(str(tmp_path / where) for where in ("vit_a/milestones/step-20", "vit_b"))
    expected = transfer.named(asked)
    shutil.rmtree(tmp_path / "vit_a")
    assert transfer.described(folder) == expected and {*digests} < expected.keys()
    (tmp_path / "vit_b").rename(tmp_path / "moved")
    Kept(folder).describe(find_model(str(tmp_path / "moved")))
    assert transfer.described(folder) == expected, "who described it first"


# --- accuracy against compute ---------------------------------------------------------------------------------------

GROWN = {f"{i}" * 64: Known(f"run step-{i}", "vit", 0.004 * i) for i in (1, 2, 3)}
GROWN["f" * 64] = Known("bit", "bit", 0.5)


def grown() -> dict[str, dict[str, Any]]:
    """Better with every checkpoint, and another model that was judged once."""
    return numbered(
        *(
            result(one(task), 0.5 + (i + worth) / 20, seed=seed, model=model)
            for i, model in enumerate(GROWN)
            for worth, task in enumerate(("cifar10", "pets"))
            for seed in range(2)
        ),
        *vtab(model="1" * 64),
        *vtab(model="2" * 64, protocol="linear-1"),
    )


def test_every_curve_is_of_one_task_and_one_architecture_by_compute() -> None:
    (protocol, curves), *others = transfer.growing(lines(grown(), GROWN)).items()
    assert (protocol, others) == ("vit-1", []), "one checkpoint makes no curve"
    assert [curve.name for curve in curves] == ["CIFAR-10", "Pets"]
    for worth, curve in enumerate(curves):
        assert [point.exaflops for point in curve.curve] == pytest.approx([0.004, 0.008, 0.012])
        assert [point.accuracy for point in curve.curve] == pytest.approx([0.5 + (i + worth) / 20 for i in range(3)])
    assert transfer.growing(lines(grown(), {})) == transfer.growing(lines(grown())) == {}


def test_of_checkpoints_that_cost_the_same_a_curve_has_the_mean_and_not_the_best() -> None:
    task, models = (
        one("cifar10"),
        {name * 64: Known(name, "vit", cost) for name, cost in (("a", 1), ("b", 1), ("c", 2))},
    )
    accuracies = zip(models, (0.5, 0.7, 0.8), strict=True)
    results = numbered(*(result(task, accuracy, model=model) for model, accuracy in accuracies))
    ((curve,),) = transfer.growing(lines(results, models)).values()
    assert [point.accuracy for point in curve.curve] == pytest.approx([0.6, 0.8])


def test_the_compute_of_ours_stands_beside_the_papers_in_three_digits() -> None:
    results = grown()
    made = titled(transfer.tables(results, None, GROWN), "by size")
    assert [cells(made, name)["exaFLOPs"] for name in ("run step-1", "run step-3", "bit")] == [
        "0.00400",
        "0.0120",
        "0.500",
    ]
    rows = list(csv.DictReader(io.StringIO(transfer.points_csv(results, None, GROWN))))
    assert {row["exaflops"] for row in rows if row["model"] == "run step-2"} == {"0.008"}
    assert "exaFLOPs" in titled(transfer.tables(results), "by size").columns, "of the papers"


def test_every_task_protocol_and_option_that_the_documentation_names_is_there() -> None:
    text = (ROOT / "docs" / "transfer.md").read_text()
    section = text.split("## Protocols")[1].split("\n\nThe head of")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    said = [name if name[0] != "-" else f"fewshot{name}" for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(said) == sorted(protocol.name for protocol in protocols.ALL)
    known = {task.name for task in tasks.ALL} | tasks.GROUPS.keys()
    words = {word for word in re.findall(r"`(\w+)`", text.split("### Their data")[0]) if word not in ("val",)}
    assert words <= known, words - known
    assert {name for name in re.findall(r"`(vtab_\w+)`", text)} <= known
    of_others = {"--working-dir", "--no-wait", "--from", "--source", "--against", "--split"}
    options = {option.replace("--no-spare", "--spare") for option in re.findall(r"--[a-z][a-z-]*", text)} - of_others
    jobs = "".join((ROOT / "jobs" / f"{name}.py").read_text() for name in ("finetune", "schedule"))
    fields = {*re.findall(r"^    (\w+): ", jobs + (ROOT / "pipeline/insight/transfer.py").read_text(), re.MULTILINE)}
    assert {option[2:].replace("-", "_") for option in options} <= fields


def test_every_mistake_is_answered_in_one_line(folder: Path, tmp_path: Path) -> None:
    damaged, old, choosing = (tmp_path / name for name in ("damaged", "old", "choosing"))
    for place, data in (
        (damaged, b"{"),
        (old, b'{"trial": {}, "accuracy": 1}'),
        (choosing, json.dumps(result(one("digits"), 0.5, split="dev")).encode()),
    ):
        Folder(str(place)).write("results/ab.json", data)
    for name, data in (("half", b"{"), ("older", b"{}")):
        shutil.copytree(folder / "results", tmp_path / name / "results")
        Folder(str(tmp_path / name)).write("models/cd.json", data)
    for words, answer in (
        ([], "report takes the folder of the results first"),
        ([str(tmp_path / "none")], "has no results; python jobs/finetune.py"),
        ([str(damaged)], "ab.json is damaged"),
        ([str(old)], "it is no result of this version"),
        ([str(choosing)], "has no result of a test yet"),
        ([str(tmp_path / "half")], "models/cd.json is damaged"),
        ([str(tmp_path / "older")], "models/cd.json has no 'architecture': it is no model of this version"),
        ([str(folder), "--sets", "x"], "--corpus is missing"),
        ([str(folder), "--corpus", "/nowhere"], "there is no shard set at /nowhere"),
        ([str(folder), "--checkpoints", "/nowhere"], "/nowhere holds no"),
        ([str(folder), "--from", "x"], "no option --from; there are: --to, --corpus, --sets, --checkpoints"),
    ):
        with pytest.raises(ValueError, match=re.escape(answer)) as said:
            transfer.report_main(words)
        assert "\n" not in str(said.value)


def test_every_number_of_ours_stands_in_the_file_at_full_precision_and_published_ones_as_printed(
    written: Path,
) -> None:
    rows = list(csv.DictReader(io.StringIO((written / "report.csv").read_text())))
    ours = {(row["checkpoint"], row["protocol"], row["task"]): row for row in rows if row["source"] == "ours"}
    for line in lines(everything()):
        for column, value in line.values.items():
            row = ours.pop((line.model, line.protocol, column))
            assert float(row["accuracy"]) == value.mean
    assert not ours
    (clean,) = [row for row in rows if row["clean"]]
    assert clean["task"] == "cifar10" and float(clean["clean"]) < float(clean["accuracy"])
    (published,) = [r for r in rows if (r["model"], r["task"]) == ("ViT-L/16, 21k", "flowers") and r["deviation"]]
    assert (published["accuracy"], published["deviation"]) == ("99.61", "0.02")


def test_the_same_numbers_stand_in_the_terminal_in_markdown_and_on_the_page(written: Path) -> None:
    made = transfer.tables(everything(), {"root of cifar10/test": held(np.arange(COUNT) < 20)})
    page = re.sub(r"&nbsp;", " ", (written / "report.html").read_text())
    text = (written / "report.md").read_text()
    shown = printed(made, 400)
    for cell in {cell for table in made for row in table.rows for cell in row.cells[1:]}:
        assert cell in text and cell in shown and f">{cell}</td>" in page, cell
    assert text.count("\n## ") == len(made) == page.count("<h2>")


def printed(made: Sequence[Table], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    forms.show(made, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 110, 160])
def test_whatever_the_width_of_the_terminal_no_number_is_cut_and_no_line_is_longer(width: int) -> None:
    made = transfer.tables(everything(), {"root of cifar10/test": held(np.arange(COUNT) < 20)})
    shown = printed(made, width)
    assert max(map(len, shown.splitlines())) <= width
    for table in made:
        for row in table.rows:
            for i, cell in enumerate(row.cells):
                assert i in table.words or cell in shown, cell
    assert "…" not in shown


@settings(max_examples=50, deadline=None)
@given(
    columns=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    width=st.integers(60, 200),
)
def test_every_column_is_printed_once_whatever_the_width(columns: list[int], width: int) -> None:
    headings = tuple(f"c{i}".ljust(length, "x") for i, length in enumerate(columns))
    table = Table("t", ("row", *headings), (Row(("a", *("1" for _ in columns))),))
    shown = printed([table], width).split()
    assert sorted(word for word in shown if word.startswith("c") and word != "continued") == sorted(headings)


def test_nothing_of_the_page_comes_from_a_network(written: Path) -> None:
    text = (written / "report.html").read_text()
    assert not re.search(r"<(script|link|iframe|object|embed|img|image|use)\b", text)
    assert not re.search(r"@import|url\(|https?://|\b(src|href|srcset)=", text)


def test_the_page_draws_the_curves_that_there_are(tmp_path: Path) -> None:
    results = grown()
    ours = lines(results, GROWN)
    transfer.write(Folder(str(tmp_path)), transfer.tables(results, None, GROWN), "", "title", "somewhere", ours)
    text = (tmp_path / "report.html").read_text()
    (section,) = re.findall(r"<section><h2>Accuracy against.*?</section>", text, re.DOTALL)
    assert section.count("<svg") == 2 and "vit-1</h2>" in section
    for word in ("for CIFAR-10, Pets", ">CIFAR-10</text>", ">Pets</text>", "test accuracy", "exaFLOPs"):
        assert word in section, word
    test_nothing_of_the_page_comes_from_a_network(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 900, 1400])
def test_a_browser_draws_the_page_within_any_width(written: Path, tmp_path: Path, width: int) -> None:
    wide, high = drawn((written / "report.html").read_bytes(), tmp_path, width)
    assert wide <= width, "the page is wider than its window"
    assert high > 1000
