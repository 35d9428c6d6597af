"""Protocols say what their papers say, and a task's own rules stand above every protocol."""

import json
import pickle
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.architectures import Architecture, preset
from pipeline.transfer import protocols, tasks
from pipeline.transfer.protocols import LARGE, SMALL, Protocol, Recipe
from pipeline.transfer.tasks import Part, Task

pytestmark = pytest.mark.timeout(300)

BIG = 224.0**2


def task(name: str = "photographs", *, flip: bool = True, crop: bool = True, group: tasks.Group = "") -> Task:
    parts = ((Part("train"),), (Part("val"),), (Part("test"),))
    return Task(name, name, *parts, flip=flip, crop=crop, group=group)


IMAGENET, VTAB = task("imagenet"), task("vtab_caltech101", group="natural")


def recipe(
    protocol: Protocol, of: Task, samples: int, *, model: str = "vit_b16", area: float = BIG, **changes: object
) -> Recipe:
    architecture: Architecture = preset(model)
    return replace(protocol.recipe(of, samples, architecture, area), **changes)


# --- what the papers say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "samples", "steps", "warmup", "rates"),
    [
        (IMAGENET, 1_281_167, 20_000, 500, (0.003, 0.01, 0.03, 0.06)),
        (task("cifar100"), 50_000, 10_000, 500, (0.001, 0.003, 0.01, 0.03)),
        (task("cifar10"), 50_000, 10_000, 500, (0.001, 0.003, 0.01, 0.03)),
        (task("pets"), 3_680, 500, 100, (0.001, 0.003, 0.01, 0.03)),
        (task("flowers"), 1_020, 500, 100, (0.001, 0.003, 0.01, 0.03)),
        (VTAB, 1_000, 2_500, 500, (0.01,)),
    ],
)
def test_vit_is_table_4_for_every_task(
    of: Task, samples: int, steps: int, warmup: int, rates: tuple[float, ...]
) -> None:
    made = recipe(protocols.vit, of, samples)
    assert (made.steps, made.warmup, protocols.vit.rates(of)) == (steps, warmup, rates)
    assert (made.batch, made.optimizer, made.momentum, made.weight_decay, made.clip) == (512, "sgd", 0.9, 0.0, 1.0)
    assert (made.decay, made.end, made.size, made.average, made.smoothing, made.mixup) == ("cosine", 0, 384, 0, 0, 0)
    assert (made.training, made.evaluation, made.judged) == ("crop" if of.group else "inception", "square", 1.0)
    assert made.dropout is None  # the checkpoint's own, as the paper's table 3 has it by model


def test_every_task_of_vtab_has_one_recipe_whichever_of_the_two_names_is_given() -> None:
    for of in [VTAB, *(each for each in tasks.ALL if each.group)]:
        assert recipe(protocols.vit, of, 1_000) == recipe(protocols.vit_vtab, of, 1_000)
        assert protocols.vit.rates(of) == protocols.vit_vtab.rates(of) == (0.01,)


@pytest.mark.parametrize("protocol", [protocols.vit, protocols.vit_vtab, protocols.bit_hyperrule, protocols.deit])
def test_every_task_of_vtab_is_turned_and_cut_only_as_its_classes_allow(protocol: Protocol) -> None:
    made = {of.name: recipe(protocol, of, 1_000) for of in tasks.ALL if of.group}
    assert len(made) == 19
    unturned = {"vtab_dsprites_location", "vtab_dsprites_orientation", "vtab_smallnorb_azimuth"}
    uncut = {"vtab_clevr_count", "vtab_clevr_distance", "vtab_dmlab", "vtab_kitti", "vtab_dsprites_location"}
    assert {name for name, of in made.items() if not of.flip} == unturned
    assert {name for name, of in made.items() if not of.crop} == uncut
    assert {name for name, of in made.items() if not of.layers} >= (unturned | uncut)


def test_vit_512_is_table_2_and_every_other_task_is_as_in_table_4() -> None:
    for model, size in (("vit_l16", 512), ("vit_h14", 518)):
        made = recipe(protocols.vit_512, IMAGENET, 1_281_167, model=model)
        assert (made.size, made.average) == (size, 0.9999)
        assert replace(made, size=384, average=0.0) == recipe(protocols.vit, IMAGENET, 1_281_167, model=model)
    assert recipe(protocols.vit_512, VTAB, 1_000) == recipe(protocols.vit, VTAB, 1_000)


