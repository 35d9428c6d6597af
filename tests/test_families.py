"""Every family of models goes the whole way: built, counted, trained through a kill, exported, fine-tuned."""

import json
import re
from dataclasses import replace
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import cast

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from pipeline import experiments
from pipeline.architectures import Architecture, Bit, Cmt, Efficientnet, Hybrid, Maxvit, Vit, presets
from pipeline.config import Augment, Config, Distillation, Suppression, differences, from_dict, to_dict
from pipeline.models import flops
from pipeline.models.build import build, initialise
from pipeline.models.kept import kept_bytes
from pipeline.models.memory import activation_numbers, memory
from pipeline.models.vit import VisionTransformer
from pipeline.models.weights.exported import find, put
from pipeline.objectives.patches import DIVERSE_VIT, RELEASED, THIRD_VERSION
from pipeline.track import log
from pipeline.train.objective import Watched, teacher_of, with_heads
from pipeline.transfer.features import model_of
from pipeline.transfer.protocols import Recipe
from shards.storage import Folder
from tests import test_train, tiny

pytestmark = pytest.mark.timeout(300)

# Small, for pictures of 32 pixels.
SMALL: dict[str, Architecture] = {
    "vit": Vit(width=16, depth=2, heads=2, hidden=32, patch=8, image_size=32, stochastic_depth=0.2, registers=1),
    "hybrid": Hybrid(width=16, depth=1, heads=2, hidden=32, patch=1, image_size=32, trunk=(1, 1)),
    "bit": Bit((1, 1, 1, 1), image_size=32),
    "cmt": Cmt((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2), (8, 4, 2, 1), stem=8, features=32, image_size=32),
    "maxvit": Maxvit(stem=8, widths=(32, 32), depths=(1, 1), window=2, image_size=32),
    "efficientnet": Efficientnet(width=0.25, depth=0.3, image_size=32),
}
STATEFUL = ("cmt", "maxvit", "efficientnet")  # those with batch norms


@pytest.mark.slow
@pytest.mark.parametrize("name", presets())
def test_every_preset_builds_and_has_the_parameters_that_are_counted(name: str) -> None:
    config = presets()[name]
    config.check()
    with torch.device("meta"):
        model = build(config, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == flops.parameters(config, 1000)


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_itself_when_it_has_been_written_down(name: str) -> None:
    config = Config(name="x", classes=10, model=presets()[name])
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments.known())
def test_the_model_of_every_experiment_builds_and_fits_a_gpu_of_80_gigabytes(name: str) -> None:
    config = experiments.load(name)
    with torch.device("meta"):
        model = build(config.model, config.classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == flops.parameters(config.model, config.classes)
    assert memory(config, 8).total < 80e9


@pytest.mark.parametrize("name", experiments.known())
def test_every_experiment_has_the_parameters_and_the_cost_that_it_states(name: str) -> None:
    config, said = experiments.load(name), import_module(f"pipeline.experiments.{name}").__doc__ or ""
    stated = re.findall(r"Size: ([\d,]+) parameters", said)
    assert [int(number.replace(",", "")) for number in stated] == [flops.parameters(config.model, config.classes)]
    if name != "demo":  # which costs nothing worth saying
        (cost,) = re.findall(r"Cost: about ([\d,.]+) exaFLOPs", said)
        pictures = config.steps(config.data.samples) * config.batch
        exaflops = flops.training_exaflops(config.model, config.classes, pictures)
        assert float(cost.replace(",", "")) == pytest.approx(exaflops, rel=0.01)


def test_a_family_that_there_is_not_is_named() -> None:
    values = to_dict(Config(name="x", classes=10))
    values["model"]["family"] = "resnet"
    with pytest.raises(ValueError, match="no family of models 'resnet'; there are: vit, hybrid, bit, cmt, maxvit"):
        from_dict(values)


def test_runs_of_two_families_differ_in_their_model() -> None:
    ours, theirs = (Config(name="x", classes=10, model=SMALL[name]) for name in ("bit", "cmt"))
    assert [line.split(":")[0] for line in differences(ours, theirs)] == ["model"]


@pytest.mark.parametrize("name", SMALL)
def test_every_first_weight_follows_from_the_generator(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        model = build(SMALL[name], 3)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 7.0)  # so that one that is left out is seen
        initialise(model, torch.Generator().manual_seed(seed), head_bias=-10.0)
        states.append(dict(model.named_parameters()))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
    assert not any((value == 7.0).any() for value in states[0].values())
    assert any((value == -10.0).all() for value in states[0].values()), "the head's bias"


@pytest.mark.parametrize("name", ["vit_b16", "vit_h14", "vit_s32", "deit_s16"])
def test_what_is_estimated_to_be_kept_is_about_what_torch_keeps(name: str) -> None:
    config = Config(name="x", classes=10, model=presets()[name])
    assert 4 * activation_numbers(config) == pytest.approx(kept_bytes(config.model), rel=0.25)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    tiny.shard_set(folder / "set", side=32)
    return folder


def trained(place: Path, name: str, run: str, *, processes: int = 2, kill_at: int | None = None) -> Path:
    config = tiny.config(tiny.ShardSet(str(place / "set")))
    folder = test_train.start(
        place, run, processes=processes, kill_at=kill_at, dropout=None, model=SMALL[name], data=replace(config.data)
    )[1]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if name != "vit"])  # which `test_train` is about
