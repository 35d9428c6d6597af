"""The probe of a milestone: the same whatever the cluster, cheap whatever the run, and nothing that training notices.

Real DeepSpeed on gloo, in processes that stay from test to test.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from pipeline import experiments
from pipeline.architectures import Architecture, Bit, Cmt, Efficientnet, Hybrid, Maxvit, Vit
from pipeline.config import Config, from_dict
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Feed
from pipeline.data.mix import normalised
from pipeline.models import flops
from pipeline.models.build import build, initialise
from pipeline.models.features import before_head
from pipeline.models.weights.exported import find
from pipeline.objectives import fewshot
from pipeline.track import log
from pipeline.train import probe, run
from pipeline.train.folder import CONFIG, Job, open_folder, refuse_another, refuse_misfits, roots_of
from pipeline.train.probe import CLASSES, PICTURES, SHARE, SHOTS, Size, choose, size_of
from pipeline.world import World
from shards.manifest import ShardSet
from shards.storage import Folder
from tests import tiny
from tests.gang import Gang

pytestmark = pytest.mark.timeout(300)

SMALL: dict[str, Architecture] = {
    "vit": Vit(width=16, depth=2, heads=2, hidden=32, patch=8, image_size=32, registers=1),
    "tanh": Vit(width=16, depth=1, heads=2, hidden=32, patch=8, image_size=32, representation=True),
    "hybrid": Hybrid(width=16, depth=1, heads=2, hidden=32, patch=1, image_size=32, trunk=(1, 1)),
    "bit": Bit((1, 1, 1, 1), image_size=32),
    "cmt": Cmt((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2), (8, 4, 2, 1), stem=8, features=32, image_size=32),
    "maxvit": Maxvit(stem=8, widths=(32, 32), depths=(1, 1), window=2, image_size=32),
    "efficientnet": Efficientnet(width=0.25, depth=0.3, image_size=32),
}
INTERVALS = (1, 10, 100, 1_000, 10_000, 100_000)

# --- what it costs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", INTERVALS)
@pytest.mark.parametrize("name", experiments.known())
def test_the_probe_of_every_experiment_costs_less_than_a_hundredth_of_its_interval_whatever_that_is(
    name: str, every: int
) -> None:
    config = replace(experiments.load(name), milestone_every=every)
    interval = flops.training_exaflops(config.model, config.classes, every * config.batch) * 1e18
    size = size_of(config)
    if size is not None:
        passes = 2 * flops.macs(config.model, config.classes) * (SHOTS * size.classes + size.pictures)
        assert passes < size.flops(config) <= SHARE * interval
    if every >= 10_000:
        assert size == Size(min(CLASSES, config.classes), PICTURES), "of a usual interval, the whole probe"


@pytest.mark.parametrize("name", experiments.known())
def test_the_features_of_every_experiment_fit_into_a_process_beside_all_else(name: str) -> None:
    config = experiments.load(name)
    width = flops.macs(config.model, 1) - flops.macs(config.model, 0)
    small = min(SHOTS * CLASSES, width + 1)
    numbers = (SHOTS * CLASSES + PICTURES) * (width + 1) + 3 * small * small
    assert 3 * 8 * numbers < 2**30


def test_the_least_squares_cost_no_more_than_what_is_reckoned() -> None:
    config = replace(experiments.load("demo"), milestone_every=10_000)
    for classes, pictures in ((10, 4000), (4, 100)):
        size, width = Size(classes, pictures), flops.macs(config.model, 1) - flops.macs(config.model, 0)
        given = torch.randn(SHOTS * classes, width), torch.arange(classes).repeat_interleave(SHOTS)
        with FlopCounterMode(display=False) as counted:
            fewshot.probe(*given, torch.randn(pictures, width), torch.zeros(pictures, dtype=torch.int64), classes)
        passes = 2 * flops.macs(config.model, config.classes) * (SHOTS * classes + pictures)
        assert counted.get_total_flops() <= size.flops(config) - passes


# --- what it looks at -----------------------------------------------------------------------------------------------


class Labels:
    """The labels of a corpus, shard by shard, and nothing else of it."""

    def __init__(self, *shards: list[list[int]]) -> None:
        self.shards, self.read = shards, 0
        self.counts = np.array([len(shard) for shard in shards])
        self.first = np.concatenate([[0], np.cumsum(self.counts)[:-1]])

    def rows(self, shard: int, columns: list[str]) -> pa.Table:
        assert columns == ["labels"]
        self.read += 1
        return pa.table({"labels": pa.array(self.shards[shard], pa.list_(pa.int32()))})

    def of(self, number: int) -> list[int]:
        return [labels for shard in self.shards for labels in shard][number]


def chosen(training: Labels, validation: Labels, size: Size, seed: int = 0) -> probe.Chosen | None:
    return choose(cast(Corpus, training), cast(Corpus, validation), size, seed)


def many(count: int, classes: int, seed: int, shards: int = 40) -> Labels:
    """Labels as uneven as those of ImageNet-21k; a tenth of the pictures have two."""
    draw = np.random.default_rng(seed)
    drawn = (classes * draw.random((shards, count // shards)) ** 2).astype(int)
    return Labels(
        *([[n, (n + 1) % classes] if i % 10 == 0 else [n] for i, n in enumerate(row)] for row in drawn.tolist())
    )


@pytest.mark.slow
def test_every_class_has_its_shots_and_every_picture_one_class_whatever_the_number_of_classes() -> None:
    training, validation = many(200_000, 21_843, seed=0), many(20_000, 21_843, seed=1)
    found = chosen(training, validation, Size(CLASSES, PICTURES))
    assert found is not None and found.classes == CLASSES
    assert found.shot_labels.tolist() == np.repeat(np.arange(CLASSES), SHOTS).tolist()
    by_class = {int(label): training.of(int(n)) for n, label in zip(found.shots, found.shot_labels, strict=True)}
    assert len({one for (one,) in by_class.values()}) == CLASSES
    for number, label in zip(found.shots.tolist(), found.shot_labels.tolist(), strict=True):
        assert training.of(number) == by_class[label]
    for number, label in zip(found.judged.tolist(), found.judged_labels.tolist(), strict=True):
        assert validation.of(number) == by_class[label]
    for numbers in (found.shots, found.judged):
        assert len(set(numbers.tolist())) == len(numbers)
    assert set(found.judged_labels.tolist()) == set(range(CLASSES))


def test_what_is_looked_at_depends_on_the_seed_alone() -> None:
    training, validation = many(20_000, 500, seed=0), many(20_000, 500, seed=1)
    ours, again, other = (chosen(training, validation, Size(20, 400), seed) for seed in (0, 0, 1))
    assert ours and again and other
    assert all(np.array_equal(a, b) for a, b in zip(ours, again, strict=True))
    assert not np.array_equal(ours.shots, other.shots) and len(ours.judged) == 400


def test_of_a_corpus_however_large_few_shards_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SCANNED", 5_000)
    training, validation = many(100_000, 20, seed=0), many(2_000, 20, seed=1)
    assert chosen(training, validation, Size(20, 400)) is not None
    assert (training.read, validation.read) == (2, 40)


def test_classes_without_enough_pictures_are_left_out_and_fewer_than_two_are_no_probe() -> None:
    enough = [[0]] * SHOTS + [[1]] * SHOTS + [[2]] * (SHOTS - 1) + [[3, 4]] * 50 + [[5]] * SHOTS
    found = chosen(Labels(enough), Labels([[0], [1], [2], [3, 4]]), Size(6, 100))
    assert found is not None and found.classes == 2
    assert chosen(Labels(enough), Labels([[1], [2]]), Size(6, 100)) is None


@pytest.mark.parametrize("family", SMALL)
def test_what_every_family_reads_its_classes_off_is_what_it_gives_without_a_head(family: str) -> None:
    config, images = SMALL[family], torch.randn(2, 3, 32, 32)
    headed, headless = build(config, 5), build(config, 0)
    initialise(headed, torch.Generator().manual_seed(0))
    headless.load_state_dict({k: v for k, v in headed.state_dict().items() if k in headless.state_dict()})
    with torch.no_grad():
        features = [before_head(model.eval(), images) for model in (headed, headless)]
        assert torch.equal(features[0], headless(images)) and torch.equal(*features)
    assert features[0].shape[1] == flops.macs(config, 1) - flops.macs(config, 0)


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gangs() -> Iterator[dict[int, Gang]]:
    made = {size: Gang(size) for size in (1, 2)}
    yield made
    for gang in made.values():
        gang.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    tiny.shard_set(folder / "set", sizes=(40, 30))
    tiny.shard_set(folder / "spoilt", sizes=(40, 30), spoilt=tuple(range(0, 70, 9)))
    return folder


def pretrain(gang: Gang, place: Path, name: str, of: str = "set", **changes: Any) -> tuple[Path, list[tuple]]:
    """Its folder, and steps and values of the probe as MLflow has them."""
    config = tiny.config(
        ShardSet(str(place / of)), duration=160.0, unit="steps", milestone_every=80, save_every=80, log_every=40
    )
    config = replace(config, data=replace(config.data, validation=str(place / "set")), **changes)
    uri, folder = f"sqlite:///{place}/mlflow.db", place / name
    training, validation = refuse_misfits(config, gang.size)
    open_folder(config, str(folder), roots_of(config, training, validation))
    mlflow_run = log.begin(uri, name, {"vitscale.folder": str(folder)}, {}, same="vitscale.folder")
    said = gang.run(_work, Job(config, str(folder), uri, mlflow_run, name))
    (folder / "said").write_text("\n".join(said[0]))
    held = MlflowClient(uri).get_metric_history(mlflow_run, "probe_accuracy")
    return folder, sorted((metric.step, metric.value) for metric in held)


def _work(world: World, job: Job) -> list[str]:
    said: list[str] = []
    assert run.work(job, world, torch.device("cpu"), said.append)
    return said


def as_if(ours: Path, theirs: Path) -> bool:
    a, b = (load_file(folder / "export" / "model.safetensors") for folder in (ours, theirs))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_every_milestone_is_probed_once_and_the_probe_changes_nothing(gangs: dict[int, Gang], place: Path) -> None:
    probed, values = pretrain(gangs[1], place, "probed")
    plain, none = pretrain(gangs[1], place, "plain", probe=False)
    assert [step for step, _ in values] == [80, 160] and none == []
    assert values[-1][1] > 0.6, "of classes that brightness tells apart"
    assert as_if(probed, plain)


@pytest.mark.slow
def test_a_milestone_is_worth_the_same_whatever_the_processes_and_the_zero_stage(
    gangs: dict[int, Gang], place: Path
) -> None:
    _, alone = pretrain(gangs[1], place, "alone")
    for zero in (2, 3):
        _, together = pretrain(gangs[2], place, f"together-{zero}", zero=zero)
        assert [step for step, _ in together] == [80, 160]
        assert dict(together) == pytest.approx(dict(alone), abs=0.03), "two of 70 pictures may be on the edge"


@pytest.mark.slow
def test_the_value_is_that_of_the_milestone_and_the_closed_form_as_if_they_were_put_together_by_hand(
    gangs: dict[int, Gang], place: Path
) -> None:
    folder, values = pretrain(gangs[2], place, "checked", model=tiny_vit())
    config = from_dict(json.loads((folder / CONFIG).read_text()))
    training, validation = refuse_misfits(config, 1)
    size = size_of(config)
    assert size and validation
    found = choose(training, validation, size, config.seed)
    assert found
    milestone = find(str(folder / run.MILESTONES / "step-00000080"))
    spent = flops.training_exaflops(config.model, config.classes, 80 * config.batch)
    assert milestone.about["metrics"] == {"data_root": training.root, "steps": 80, "exaflops": spent}
    assert find(str(folder)).about["metrics"]["exaflops"] == pytest.approx(2 * spent)
    model = build(milestone.config, milestone.classes)
    model.load_state_dict(milestone.weights())
    feed = Feed(training, config)

    def seen(numbers: list[int]) -> torch.Tensor:
        batches = feed.looked_at(numbers, 1000, refuse=False)
        with torch.no_grad():
            return torch.cat([before_head(model.eval(), normalised(batch.images)) for batch in batches])

    shots, judged = seen(found.shots.tolist()), seen(found.judged.tolist())
    labels = torch.from_numpy(found.shot_labels), torch.from_numpy(found.judged_labels)
    feed.close()
    assert dict(values)[80] == pytest.approx(
        fewshot.probe(shots, labels[0], judged, labels[1], found.classes), abs=0.02
    )


def tiny_vit() -> Vit:
    return Vit(width=16, depth=2, heads=2, hidden=32, patch=4, image_size=12)


@pytest.mark.slow
def test_pictures_that_cannot_be_decoded_are_named_and_the_others_probed(gangs: dict[int, Gang], place: Path) -> None:
    folder, values = pretrain(gangs[2], place, "spoilt-run", of="spoilt")
    assert [step for step, _ in values] == [80, 160]
    assert len(Folder(str(folder / run.REFUSED)).sizes()) == 8


def test_a_run_whose_milestones_are_too_cheap_says_so_and_goes_on(gangs: dict[int, Gang], place: Path) -> None:
    folder, values = pretrain(gangs[1], place, "cheap", milestone_every=5, duration=10.0)
    assert values == [] and "milestones are not probed: 5 steps" in (folder / "said").read_text()


@pytest.mark.slow
def test_masked_patches_are_probed_though_there_is_no_head(gangs: dict[int, Gang], place: Path) -> None:
    _, values = pretrain(gangs[2], place, "masked", objective="masked", model=tiny_vit())
    assert [step for step, _ in values] == [80, 160]


def test_a_run_that_was_begun_without_probes_may_go_on_with_them(place: Path) -> None:
    config: Config = tiny.config(ShardSet(str(place / "set")), probe=False)
    open_folder(config, str(place / "begun"), {})
    refuse_another(replace(config, probe=True), Folder(str(place / "begun")), {})
