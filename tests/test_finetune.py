"""One fine-tuning is a function of its trial: which pictures it sees, what it learns, and what it is judged by."""

import json
import os
from base64 import b64decode
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.architectures import Architecture, Bit, Cmt, Efficientnet, Hybrid, Maxvit, Vit, preset
from pipeline.models.weights.exported import Exported
from pipeline.models.weights.exported import find as find_model
from pipeline.models.weights.fit import classes_of
from pipeline.objectives.fewshot import ridge, shots
from pipeline.train.run import build, export
from pipeline.transfer import features, finetune, protocols, tasks
from pipeline.transfer.batches import (
    Cut,
    Source,
    judged_crops,
    judged_cuts,
    made_ahead,
    training_crops,
    training_cuts,
    turn,
)
from pipeline.transfer.finetune import Given, Passes, Result, Trial, check, perform, together
from pipeline.transfer.linear import train_heads
from pipeline.transfer.pictures import Pictures, pictures_of
from pipeline.transfer.protocols import Recipe
from pipeline.transfer.tasks import DEV, TEST, Part, Task
from shards.storage import Folder
from tests import tiny

pytestmark = pytest.mark.timeout(300)

CLASSES = 3
SIZES = {"train800": (40, 24), "val200": (21,), "test": (30,), "other": (17,)}
TASK = Task(
    "digits", "digits", (Part("train800"),), (Part("val200"),), (Part("test"),), flip=True, crop=True,
    also=(("other", "digits/other"), ("absent", "digits/absent")),
)  # fmt: skip
QUICK = Recipe(steps=60, batch=32, warmup=6, training="crop", flip=False)
LINEAR = Recipe("linear", steps=80, batch=16, warmup=4, clip=0.0, training="resize", flip=False)
FEWSHOT = Recipe("fewshot", shots=4, training="resize", flip=False, judged=7 / 8)

FAMILIES: dict[str, Architecture] = {
    "vit": Vit(width=16, depth=2, heads=2, hidden=32, patch=4, image_size=12, representation=True, dropout=0.1),
    "distilled": Vit(width=16, depth=1, heads=2, hidden=32, patch=4, image_size=12, distillation=True),
    "hybrid": Hybrid(width=16, depth=1, heads=2, hidden=32, patch=1, image_size=32, trunk=(1, 1), representation=True),
    "bit": Bit((1, 1, 1, 1), image_size=32),
    "cmt": Cmt((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2), (8, 4, 2, 1), stem=8, features=32, image_size=32),
    "maxvit": Maxvit(stem=8, widths=(32, 32), depths=(1, 1), window=2, image_size=32),
    "efficientnet": Efficientnet(width=0.25, depth=0.3, image_size=32),
}


def exported(folder: Path, architecture: Architecture, sets: Path) -> Exported:
    """A run that has ended at its first weights."""
    config = tiny.config(tiny.ShardSet(str(sets / "digits" / "test")), model=architecture)
    model = build(config)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    export(Folder(str(folder)), replace(config, model=model.config), state, {"steps": 0})
    return find_model(str(folder))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and a task: `run`, `sets/digits`."""
    folder = tmp_path_factory.mktemp("finetune")
    for split, sizes in SIZES.items():
        tiny.shard_set(folder / "sets" / "digits" / split, sizes=sizes, classes=CLASSES)
    exported(folder / "run", FAMILIES["vit"], folder / "sets")
    return folder


@pytest.fixture(scope="module")
def pictures(place: Path) -> Pictures:
    sets = tasks.find(str(place / "sets"), TASK)
    return pictures_of(str(place / "sets"), TASK, TASK.training(TEST), tasks.roots(sets))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Sums of several threads may differ in their last bits from one run to the next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def given_of(place: Path, trial: Trial) -> finetune.Given:
    """The trial's pictures."""
    data = str(place / "sets")
    return finetune._given(trial, finetune.found_for(trial, str(place / "run"), data), data, 1)