def test_a_killed_run_of_every_family_ends_as_if_nothing_had_happened(place: Path, name: str) -> None:
    quiet = trained(place, name, f"{name}-quiet")
    trained(place, name, f"{name}-killed", kill_at=10)
    killed = trained(place, name, f"{name}-killed")
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (killed, quiet))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert build(SMALL[name], 3).state_dict().keys() == ours.keys()
    moved = {key for key in ours if key.endswith("running_mean") and ours[key].abs().max() > 0}
    assert bool(moved) == (name in STATEFUL)
    for start in ("pretrained", "scratch"):
        model = fine_tuned(quiet, start)
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
        weights = model.state_dict()
        same = [key for key in ours if ours[key].shape == weights[key].shape and torch.equal(ours[key], weights[key])]
        assert len(same) > 0.9 * len(ours) if start == "pretrained" else len(same) < 0.9 * len(ours)


def fine_tuned(run: Path, start: str) -> torch.nn.Module:
    """The model at the beginning of a fine-tuning to seven classes."""
    return model_of(find(str(run)), Recipe(steps=1), 7, pretrained=start == "pretrained", seed=0).eval()


@pytest.mark.slow
def test_a_run_learns_from_a_teacher_of_any_family_through_a_kill(place: Path) -> None:
    teacher = trained(place, "efficientnet", "teacher")
    taught = Distillation(teacher=str(teacher), kind="hard", alpha=0.5)

    def student(run: str, model: Architecture, learnt: Distillation, kill_at: int | None = None) -> Path:
        config = tiny.config(tiny.ShardSet(str(place / "set")))
        changes = {"model": model, "data": config.data, "distillation": learnt}
        return test_train.start(place, run, processes=2, kill_at=kill_at, dropout=None, **changes)[1]

    distilled = replace(cast(Vit, SMALL["vit"]), distillation=True)
    quiet = student("student", distilled, taught)
    student("student-killed", distilled, taught, kill_at=10)
    killed = student("student-killed", distilled, taught)
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (quiet, killed))
    assert "head_dist.weight" in ours and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert fine_tuned(quiet, "pretrained")(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    # A teacher whose share is nothing is none.
    alone = load_file(student("alone", SMALL["vit"], Distillation()) / "export" / "model.safetensors")
    unheard = student("unheard", SMALL["vit"], Distillation(teacher=str(teacher), alpha=0.0))
    heard = student("heard", SMALL["vit"], taught)
    same, other = (load_file(folder / "export" / "model.safetensors") for folder in (unheard, heard))
    assert all(torch.equal(alone[key], same[key]) for key in alone)
    assert any(not torch.equal(alone[key], other[key]) for key in alone)


def test_a_teacher_of_other_classes_or_none_is_refused(tmp_path: Path) -> None:
    config = SMALL["bit"]
    model = build(config, 5)
    initialise(model, torch.Generator().manual_seed(0))
    put(Folder(str(tmp_path)), model.state_dict(), config, 5, mean=[0.5] * 3, std=[0.5] * 3, source={})
    run = Config("x", 3, distillation=Distillation(teacher=str(tmp_path)))
    with pytest.raises(ValueError, match=r"the teacher at .* knows 5 classes, the run 3"):
        teacher_of(run)
    with pytest.raises(ValueError, match=r"holds no export/model\.json"):
        teacher_of(replace(run, distillation=Distillation(teacher=str(tmp_path / "none"))))
    with pytest.raises(ValueError, match=r"a distillation token needs distillation\.teacher"):
        Config("x", 3, model=replace(Vit(), distillation=True)).check(1)


def test_pictures_are_scaled_as_a_model_from_elsewhere_learnt_to_see_them(tmp_path: Path) -> None:
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    put(Folder(str(tmp_path)), {}, SMALL["bit"], 0, mean=mean, std=deviation, source={})
    white = torch.ones(1, 3, 2, 2)  # 255
    wanted = [(1 - m) / d for m, d in zip(mean, deviation, strict=True)]
    assert find(str(tmp_path)).scaled(white)[0, :, 0, 0].tolist() == pytest.approx(wanted)


@pytest.mark.slow
def test_a_run_against_over_smoothing_ends_through_a_kill_as_if_nothing_had_happened(place: Path) -> None:
    config = tiny.config(tiny.ShardSet(str(place / "set")))
    changes = {"model": SMALL["vit"], "data": config.data, "augment": Augment(cutmix=1.0)}

    def weights(run: str, suppression: Suppression, kill_at: int | None = None) -> dict[str, torch.Tensor]:
        asked = {**changes, "suppression": suppression}
        folder = test_train.start(place, run, processes=2, kill_at=kill_at, dropout=None, **asked)[1]
        return {} if kill_at else load_file(folder / "export" / "model.safetensors")

    quiet = weights("suppressed", THIRD_VERSION)
    weights("suppressed-killed", THIRD_VERSION, kill_at=10)
    killed = weights("suppressed-killed", THIRD_VERSION)
    assert quiet.keys() == build(SMALL["vit"], 3).state_dict().keys(), "the patches' head is for training alone"
    assert all(torch.equal(quiet[key], killed[key]) for key in quiet)
    others = [weights(f"suppressed-{i}", choices) for i, choices in enumerate((RELEASED, DIVERSE_VIT, OFF))]
    for ours, theirs in combinations([quiet, *others], 2):
        assert any(not torch.equal(ours[key], theirs[key]) for key in ours)


OFF = Suppression(cosine=0.0, contrastive=0.0, mixing=0.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": SMALL["bit"], "suppression": Suppression(mixing=0.0)}, "there for transformers, not"),
        ({"model": SMALL["cmt"], "suppression": Suppression(mixing=0.0)}, r"suppression\.contrastive has to be 0"),
        (
            {"model": SMALL["maxvit"], "suppression": Suppression(contrastive=0.0, head="shared")},
            "and suppression.head",
        ),
        ({"suppression": Suppression()}, "it needs augment.cutmix"),
    ],
)
def test_losses_against_over_smoothing_are_refused_where_they_mean_nothing(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config("x", 3, **changes).check(1)


def test_what_is_watched_is_what_the_model_made(tmp_path: Path) -> None:
    model = cast(VisionTransformer, build(SMALL["vit"], 3)).train()
    initialise(model, torch.Generator().manual_seed(0))
    images = torch.rand(2, 3, 32, 32)
    for first in ("block", "embedding"):
        watched = Watched(Suppression(first=first), with_heads(Config("x", 3, suppression=Suppression()), model))  # type: ignore[arg-type]
        torch.manual_seed(5)
        model(images)
        seen = watched.tokens(images)
        torch.manual_seed(5)
        embedded, grid = model.embed(images)
        wanted = model.blocks[0](embedded)[:, SMALL["vit"].prefix :] if first == "block" else model.patch_embed(images)  # type: ignore[union-attr]
        assert torch.equal(seen.first, wanted) and seen.grid == grid == (4, 4)
        torch.manual_seed(5)
        assert torch.equal(seen.last, model.forward_features(images).patches)
        model._forward_hooks.clear()


@pytest.mark.slow
def test_a_run_that_predicts_hidden_patches_ends_through_a_kill_as_if_nothing_had_happened(place: Path) -> None:
    config = tiny.config(tiny.ShardSet(str(place / "set")))
    changes = {"model": SMALL["vit"], "data": config.data, "augment": Augment(), "objective": "masked"}
    quiet, killed = (
        test_train.start(place, run, processes=2, kill_at=kill_at, dropout=None, **changes)[1]
        for run, kill_at in (("hidden", None), ("hidden-killed", 10))
    )
    test_train.start(place, "hidden-killed", processes=2, dropout=None, **changes)
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (quiet, killed))
    assert ours.keys() == theirs.keys() == build(SMALL["vit"], 0).state_dict().keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    losses = test_train.losses(place, log_of(place, "hidden"))
    assert losses[-1] < losses[0], "colours of noise are about one in a few"
    assert fine_tuned(quiet, "pretrained")(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def log_of(place: Path, run: str) -> str:
    """The id of the MLflow run of the folder of that name."""
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    experiment = client.get_experiment_by_name(log.EXPERIMENT)
    assert experiment
    found = client.search_runs([experiment.experiment_id], f"tags.`vitscale.folder` = '{place / run}'")
    return found[0].info.run_id


@pytest.mark.parametrize(
    "changes",
    [
        {"model": SMALL["hybrid"]},
        {"model": replace(Vit(), representation=True)},
        {"augment": Augment(mixup=0.2)},
        {"distillation": Distillation(teacher="x")},
    ],
)
def test_hidden_patches_are_not_predicted_where_nothing_could_tell_them(changes: dict) -> None:
    with pytest.raises(ValueError, match="objective masked"):
        Config("x", 3, objective="masked", **changes).check(1)


@pytest.mark.parametrize("name", ["cmt", "maxvit"])
def test_what_is_watched_of_a_pyramid_is_its_last_stage(name: str) -> None:
    model = build(SMALL[name], 3).train()
    choices = Suppression(contrastive=0.0)
    watched = Watched(choices, with_heads(Config("x", 3, model=SMALL[name], suppression=choices), model))
    images = torch.rand(4, 3, 32, 32)
    torch.manual_seed(5)
    model(images)
    seen = watched.tokens(images)
    torch.manual_seed(5)
    features = model.forward_features(images)  # type: ignore[operator]
    assert torch.equal(seen.last, features.tokens) and seen.grid == features.grid
    assert watched.stride * seen.grid[0] == 32


@pytest.mark.slow
def test_a_pyramid_is_trained_against_over_smoothing(place: Path) -> None:
    config = tiny.config(tiny.ShardSet(str(place / "set")))
    changes = {"model": SMALL["maxvit"], "data": config.data, "augment": Augment(cutmix=1.0)}
    asked, plain = (
        load_file(folder / "export" / "model.safetensors")
        for run, one in (("pyramid", Suppression(contrastive=0.0)), ("pyramid-plain", OFF))
        for folder in [test_train.start(place, run, processes=1, dropout=None, suppression=one, **changes)[1]]
    )
    assert asked.keys() == plain.keys() == build(SMALL["maxvit"], 3).state_dict().keys()
    assert any(not torch.equal(asked[key], plain[key]) for key in asked)
