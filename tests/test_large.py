"""A fine-tuning that is a run of its own: whoever is killed, its result is that of the quiet one.

`python tests/test_large.py FOLDER TO CHANGES PROCESSES` is one driver of such a trial, on the Ray of `RAY_ADDRESS`.
"""

import json
import os
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline import experiments, large
from pipeline.architectures import Cmt, Maxvit, Vit, at_size
from pipeline.config import Config, Data, Optim, from_dict, to_dict
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Batch, Feed
from pipeline.models.build import build, initialise
from pipeline.models.vit import TwoLogits
from pipeline.models.weights.exported import WEIGHTS, find, put
from pipeline.models.weights.fit import fitted
from pipeline.optim.schedule import learning_rate
from pipeline.train import run
from pipeline.train.checkpoint import complete
from pipeline.train.folder import open_folder, refuse_misfits, roots_of
from pipeline.train.objective import Objective
from pipeline.train.origin import origin_of
from pipeline.transfer import protocols, tasks
from pipeline.transfer.finetune import Trial
from pipeline.transfer.protocols import Recipe
from pipeline.transfer.tasks import Part, Task
from shards.manifest import ShardSet
from shards.storage import Folder
from tests import tiny
from tests.family import kill_run
from tests.gang import JobProcess

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parents[1]
MODEL = Vit(width=16, depth=2, heads=2, hidden=32, patch=4, image_size=12, representation=True, dropout=0.1)
RECIPE = Recipe(steps=500, batch=16, warmup=5, size=16, average=0.9, training="crop", layers=1, mixup=0.2)
TASK = Task(
    "tiny",
    "tiny",
    learning=(Part("train", 0, 90),),
    choosing=(Part("train", 90, 100),),
    testing=(Part("test"),),
    flip=True,
    crop=True,
    kind="run",
    also=(("other", "other/test"), ("missing", "missing/test")),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a model to start from."""
    folder = tmp_path_factory.mktemp("large")
    tiny.shard_set(folder / "data/tiny/train", sizes=(30, 41, 29))
    tiny.shard_set(folder / "data/tiny/test", sizes=(20, 17))
    tiny.shard_set(folder / "data/other/test", sizes=(11,))
    exported(folder / "start", MODEL)
    return folder


def exported(folder: Path, model: Any, classes: int = 5, mean: float = 0.5) -> dict[str, Tensor]:
    made = build(model, classes)
    initialise(made, torch.Generator().manual_seed(3))
    weights = {name: value.detach().clone() for name, value in made.state_dict().items()}
    put(Folder(str(folder)), weights, model, classes, mean=[mean] * 3, std=[0.5] * 3)
    return weights


def trial(place: Path, **changes: Any) -> Trial:
    data = tasks.roots(tasks.find(str(place / "data"), TASK))
    start = find(str(place / "start")).digest
    return replace(Trial(TASK, data, "test", "pretrained", start, "demo-1", RECIPE, 0.1, 0), **changes)


def planned(place: Path, chosen: Trial) -> tuple[Config, large.Count]:
    return large.planned(chosen, str(place / "start"), str(place / "data"), cpus_each=1, precision="fp32")


# --- parts of sets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [(7,), (30, 41, 29), (1, 1, 1, 98, 1), (64, 64)])
@pytest.mark.parametrize("edges", [(0, 90, 100), (0, 1, 50, 99, 100)])
def test_parts_that_meet_divide_every_set_without_gap_or_overlap_as_a_task_has_it(
    tmp_path: Path, samples: tuple[int, ...], edges: tuple[int, ...]
) -> None:
    shards = tiny.shard_set(tmp_path / "set", sizes=samples)
    whole = Corpus([shards])
    keys = whole.keys(np.arange(whole.samples))
    found: list[str] = []
    for first, last in pairwise(edges):
        numbers = Part("train", first, last).numbers(whole.samples)
        if not numbers:
            with pytest.raises(ValueError, match=f"hundredths {first} to {last} of .* hold none"):
                Corpus([shards], (first, last))
            continue
        part = Corpus([shards], (first, last))
        assert part.keys(np.arange(part.samples)) == keys[numbers.start : numbers.stop]
        assert part.samples == len(numbers) == sum(map(sum, part.parts)) and 0 not in part.counts
        found += part.keys(np.arange(part.samples))
    assert found == keys


def test_the_pictures_of_a_part_are_those_of_the_whole(place: Path) -> None:
    config = tiny.config(ShardSet(str(place / "data/tiny/train")))
    pixels: dict[str, Tensor] = {}
    for part in ((0, 100), (0, 37), (37, 100)):
        feed = Feed(Corpus(Corpus.open(config.data.shards).sets, part), config)
        for batch in feed.evaluation(1000):
            for key, image in zip(batch.keys, batch.images, strict=True):
                assert torch.equal(pixels.setdefault(key, image), image)
        feed.close()
    assert len(pixels) == 100


def test_no_picture_of_a_part_that_is_left_out_is_ever_trained_on(place: Path) -> None:
    config = tiny.config(ShardSet(str(place / "data/tiny/train")))
    whole = Corpus.open(config.data.shards)
    left_out = set(Corpus.open(config.data.shards, (90, 100)).keys(np.arange(10)))
    corpus = Corpus.open(config.data.shards, (0, 90))
    feed, seen = Feed(corpus, config), set()
    for batch in feed.training(0, 30):
        seen |= set(corpus.keys(batch.samples.numpy()))
    feed.close()
    assert seen | left_out == set(whole.keys(np.arange(100))) and not seen & left_out


@pytest.mark.parametrize("side", [1.0, 0.5])
def test_crops_by_side_keep_that_share_and_an_evaluation_of_the_whole_keeps_all(place: Path, side: float) -> None:
    config = tiny.config(ShardSet(str(place / "data/tiny/train")))
    data = replace(config.data, crop_side=side, eval_crop=0.0, flip=False)
    feed = Feed(Corpus.open(data.shards), replace(config, data=data))
    whole = torch.cat([batch.images for batch in feed.evaluation(100)])
    for batch in feed.training(0, 2):
        same = [torch.equal(image, whole[n]) for image, n in zip(batch.images, batch.samples.tolist(), strict=True)]
        assert all(same) if side == 1.0 else not any(same)
    feed.close()


# --- what a run starts from -----------------------------------------------------------------------------------------


def starting(place: Path, folder: str = "start", **changes: Any) -> Config:
    config = tiny.config(ShardSet(str(place / "data/tiny/train")), model=MODEL)
    return replace(config, start=str(place / folder), **changes)


@pytest.mark.parametrize("objective", ["softmax", "sigmoid", "masked"])
def test_a_run_begins_with_the_weights_of_its_start_at_its_own_size_and_a_fresh_head(
    place: Path, objective: Any
) -> None:
    model = replace(at_size(MODEL, 24), representation=False)
    config = starting(place, model=model, objective=objective)
    begun = run.build(config, origin_of(config)).state_dict()
    wanted, _ = fitted(find(config.start).weights(), model, 3, head="fresh")
    assert begun["pos_embed"].shape[1] == 37
    for name, value in wanted.items():
        if not name.startswith("head."):
            assert torch.equal(begun[name], value)
        elif objective != "masked":
            bias = -10.0 if objective == "sigmoid" and name == "head.bias" else 0.0
            assert (begun[name] == bias).all()


@pytest.mark.parametrize(
    "model",
    [
        Cmt((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2), (8, 4, 2, 1), stem=8, features=32, image_size=32),
        Maxvit(stem=8, widths=(32, 32), depths=(1, 1), window=2, image_size=32),
    ],
)
def test_tables_of_every_kind_are_resized_and_that_is_known_without_reading_them(tmp_path: Path, model: Any) -> None:
    exported(tmp_path / "start", model)
    shards = tiny.shard_set(tmp_path / "set")
    config = tiny.config(shards, model=at_size(model, 64), start=str(tmp_path / "start"))
    refuse_misfits(config, 1)
    run.build(config, origin_of(config))


def test_a_model_that_sees_pictures_in_other_units_goes_on_seeing_and_says_them_so(place: Path, tmp_path: Path) -> None:
    model = replace(MODEL, representation=False, dropout=0.0)
    exported(tmp_path / "start", model, mean=0.25)
    config = replace(starting(place, model=model), start=str(tmp_path / "start"))
    origin = origin_of(config)
    assert origin
    begun, plain, images = run.build(config, origin), build(model, 3), torch.rand(2, 3, 12, 12) * 2 - 1
    plain.load_state_dict(begun.state_dict())
    for each in (begun, plain):
        torch.nn.init.ones_(each.get_parameter("head.weight"))
    assert torch.allclose(begun.eval()(images), plain.eval()(images + 0.5), atol=1e-5)
    run.export(Folder(str(tmp_path / "run")), config, {"x": torch.zeros(1)}, {}, origin=origin)
    assert find(str(tmp_path / "run")).about["mean"] == [0.25] * 3


def test_both_heads_of_a_distilled_start_learn_together_what_the_labels_say(place: Path) -> None:
    model = replace(MODEL, representation=False, distillation=True, dropout=0.0)
    config, images = starting(place, model=model, smoothing=0.0), torch.zeros(4, 12, 12, 3, dtype=torch.uint8)
    config.check(1)
    with pytest.raises(ValueError, match=r"needs distillation\.teacher, a start"):
        replace(config, start="").check(1)
    said = TwoLogits(torch.randn(4, 3), torch.randn(4, 3))
    engine: Any = SimpleNamespace(device=torch.device("cpu"), forward=lambda given: said)
    batch = Batch(images, torch.tensor([[0], [1], [2], [0]]), torch.arange(4), torch.ones(4), torch.zeros(4))
    wanted = cross_entropy((said.labels + said.teacher) / 2, batch.labels[:, 0])
    assert torch.allclose(Objective(config, engine)(batch), wanted)


def test_every_start_that_does_not_fit_is_refused_before_anything_is_read(place: Path, tmp_path: Path) -> None:
    whole = starting(place)
    refuse_misfits(whole, 1)
    exported(tmp_path / "other", Maxvit(stem=8, widths=(32, 32), depths=(1, 1), window=2, image_size=32))
    exported(tmp_path / "plain", replace(MODEL, representation=False))
    exported(tmp_path / "broken", MODEL)
    (tmp_path / "broken" / WEIGHTS).unlink()
    cases = {
        str(tmp_path / "nothing"): "holds no export/model.json",
        str(tmp_path / "broken"): f"no {WEIGHTS}: it is not whole",
        str(tmp_path / "other"): "a model of the family maxvit; the run's model is of the family vit",
        str(tmp_path / "plain"): "cannot start from .*lacking: pre_logits.weight",
    }
    for start, said in cases.items():
        with pytest.raises(ValueError, match=said):
            refuse_misfits(replace(whole, start=start), 1)
    with pytest.raises(ValueError, match="of another shape: blocks"):
        refuse_misfits(replace(whole, model=replace(MODEL, hidden=64)), 1)
    with pytest.raises(ValueError, match="patch"):
        refuse_misfits(replace(whole, model=replace(MODEL, image_size=3)), 1)
    with pytest.raises(ValueError, match="3 classes, the run 4"):
        refuse_misfits(replace(whole, classes=4), 1)


def test_a_run_goes_on_from_a_start_that_was_moved_and_not_from_another(place: Path, tmp_path: Path) -> None:
    config, folder = starting(place), Folder(str(tmp_path / "run"))
    exported(tmp_path / "moved", MODEL)
    exported(tmp_path / "other", MODEL, classes=7)

    def begin(chosen: Config) -> None:
        open_folder(chosen, folder.absolute, roots_of(chosen, *refuse_misfits(chosen, 1)))

    begin(config)
    begin(replace(config, start=str(tmp_path / "moved")))
    with pytest.raises(ValueError, match="data root of start"):
        begin(replace(config, start=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="fields differ: start: '' !="):
        begin(replace(config, start=""))


@pytest.mark.parametrize("name", experiments.known())
def test_every_run_that_was_written_down_before_these_fields_is_read_as_it_was(name: str) -> None:
    values = json.loads(json.dumps(to_dict(experiments.load(name))))
    for field in ("part", "validation_part", "crop_side"):
        del values["data"][field]
    del values["optim"]["boundaries"], values["start"], values["probe"]
    assert from_dict(values) == experiments.load(name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": Data(lanes=8, part=(50, 50))}, "data.part is 50 50; hundredths go from 0 to 100"),
        ({"data": Data(lanes=8, validation_part=(0, 101))}, "data.validation_part is 0 101"),
        ({"data": Data(lanes=8, crop_side=1.5)}, "data.crop_side is 1.5"),
        ({"data": Data(lanes=8, eval_crop=-0.1)}, "data.eval_crop is -0.1"),
        ({"optim": Optim(decay="steps")}, "decay steps has some"),
        ({"optim": Optim(decay="steps", boundaries=(5, 3))}, r"boundaries are \[5, 3\]"),
        ({"optim": Optim(boundaries=(5,))}, r"boundaries are \[5\]"),
    ],
)
def test_every_field_that_makes_no_sense_is_refused(place: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(starting(place), **changes).check(1)


# --- what a trial is as a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "vit-512", "augreg", "big-vision", "bit-hyperrule", "deit"])
def test_every_protocol_s_rates_are_those_of_its_recipe_at_every_step(place: Path, name: str) -> None:
    imagenet = next(task for task in tasks.ALL if task.name == "imagenet")
    recipe = protocols.named(name).recipe(imagenet, 1_281_167, MODEL, 400.0 * 350)
    config, _ = planned(place, trial(place, recipe=replace(recipe, size=16, cutmix=0.0)))
    steps = range(0, recipe.steps, 97)
    assert config.steps(10**6) == recipe.steps and config.batch == recipe.batch
    ours = [learning_rate(config.optim, step, recipe.steps) for step in steps]
    assert ours == pytest.approx([recipe.rate_at(0.1, step) for step in steps])


def test_a_rate_is_chosen_on_pictures_that_are_not_learnt_from_and_the_test_learns_from_all(place: Path) -> None:
    dev, dev_count = planned(place, trial(place, split="dev"))
    test, test_count = planned(place, trial(place))
    train = str(place / "data/tiny/train")
    assert (dev.data.shards, dev.data.part) == (train, (0, 90)) and test.data.part == (0, 100)
    assert dev_count.judged == {"": (large.Stretch(train, (90, 100)),)}
    where = {name: [stretch.url for stretch in some] for name, some in test_count.judged.items()}
    assert where == {"": [str(place / "data/tiny/test")], "other": [str(place / "data/other/test")]}


def test_a_trial_is_the_same_run_whatever_the_processes_and_another_rate_is_another(place: Path) -> None:
    ours, _ = planned(place, trial(place))
    assert planned(place, trial(place))[0] == ours
    assert planned(place, trial(place, rate=0.2))[0].optim.lr == 0.2
    assert (ours.model.image_size, ours.data.crop_side, ours.data.eval_crop) == (16, 6 / 7, 0.0)
    scratch = find(str(place / "start")).architecture
    assert planned(place, trial(place, start="scratch", model=scratch))[0].start == ""


def test_every_trial_that_does_not_fit_is_refused_before_a_machine_is_asked_for(place: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "has changed: it is": {"model": "0" * 64},
        "shard sets of tiny have changed": {"data": ()},
        "cannot be fine-tuned at 2 pixels": {"recipe": replace(RECIPE, size=2)},
        "none for a run of its own": {"recipe": Recipe("fewshot", shots=5)},
        "learnt from several sets": {"task": replace(TASK, choosing=(Part("train", 95, 100),))},
    }
    for said, changes in cases.items():
        with pytest.raises(ValueError, match=said):
            planned(place, trial(place, **changes))
    with pytest.raises(ValueError, match="16 lanes do not divide over 3 processes"):
        large._allowed(planned(place, trial(place))[0], [3])


# --- the run itself -------------------------------------------------------------------------------------------------


class Told:
    """A module of tests as a driver of its own, on the Ray at `address`; its home is the place."""

    def __init__(self, module: str, place: Path, to: str, address: str, *words: str) -> None:
        uri = f"sqlite:///{place}/mlflow.db"
        env = {**os.environ, "HOME": str(place), "RAY_ADDRESS": address, "MLFLOW_TRACKING_URI": uri}
        self.process = JobProcess(ROOT / "tests" / f"{module}.py", place, to, *words, env=env)

    def wait_for(self, there: Callable[[], Any]) -> None:
        """Return when something is there."""
        while not there():
            assert self.process.poll() is None, self.said()
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill the driver and the processes of its run, none of which does a step more."""
        kill_run(self.process)

    def said(self) -> str:
        """What it has printed so far."""
        return "".join(self.process.said())


class Driver(Told):
    """One driver of a trial."""

    def __init__(self, place: Path, to: str, address: str, chosen: Trial, processes: int) -> None:
        self.run = place / to / "runs" / chosen.name
        what = json.dumps({"split": chosen.split, "rate": chosen.rate})
        super().__init__("test_large", place, to, address, what, str(processes))

    def wait_for_checkpoint(self) -> None:
        """Return when there is a complete one."""
        self.wait_for(lambda: complete(Folder(str(self.run))))

    def result(self) -> dict[str, Any]:
        """What `perform` gave."""
        try:
            assert self.process.wait(240) == 0, self.said()
        finally:
            self.kill()
        return json.loads((self.run.parents[1] / "result.json").read_text())


@pytest.fixture(scope="module")
def quiet(place: Path, address: str) -> Iterator[tuple[dict[str, Any], Driver]]:
    driver = Driver(place, "quiet", address, trial(place), 2)
    yield driver.result(), driver


@pytest.mark.slow
def test_a_fine_tuning_that_is_killed_in_the_middle_has_the_result_of_the_quiet_one(
    place: Path, quiet: tuple[dict[str, Any], Driver], address: str
) -> None:
    first = Driver(place, "killed", address, trial(place), 2)
    first.wait_for_checkpoint()
    first.kill()
    assert not (first.run / "export").exists()
    again = Driver(place, "killed", address, trial(place), 2)
    assert {**again.result(), "seconds": 0} == {**quiet[0], "seconds": 0}
    assert "goes on after step" in again.said()
    ours, theirs = (find(str(driver.run)).weights() for driver in (again, quiet[1]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_every_test_picture_counts_once_and_a_model_that_learnt_is_right_of_most(
    place: Path, quiet: tuple[dict[str, Any], Driver]
) -> None:
    result, driver = quiet
    assert (result["count"], result["also"]["other"]["count"], list(result["also"])) == (37, 11, ["other"])
    for judged in (result, result["also"]["other"]):
        bits = np.unpackbits(np.frombuffer(b64decode(judged["right"]), np.uint8))[: judged["count"]]
        assert bits.sum() == judged["correct"] and judged["accuracy"] == judged["correct"] / judged["count"]
    assert result["accuracy"] > 0.6 and result["classes"] == 3
    assert result["trial"] == json.loads(json.dumps(asdict(trial(place))))
    assert not (driver.run / "checkpoints").exists() and (driver.run / "export").exists()


@pytest.mark.slow
def test_a_trial_that_has_been_counted_is_not_run_again(
    place: Path, quiet: tuple[dict[str, Any], Driver], address: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in quiet[1].run.rglob("*") if path.is_file()}
    again = Driver(place, "quiet", address, trial(place), 2)
    assert {**again.result(), "seconds": 0} == {**quiet[0], "seconds": 0}
    assert {path: path.stat().st_mtime_ns for path in quiet[1].run.rglob("*") if path.is_file()} == before


def main() -> None:
    """One driver."""
    import ray

    place, to, changes, processes = sys.argv[1:]
    chosen = trial(Path(place), **json.loads(changes))
    ray.init(os.environ["RAY_ADDRESS"], runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    folder = Path(place) / to
    start, data = f"{place}/start", f"{place}/data"
    result = large.perform(chosen, start, data, Folder(str(folder)), processes=[int(processes)])
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