def trial_of(place: Path, **changes: Any) -> Trial:
    source = find_model(str(place / "run"))
    start = changes.get("start", "pretrained")
    model = source.digest if start == "pretrained" else source.architecture
    data = tasks.roots(tasks.find(str(place / "sets"), changes.get("task", TASK)))
    made = Trial(TASK, data, TEST, start, model, "demo-1", QUICK, 0.03, 0)
    return replace(made, **changes)


def done(place: Path, *trials: Trial, threads: int = 1, source: str = "run") -> list[Result]:
    found = dict(perform(trials, str(place / source), str(place / "sets"), threads=threads))
    assert set(found) == set(trials)
    return [{**found[trial], "seconds": 0} for trial in trials]


def right(result: Result) -> list[int]:
    return np.unpackbits(np.frombuffer(b64decode(result["right"]), np.uint8))[: result["count"]].tolist()


# --- names ----------------------------------------------------------------------------------------------------------


def test_everything_that_decides_a_result_is_in_the_name(place: Path) -> None:
    trial = trial_of(place)
    others = [
        replace(trial, task=replace(trial.task, choosing=(Part("val200", 0, 50),))),
        replace(trial, data=(("digits/train800", "others"), *trial.data[1:])),
        replace(trial, split=DEV),
        replace(trial, start="scratch"),
        replace(trial, model="q" * 64),
        replace(trial, protocol="demo-2"),
        replace(trial, rate=0.02),
        replace(trial, seed=1),
    ]
    for field in fields(Recipe):
        if isinstance(value := getattr(trial.recipe, field.name), str):
            other: Any = value + "?"
        else:
            other = (7,) if field.name == "boundaries" else not value if isinstance(value, bool) else (value or 0) + 1
        others.append(replace(trial, recipe=replace(trial.recipe, **{field.name: other})))
    assert len({each.name for each in [trial, *others]}) == len(others) + 1
    assert replace(trial).name == trial.name and len(trial.name) == 24
    assert replace(trial, rate=1).name == replace(trial, rate=1.0).name  # however the number was written


def test_trials_that_see_the_same_frozen_features_are_done_together_and_no_others(place: Path) -> None:
    for recipe in (LINEAR, FEWSHOT):
        trial = trial_of(place, recipe=recipe)
        same = [replace(trial, rate=0.5), replace(trial, seed=3), replace(trial, rate=0.1, seed=2)]
        assert {together(each) for each in same} == {together(trial)}
        others = [
            replace(trial, split=DEV),
            replace(trial, model="q" * 64),
            replace(trial, recipe=replace(recipe, judged=0.5)),
            *(replace(trial, start="scratch", seed=seed) for seed in range(2)),  # whose weights the seed decides
        ]
        assert len({together(each) for each in [trial, *others]}) == len(others) + 1
    trial = trial_of(place)
    assert len({together(each) for each in (trial, replace(trial, rate=0.5), replace(trial, seed=3))}) == 3


def test_only_a_training_of_all_weights_is_ever_a_run_of_its_own(place: Path) -> None:
    large = trial_of(place, task=replace(TASK, kind="run"))
    assert [replace(large, recipe=recipe).kind for recipe in (QUICK, LINEAR, FEWSHOT)] == ["run", "memory", "memory"]
    assert {trial_of(place, recipe=recipe).kind for recipe in (QUICK, LINEAR, FEWSHOT)} == {"memory"}