@pytest.mark.parametrize(
    ("samples", "steps", "warmup", "boundaries", "mixup"),
    [
        (1_000, 500, 100, (200, 300, 400), 0.0),
        (SMALL - 1, 500, 100, (200, 300, 400), 0.0),
        (SMALL, 10_000, 500, (3_000, 6_000, 9_000), 0.1),
        (LARGE - 1, 10_000, 500, (3_000, 6_000, 9_000), 0.1),
        (LARGE, 20_000, 500, (6_000, 12_000, 18_000), 0.1),
    ],
)
def test_the_hyperrule_holds_for_every_number_of_pictures(
    samples: int, steps: int, warmup: int, boundaries: tuple[int, ...], mixup: float
) -> None:
    made = recipe(protocols.bit_hyperrule, task(), samples, model="bit_r50x1")
    assert (made.steps, made.warmup, made.boundaries, made.mixup) == (steps, warmup, boundaries, mixup)
    assert (made.clip, made.weight_decay, made.batch) == (0.0, 0.0, 512)
    assert (made.training, made.evaluation, protocols.bit_hyperrule.rates(task())) == ("crop", "square", (0.003,))


@pytest.mark.parametrize(
    ("side", "model", "crop", "resized"),
    [
        (95, "bit_r50x1", 128, 160),
        (96, "bit_r50x1", 384, 448),
        (32, "bit_r152x4", 128, 160),
        (224, "bit_r152x4", 480, 512),
        (224, "vit_b16", 384, 448),
    ],
)
def test_the_hyperrule_holds_for_every_size_of_pictures(side: int, model: str, crop: int, resized: int) -> None:
    made = recipe(protocols.bit_hyperrule, task(), 1_000, model=model, area=side**2)
    assert (made.size, made.share) == (crop, crop / resized)


def test_a_rate_falls_to_a_tenth_after_every_boundary() -> None:
    made = recipe(protocols.bit_hyperrule, task(), 1_000)
    steps = (0, 50, 100, 200, 201, 300, 301, 400, 401, 499)
    assert [made.rate_at(0.003, step) for step in steps] == pytest.approx(
        [0, 0.0015, 0.003, 0.003, 3e-4, 3e-4, 3e-5, 3e-5, 3e-6, 3e-6]
    )