# --- what is seen ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 3))
def test_every_picture_is_trained_on_once_an_epoch(count: int, batch: int, seed: int) -> None:
    turns = [turn(count, step, batch, seed) for step in range(-(-3 * count // batch))]
    chosen, epoch = (np.concatenate(column) for column in zip(*turns, strict=True))
    for one in range(3):
        assert sorted(chosen[epoch == one]) == list(range(count))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 15), st.integers(2, 4), st.integers(0, 3))
def test_every_picture_comes_as_often_as_asked_and_is_never_its_own_partner(
    count: int, pairs: int, repeats: int, seed: int
) -> None:
    batch = 2 * pairs
    turns = [turn(count, step, batch, seed, repeats) for step in range(-(-2 * repeats * count // batch))]
    chosen, epoch = (np.concatenate(column) for column in zip(*turns, strict=True))
    for one in range(2 * repeats):
        assert sorted(chosen[epoch == one]) == list(range(count))
    for some, when in turns if pairs >= repeats else ():
        alike = (some[::2] == some[1::2]) & (when[::2] // repeats == when[1::2] // repeats)
        assert not alike.any()


SIDES = np.array([[21, 28], [28, 21], [500, 333], [7, 7]] * 50).T


@pytest.mark.parametrize("training", ["inception", "crop", "resmall", "resize"])
@pytest.mark.parametrize("flip", [True, False])
def test_every_training_crop_lies_in_its_picture_and_is_as_its_recipe_says(training: Any, flip: bool) -> None:
    (width, height), sample = SIDES, np.arange(200)
    recipe = Recipe(training=training, flip=flip, share=6 / 7)
    crops = training_crops(recipe, width, height, sample, np.zeros(200, np.int64), seed=3)
    assert (np.minimum(crops.left, crops.top) >= 0).all() and (np.minimum(crops.width, crops.height) > 0).all()
    assert (crops.left + crops.width <= width).all() and (crops.top + crops.height <= height).all()
    assert crops.mirrored.any() == flip and not crops.mirrored.all()
    sizes = {tuple(row) for row in np.stack([width, height, crops.width, crops.height], 1).tolist()}
    expected = {
        "crop": {(21, 28, 18, 24), (28, 21, 24, 18), (500, 333, 429, 285), (7, 7, 6, 6)},
        "resmall": {(21, 28, 18, 18), (28, 21, 18, 18), (500, 333, 285, 285), (7, 7, 6, 6)},
        "resize": {(21, 28, 21, 28), (28, 21, 28, 21), (500, 333, 500, 333), (7, 7, 7, 7)},
    }
    assert sizes == expected[training] if training != "inception" else len(sizes) > 50
    moved = len({*zip(crops.left[:200:4].tolist(), crops.top[:200:4].tolist(), strict=True)})
    assert moved == 1 if training == "resize" else moved > 4


def test_every_judged_crop_is_in_the_middle_and_never_mirrored() -> None:
    width, height = SIDES[:, :4]
    for evaluation, share, expected in (
        ("square", 1.0, [(0, 0, 21, 28), (0, 0, 28, 21), (0, 0, 500, 333), (0, 0, 7, 7)]),
        ("square", 7 / 8, [(1, 2, 18, 24), (2, 1, 24, 18), (31, 21, 438, 291), (0, 0, 6, 6)]),
        ("central", 1.0, [(0, 3, 21, 21), (3, 0, 21, 21), (83, 0, 333, 333), (0, 0, 7, 7)]),
        ("central", 6 / 7, [(1, 5, 18, 18), (5, 1, 18, 18), (107, 24, 285, 285), (0, 0, 6, 6)]),
    ):
        crops = judged_crops(Recipe(evaluation=evaluation, judged=share), width, height)  # type: ignore[arg-type]
        assert list(zip(*(column.tolist() for column in crops[:4]), strict=True)) == expected
        assert not crops.mirrored.any()


def test_every_pixel_is_the_same_whatever_the_number_of_threads(pictures: Pictures) -> None:
    recipe = Recipe(steps=9, batch=22, training="inception", layers=2)
    assert len({cut.epoch.max() for cut in training_cuts(pictures, recipe, 5)}) > 1
    one, *others = (
        [(cut.chosen, images) for cut, images in made_ahead(pictures, training_cuts(pictures, recipe, 5), 9, threads)]
        for threads in (1, 2, 7)
    )
    assert len(one) == recipe.steps
    for other in others:
        for (chosen, images), (ours, theirs) in zip(one, other, strict=True):
            assert (chosen == ours).all() and torch.equal(images, theirs)
    again = [images for _, images in made_ahead(pictures, training_cuts(pictures, recipe, 6), 9, 1)]
    assert not any(torch.equal(images, theirs) for (_, images), theirs in zip(one, again, strict=True))


def test_every_picture_is_judged_once(pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in (1, 7, 85, 1000):
        monkeypatch.setattr("pipeline.transfer.batches.JUDGED_BATCH", batch)
        chosen = [cut.chosen for cut in judged_cuts(pictures, QUICK)]
        assert np.concatenate(chosen).tolist() == list(range(len(pictures)))


def test_every_label_of_a_picture_is_right_and_one_without_is_not_counted() -> None:
    labels = np.array([[0, 2], [1, -1], [-1, -1], [2, 0]])
    logits = torch.eye(3)[[2, 0, 1, 1]]
    judged: Any = SimpleNamespace(labels=labels)
    said = finetune._judgement(finetune._right(logits, judged), labels)
    assert (said["correct"], said["count"], said["accuracy"]) == (1, 3, 1 / 3)
    assert np.unpackbits(np.frombuffer(b64decode(said["right"]), np.uint8))[:4].tolist() == [1, 0, 0, 0]


def test_a_picture_that_cannot_be_read_is_told_where_its_batch_would_be() -> None:
    class Broken:
        sizes = np.full(40, 8), np.full(40, 8)

        def image(self, i: int) -> Any:
            if i == 33:
                raise ValueError("picture 33 is none")
            return np.zeros((8, 8, 3), np.uint8)

    seen: list[Cut] = []
    cuts = (cut for first in range(0, 40, 10) for cut in [_whole(np.arange(first, first + 10))])
    with pytest.raises(ValueError, match="picture 33 is none"):
        for cut, _ in made_ahead(Broken(), cuts, 8, 2):
            seen.append(cut)
    assert len(seen) == 3


def _whole(chosen: Any) -> Cut:
    sides = np.full(len(chosen), 8)
    return Cut(chosen, np.zeros_like(chosen), judged_crops(Recipe(), sides, sides), None)


# --- what is learnt -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pretrained", "scratch"])
def test_every_trial_has_one_result_and_learns_what_can_be_learnt(place: Path, start: str) -> None:
    trial = trial_of(place, start=start)
    torch.manual_seed(1)
    (first,) = done(place, trial)
    torch.manual_seed(2)
    (again,) = done(place, trial, threads=3)
    assert first == again
    assert json.loads(json.dumps(first))["accuracy"] == first["accuracy"]
    assert (first["count"], first["classes"]) == (30, CLASSES) and first["accuracy"] == first["correct"] / 30
    assert sum(right(first)) == first["correct"] and first["accuracy"] >= 0.9


def test_every_choosing_trial_is_judged_by_the_pictures_to_choose_by_alone(place: Path) -> None:
    quick = replace(QUICK, steps=1, warmup=0)
    (chosen,) = done(place, trial_of(place, split=DEV, recipe=quick))
    assert (chosen["count"], chosen["also"]) == (21, {})
    (tested,) = done(place, trial_of(place, recipe=quick))
    assert (tested["count"], {name: one["count"] for name, one in tested["also"].items()}) == (30, {"other": 17})


def test_every_seed_and_rate_trains_another_model(place: Path) -> None:
    start = find_model(str(place / "run"))
    trial = trial_of(place, recipe=replace(QUICK, steps=3, warmup=0))
    given = given_of(place, trial)
    ends = [_trained(start, given, each) for each in (trial, replace(trial, seed=1), replace(trial, rate=0.1))]
    assert len({end.tobytes() for end in ends}) == 3
    assert _trained(start, given, trial).tobytes() == ends[0].tobytes()


def _trained(start: Exported, given: Given, trial: Trial) -> Any:
    pretrained = trial.start == "pretrained"
    model = features.model_of(start, trial.recipe, given.classes, pretrained=pretrained, seed=trial.seed)
    finetune.finetune(model, start, given, trial)
    return torch.cat([tensor.flatten() for tensor in finetune._averaged(model)]).numpy()


def test_a_moving_average_is_what_is_judged(place: Path) -> None:
    start = find_model(str(place / "run"))
    steady = replace(QUICK, steps=1, decay="steps", warmup=0)  # of which fewer steps are the beginning of more
    trial = trial_of(place, recipe=steady)
    given = given_of(place, trial)
    steps = [_trained(start, given, replace(trial, recipe=replace(steady, steps=count))) for count in (1, 2, 3)]
    model = features.model_of(start, steady, given.classes, pretrained=True, seed=0)
    expected = torch.cat([tensor.flatten() for tensor in finetune._averaged(model)]).numpy()
    for weights in steps:
        expected = 0.7 * expected + 0.3 * weights
    averaged = _trained(start, given, replace(trial, recipe=replace(steady, steps=3, average=0.7)))
    np.testing.assert_allclose(averaged, expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(averaged, steps[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.1},
        {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "layers": 2, "erase": 0.25, "optimizer": "adamw", "clip": 0.0},
        {"decay": "steps", "boundaries": (20, 40), "training": "inception"},
        {"size": 16, "dropout": 0.0, "evaluation": "central", "judged": 6 / 7, "training": "resmall"},
        {"weight_decay": 1e-4, "decayed": "matrices", "average": 0.9},
    ],
)
def test_every_kind_of_recipe_learns_and_is_a_function_of_its_trial(place: Path, changes: dict[str, Any]) -> None:
    rate = 0.003 if changes.get("optimizer") == "adamw" else 0.1
    trial = trial_of(place, recipe=replace(QUICK, **changes), rate=rate)
    (first,), (again,) = done(place, trial), done(place, trial, threads=2)
    assert first == again and first["accuracy"] > 0.6


def test_several_passes_give_the_gradient_of_one_whatever_fits(place: Path) -> None:
    start = find_model(str(place / "run"))
    trial = trial_of(place, recipe=replace(QUICK, dropout=0.0, mixup=0.5))
    given = given_of(place, trial)

    class Small(nn.Module):
        def __init__(self, room: int) -> None:
            super().__init__()
            self.inner = features.model_of(start, trial.recipe, CLASSES, pretrained=False, seed=0)
            self.room, self.passes = room, list[int]()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.passes.append(len(images))
            if len(images) > self.room:
                raise torch.OutOfMemoryError("no room")
            return self.inner(images)

    cut, pixels = next(made_ahead(given.training, training_cuts(given.training, trial.recipe, 0), 12, 1))
    images, shown = finetune._shown(given, cut, features.on_device(pixels, torch.device("cpu")), trial)
    gradients = []
    for room in (32, 9, 1):
        model = Small(room)
        passes = Passes(model, start, trial.recipe, 32)
        for _ in range(2):  # the second time it is known what fits
            model.passes.clear()
            passes.gradient(images, shown)
        assert sum(model.passes) == 32 and max(model.passes) <= room
        gradients.append(torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        Passes(Small(0), start, trial.recipe, 32).gradient(images, shown)


def test_a_cpu_computes_no_more_of_a_step_at_once_than_it_has_room_for(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, cpu = find_model(str(place / "run")), torch.device("cpu")
    assert finetune._micro(start, QUICK, cpu) == QUICK.batch
    each = finetune._bytes_of(features.fitted(start.config, QUICK))
    monkeypatch.setattr(finetune, "ROOM", 9 * each)
    assert finetune._micro(start, QUICK, cpu) == 8
    monkeypatch.setattr(finetune, "ROOM", 0)
    assert finetune._micro(start, QUICK, cpu) == 1


# --- frozen features ------------------------------------------------------------------------------------------------


def test_every_head_of_a_grid_is_the_one_that_it_would_be_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    seen, labels = torch.randn(50, 20, generator=generator) * 4 + 2, torch.arange(50) % 5
    rates, seeds = [0.001, 0.01, 0.1], [0, 3]
    heads = train_heads(seen, labels, 5, LINEAR, rates, seeds)
    for i, seed in enumerate(seeds):
        for j, rate in enumerate(rates):
            alone = train_heads(seen, labels, 5, LINEAR, [rate], [seed]).logits(seen, 0, 0)
            torch.testing.assert_close(heads.logits(seen, i, j), alone, rtol=1e-4, atol=1e-5)


def test_every_head_is_what_torch_would_have_trained() -> None:
    generator = torch.Generator().manual_seed(0)
    seen, labels = torch.randn(50, 20, generator=generator) * 4 + 2, torch.arange(50) % 5
    ours = train_heads(seen, labels, 5, LINEAR, [0.1], [7])
    head = nn.Linear(20, 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0, momentum=LINEAR.momentum)
    x = (seen - seen.mean(0)) / (seen.std(0, correction=0) + 1e-5)
    for step in range(LINEAR.steps):
        chosen, _ = turn(50, step, LINEAR.batch, 7)
        optimizer.param_groups[0]["lr"] = LINEAR.rate_at(0.1, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x[chosen]), labels[chosen]).backward()
        optimizer.step()
    torch.testing.assert_close(ours.logits(seen, 0, 0), head(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [LINEAR, FEWSHOT], ids=["linear", "fewshot"])
@pytest.mark.parametrize("start", ["pretrained", "scratch"])
def test_every_trial_of_a_group_has_the_result_that_it_would_have_alone(
    place: Path, recipe: Recipe, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = (0.01, 0.3) if recipe is LINEAR else (1.0, 1024.0)
    seeds = (0, 1) if start == "pretrained" else (0,)
    trials = [trial_of(place, recipe=recipe, start=start, rate=rate, seed=seed) for rate in rates for seed in seeds]
    looked: list[int] = []
    seen = features.seen

    def counted(model: nn.Module, pictures: Source, *others: Any) -> torch.Tensor:
        looked.append(len(pictures.sizes[0]))
        return seen(model, pictures, *others)

    monkeypatch.setattr(features, "seen", counted)
    monkeypatch.setattr(finetune, "_shelf", features.Shelf())
    group = done(place, *trials)
    given = given_of(place, trials[0])
    chosen = {int(i) for seed in seeds for i in shots(given.training.labels[:, 0], 4, seed)}
    learnt = 85 if recipe is LINEAR else len(chosen)
    assert sorted(looked) == sorted([learnt, 30, 17])  # each picture once, for all rates and seeds
    monkeypatch.setattr(finetune, "_shelf", features.Shelf())
    assert [result for trial in trials for result in done(place, trial)] == group
    assert max(result["accuracy"] for result in group) > 0.6


def test_few_shots_are_the_closed_form_on_what_the_pretrained_model_sees(place: Path, pictures: Pictures) -> None:
    start = find_model(str(place / "run"))
    trial = trial_of(place, recipe=FEWSHOT, rate=10.0, seed=2)
    (result,) = done(place, trial)
    model = build(tiny.config(tiny.ShardSet(str(place / "sets/digits/test")), classes=CLASSES, model=start.config))
    model.load_state_dict(start.weights())
    model.eval()
    del model.head
    model.head = None  # type: ignore[assignment]  # so that it answers by its tanh layer, which few-shot learning reads
    given = given_of(place, trial)
    both = [features.seen(model, each, FEWSHOT, start, 1) for each in (given.training, given.judged[""])]
    labels = pictures.labels[:, 0]
    chosen = shots(labels, 4, seed=2)
    assert np.bincount(labels[chosen]).tolist() == [4] * CLASSES
    head = ridge(both[0][chosen], torch.from_numpy(labels[chosen]), CLASSES, 10.0)
    named = head.scores(both[1]).argmax(1).numpy()
    assert right(result) == (named == given.judged[""].labels[:, 0]).astype(int).tolist()


def test_features_of_other_looks_are_never_mixed_up_and_those_of_long_ago_are_let_go(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, trial = features.Shelf(), trial_of(place, recipe=LINEAR)
    monkeypatch.setattr(finetune, "_shelf", shelf)
    done(place, trial)
    kept = dict(shelf.kept)
    assert len(kept) == 3 and len({tensor.numpy().tobytes() for tensor in kept.values()}) == 3
    done(
        place,
        replace(trial, recipe=replace(LINEAR, judged=0.5)),
        replace(trial, recipe=replace(LINEAR, judged=0.5), seed=4),
    )
    assert len(shelf.kept) == 6 and all(shelf.kept[how] is tensor for how, tensor in kept.items())
    monkeypatch.setattr(features, "FEATURES", 1)
    done(place, replace(trial, split=DEV))
    assert len(shelf.kept) == 1


# --- what a model begins with ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_begins_with_its_own_weights_a_head_of_zeros_and_no_tanh_layer(
    place: Path, tmp_path: Path, family: str
) -> None:
    start = exported(tmp_path, FAMILIES[family], place / "sets")
    size = 32 if isinstance(start.config, Vit) and not isinstance(start.config, Hybrid) else 64
    recipe = replace(QUICK, size=size)
    model = features.model_of(start, recipe, 7, pretrained=True, seed=0)
    state, theirs = model.state_dict(), start.weights()
    assert classes_of(state) == 7 and "pre_logits.weight" not in state
    other = features.model_of(start, recipe, 5, pretrained=True, seed=0).state_dict()
    heads = [name for name in state if state[name].shape != other[name].shape]
    assert heads and all((state[name] == 0).all() for name in heads)
    same = [name for name in state if name in theirs and state[name].shape == theirs[name].shape and name not in heads]
    assert len(same) > 5 and all(torch.equal(state[name], theirs[name]) for name in same)
    model.eval()
    assert (model(torch.rand(2, 3, size, size)) == 0).all()
    frozen = features.model_of(start, replace(recipe, method="linear"), 0, pretrained=True, seed=0)
    assert ("pre_logits.weight" in frozen.state_dict()) == (family in ("vit", "hybrid"))
    frozen.eval()
    assert frozen(torch.rand(2, 3, size, size)).ndim == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_fine_tuned(place: Path, tmp_path: Path, family: str) -> None:
    start = exported(tmp_path, FAMILIES[family], place / "sets")
    trial = trial_of(place, model=start.digest, recipe=replace(QUICK, steps=2, warmup=0, batch=4, average=0.5))
    results = perform([trial], str(tmp_path), str(place / "sets"), threads=1)
    assert [result["count"] for _, result in results] == [30]


def test_every_dropout_is_the_protocol_s_or_else_the_checkpoint_s() -> None:
    own = replace(preset("deit_b16"), dropout=0.1)  # type: ignore[call-arg]
    kept = check(Recipe(steps=1), own)
    assert isinstance(kept, Vit) and (kept.dropout, kept.stochastic_depth) == (0.1, 0.1)
    named = {"augreg": (0.0, 0.0), "deit": (0.0, 0.0), "vit": (0.1, 0.1), "cmt": (0.1, 0.1)}
    for name, expected in named.items():
        made = check(protocols.named(name).recipe(TASK, 1_000, own, 144), own)
        assert isinstance(made, Vit) and (made.dropout, made.stochastic_depth) == expected
    without = preset("bit_r50x1")
    assert check(Recipe(steps=1, dropout=0.5), without) == without


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "size", "said"),
    [
        ("maxvit_t", 380, r"a maxvit cannot be fine-tuned at 380 pixels: .*224 or 448 would be the nearest"),
        ("cmt_s", 380, r"a cmt cannot be fine-tuned at 380 pixels: .*multiple of 32, such as 352 or 384"),
        ("vit_b16", 8, r"a vit cannot be fine-tuned at 8 pixels: .*at least 16 pixels"),
        ("bit_r50x1", -1, r"a bit cannot be fine-tuned at -1 pixels"),
    ],
)
def test_every_size_that_a_family_has_not_is_named_with_those_that_would_do(family: str, size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(Recipe(steps=1, size=size), preset(family))
    assert check(Recipe(steps=1, size=384), preset(family)).image_size == 384


def test_every_recipe_that_is_none_is_named() -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1, "batch": 0}, "batch is 0"),
        ({"steps": 1, "batch": 4, "mixup": 0.1, "repeats": 3}, "3 repeats would mix pictures with themselves"),
        ({"steps": 1, "batch": 7, "mixup": 0.1}, "an even number to mix pairs"),
        ({"method": "fewshot"}, "shots is 0"),
    ]
    for changes, said in mistakes:
        with pytest.raises(ValueError, match=said):
            check(Recipe(**changes), preset("vit_b16"))


def test_what_does_not_fit_is_told_before_anything_is_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any) -> Any:
        raise AssertionError("too early")

    monkeypatch.setattr(Exported, "weights", loaded)
    monkeypatch.setattr(finetune, "pictures_of", loaded)
    trial = trial_of(place)
    mistakes: list[tuple[Trial, str]] = [
        (replace(trial, recipe=replace(QUICK, size=2)), "cannot be fine-tuned at 2 pixels"),
        (replace(trial, model="q" * 64), "the checkpoint at .* has changed: it is .*, not qqq"),
        (replace(trial, data=(*trial.data[:-1], ("digits/test", "0" * 64))), "the shard sets of digits have changed"),
    ]
    for each, said in mistakes:
        with pytest.raises(ValueError, match=said):
            done(place, each)


def test_every_class_count_that_does_not_fit_is_named(place: Path, tmp_path: Path) -> None:
    sets = copied(place, tmp_path / "place")
    for split, count in (("val200", 4), ("other", 2)):
        with_classes(sets / "sets" / "digits" / split, count)
        with pytest.raises(ValueError, match=f"not as many classes as each other: .*digits/{split} {count}"):
            done(sets, trial_of(sets))
        with_classes(sets / "sets" / "digits" / split, CLASSES)
    for count, said in (
        (2, "digits has 2 classes, and a picture with the label 2"),
        (1, "digits has 1 classes; nothing can be told apart"),
    ):
        for split in SIZES:
            with_classes(sets / "sets" / "digits" / split, count)
        with pytest.raises(ValueError, match=said):
            done(sets, trial_of(sets))


def with_classes(folder: Path, count: int) -> None:
    """Say that a set has so many classes, whatever its labels are."""
    manifest = tiny.ShardSet(str(folder)).manifest
    names = tuple(f"class {i}" for i in range(count))
    (folder / "manifest.json").write_bytes(replace(manifest, classes=names).to_json())


def test_every_checkpoint_that_is_not_complete_is_named(place: Path, tmp_path: Path) -> None:
    trial = trial_of(place)

    def cut_short(folder: Path) -> None:
        path = folder / "model.json"
        path.write_text(path.read_text()[:100])

    def lacking(folder: Path) -> None:
        about = json.loads((folder / "model.json").read_text())
        del about["digest"], about["classes"]
        (folder / "model.json").write_text(json.dumps(about))

    def spoilt(folder: Path) -> None:
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")

    damages: list[tuple[Callable[[Path], Any], str]] = [
        (cut_short, "is not complete: its model.json is damaged"),
        (lacking, "is not complete: its model.json lacks classes, digest"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is not complete: it has no model.safetensors"),
        (lambda folder: (folder / "model.json").unlink(), "the run is not there or has not finished"),
        (spoilt, "model.safetensors is damaged: its digest is not the recorded one"),
    ]
    for i, (damage, said) in enumerate(damages):
        damage(copied(place / "run", tmp_path / str(i)) / "export")
        features._weights.cache_clear()
        with pytest.raises(ValueError, match=said):
            list(perform([trial], str(tmp_path / str(i)), str(place / "sets"), threads=1))


def copied(source: Path, target: Path) -> Path:
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target