def test_deit_and_cmt_count_in_epochs() -> None:
    made = recipe(protocols.deit, IMAGENET, 1_281_167, model="deit_b16")
    assert (made.optimizer, made.batch, made.size, made.weight_decay) == ("adamw", 512, 384, 1e-8)
    assert (made.steps, made.warmup) == (30 * 1_281_167 // 512, 5 * 1_281_167 // 512)
    assert made.rate_at(5e-6, made.warmup) == made.rate_at(5e-6, made.steps - 1) == 5e-6
    assert (made.mixup, made.cutmix, made.erase, made.smoothing, made.layers) == (0.8, 1.0, 0.25, 0.1, 2)
    made = recipe(protocols.deit, task("cifar10"), 50_000, model="deit_b16")
    assert (made.optimizer, made.batch, made.size, made.weight_decay) == ("sgd", 768, 224, 1e-4)
    assert (made.steps, made.erase, made.stochastic_depth) == (1_000 * 50_000 // 768, 0.0, 0.0)
    assert (protocols.deit.rates(IMAGENET), protocols.deit.rates(task("cifar10"))) == ((5e-6,), (0.01,))
    theirs = recipe(protocols.cmt, IMAGENET, 1_281_167, model="cmt_s")
    assert theirs == recipe(protocols.deit, IMAGENET, 1_281_167, dropout=None, stochastic_depth=None)


def test_augreg_has_both_schedules_of_every_row_of_its_table_4() -> None:
    rows = {
        (task("pets"), 3_680): [(2_500, 200), (500, 100)],
        (task("cifar100"), 50_000): [(10_000, 500), (2_500, 200)],
        (VTAB, 1_000): [(2_500, 200), (500, 100)],
        (IMAGENET, 1_281_167): [(20_000, 500), (20_000, 500)],
    }
    for (of, samples), schedules in rows.items():
        made = [recipe(each, of, samples) for each in (protocols.augreg, protocols.augreg_short)]
        assert [(each.steps, each.warmup) for each in made] == schedules
        assert [each.dropout for each in made] == [0.0, 0.0]
    assert protocols.augreg.rates(IMAGENET) == (0.01, 0.03)
    assert protocols.augreg.rates(task("pets")) == (0.001, 0.003, 0.01)
    assert protocols.augreg.rates(VTAB) == (0.001, 0.003, 0.01, 0.03)


def test_big_vision_resizes_the_shorter_side() -> None:
    made = recipe(protocols.big_vision, task("cifar10"), 50_000)
    assert (made.training, made.share, made.evaluation, made.judged) == ("resmall", 6 / 7, "central", 6 / 7)


def test_few_shots_are_looked_at_as_published() -> None:
    counts = {each.name: recipe(each, task(), 1_000).shots for each in protocols.ALL if "fewshot" in each.name}
    assert counts == {"fewshot": 5, "fewshot-1": 1, "fewshot-10": 10, "fewshot-25": 25, "fewshot-ranked": 5}
    made = recipe(protocols.fewshot, task(), 1_000)
    assert (made.method, made.evaluation, made.judged, made.size) == ("fewshot", "square", 224 / 256, 0)
    assert protocols.fewshot.rates(task()) == (2.0**10,)
    ranked = protocols.fewshot_ranked
    assert (ranked.chosen_by, ranked.rates(task())[0], ranked.rates(task())[-1]) == ("others", 2.0**-10, 2.0**19)


# --- what holds for all of them -------------------------------------------------------------------------------------

every = pytest.mark.parametrize("protocol", protocols.ALL, ids=lambda protocol: protocol.name)


@every
@pytest.mark.parametrize("samples", [1_000, 50_000, 1_281_167])
@pytest.mark.parametrize("side", [28, 500])
def test_every_recipe_keeps_to_what_its_task_allows(protocol: Protocol, samples: int, side: int) -> None:
    free = [task(flip=flip, crop=crop, group=group) for flip in (True, False) for crop in (True, False)
            for group in ("", "structured")]  # fmt: skip
    for of in (*tasks.ALL, *free):
        made = recipe(protocol, of, samples, area=side**2)
        assert made.flip <= of.flip and made.crop <= of.crop
        if not of.crop:
            assert (made.cutmix, made.erase, made.evaluation, made.judged) == (0, 0, "square", 1.0)
        if not (of.crop and of.flip):
            assert made.layers == 0
        assert made.batch % 2 == 0 and made.warmup <= made.steps
        assert protocol.rates(of) == tuple(sorted(set(protocol.rates(of)))) != ()


@every
def test_every_protocol_says_where_it_is_from_and_travels(protocol: Protocol) -> None:
    assert protocols.named(protocol.name) is protocol
    assert protocol.title == f"{protocol.name}-{protocol.version}" and protocol.source
    there = pickle.loads(pickle.dumps(protocol))
    made = recipe(protocol, IMAGENET, 1_281_167)
    assert recipe(there, IMAGENET, 1_281_167) == made and hash(made) == hash(replace(made))
    back = json.loads(json.dumps(asdict(made)))
    assert Recipe(**{**back, "boundaries": tuple(back["boundaries"])}) == made


def test_every_name_is_one_protocol_s() -> None:
    assert len({each.name for each in protocols.ALL}) == len(protocols.ALL)
    with pytest.raises(ValueError, match="no protocol 'vitt'; there are: demo, vit, vit-512, vit-vtab"):
        protocols.named("vitt")


recipes = st.builds(
    Recipe,
    steps=st.integers(1, 3_000),
    warmup=st.integers(0, 500),
    decay=st.sampled_from(["cosine", "steps"]),
    boundaries=st.lists(st.integers(0, 3_000), max_size=3).map(lambda found: tuple(sorted(found))),
    end=st.floats(0, 1),
)


@settings(deadline=None)
@given(recipes, st.floats(1e-6, 10), st.data())
def test_every_rate_is_in_proportion_to_the_highest_whatever_the_schedule(
    made: Recipe, rate: float, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, made.steps - 1))
    assert 0 <= made.rate_at(rate, step) <= rate * (1 + 1e-12)
    assert made.rate_at(rate, step) == pytest.approx(rate * made.rate_at(1.0, step), rel=1e-9)
