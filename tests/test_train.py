"""Training survives: real DeepSpeed on gloo, real processes, killed with SIGKILL."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from pipeline.config import Augment
from pipeline.data import decode
from pipeline.track import log
from pipeline.train.folder import Job, open_folder
from pipeline.train.run import refuse_other_decoder, work
from pipeline.world import World
from shards.manifest import ShardSet
from shards.storage import Folder
from tests import tiny
from tests.gang import run_ranks
from tests.process import play
from tests.rings import count

ALL = Augment(layers=1, mixup=0.5, cutmix=0.5, erase=0.3)
STEPS = 20  # 32 pictures for 10 epochs in batches of 16
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    tiny.shard_set(folder / "set")
    return folder


def start(
    place: Path,
    name: str,
    *,
    processes: int,
    kill_at: int | None = None,
    dropout: float | None = 0.1,
    **changes: object,
) -> tuple[int, Path, str]:
    """Run in the folder `name`; returns the exit code, the folder and the MLflow run."""
    folder, shards = place / name, ShardSet(str(place / "set"))
    uri = f"sqlite:///{place}/mlflow.db"
    config = tiny.config(shards, **{"augment": ALL, **changes})
    if dropout is not None:
        config = replace(config, model=replace(config.model, dropout=dropout))
    open_folder(config, str(folder), {"training": shards.manifest.root})
    mlflow_run = log.begin(uri, name, {"vitscale.folder": str(folder)}, {}, same="vitscale.folder")
    code, output = run_ranks(play, str(folder), uri, mlflow_run, kill_at, size=processes)
    if kill_at is None:
        assert code == 0, output
    return code, folder, mlflow_run


def test_no_process_of_a_run_decodes_by_something_else_than_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path))
    for _ in range(2):
        refuse_other_decoder(folder)
    monkeypatch.setattr(decode, "BY", "another")
    with pytest.raises(ValueError, match=f"{tmp_path} was begun with pictures decoded by .*, this machine has another"):
        refuse_other_decoder(folder)
    folder.remove("decoder")
    refuse_other_decoder(folder)


def test_a_run_whose_pictures_were_decoded_by_something_else_ends_before_it_begins(tmp_path: Path) -> None:
    shards = tiny.shard_set(tmp_path / "set")
    folder = Folder(str(tmp_path / "run"))
    folder.write("decoder", b"another")
    with pytest.raises(ValueError, match="was begun with pictures decoded by another, this machine has"):
        work(Job(tiny.config(shards), folder.absolute, "", "", "tiny"), World(), torch.device("cpu"), print)
    assert set(folder.sizes()) == {"decoder"} and not folder.folders()


def losses(place: Path, mlflow_run: str, steps: int = STEPS) -> list[float]:
    """The loss of each step as MLflow has it; every step has to be there once."""
    held = MlflowClient(f"sqlite:///{place}/mlflow.db").get_metric_history(mlflow_run, "loss")
    held.sort(key=lambda metric: metric.step)
    assert [metric.step for metric in held] == list(range(1, steps + 1))
    return [metric.value for metric in held]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def furthest(ours: Path, theirs: Path) -> float:
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[int, tuple[Path, str]]:
    """By ZeRO stage, a run that nobody disturbs: its folder and MLflow run."""
    return {zero: start(place, f"quiet-{zero}", processes=2, zero=zero)[1:] for zero in (0, 1, 2, 3)}


@pytest.fixture(scope="module")
def quiet(undisturbed: dict[int, tuple[Path, str]]) -> Path:
    return undisturbed[2][0]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_twenty_steps_are_seven_and_a_kill_and_thirteen_whatever_the_zero_stage(
    place: Path, undisturbed: dict[int, tuple[Path, str]], zero: int
) -> None:
    code, folder, _ = start(place, f"killed-{zero}", processes=2, zero=zero, kill_at=10)
    assert code != 0 and not (folder / "export").exists()
    _, folder, mlflow_run = start(place, f"killed-{zero}", processes=2, zero=zero)
    assert furthest(undisturbed[zero][0], folder) == 0.0
    assert losses(place, mlflow_run) == losses(place, undisturbed[zero][1])


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_many_times_ends_as_if_nothing_had_happened(place: Path) -> None:
    kills = count(4, 100)
    steps, draw, killed = 8 * kills, random.Random(0), 0
    few = {"processes": 1, "duration": float(steps), "unit": "steps", "save_every": 5}
    _, quiet, undisturbed = start(place, "long", **few)
    for after in range(2, steps, 8):
        code, folder, _ = start(place, "killed-often", kill_at=after + draw.randrange(6), **few)
        assert not (folder / "export").exists()
        killed += code != 0
    assert killed == kills
    _, folder, mlflow_run = start(place, "killed-often", **few)
    assert furthest(quiet, folder) == 0.0
    assert losses(place, mlflow_run, steps) == losses(place, undisturbed, steps)


def test_every_zero_stage_has_the_same_losses(place: Path, undisturbed: dict[int, tuple[Path, str]]) -> None:
    theirs = losses(place, undisturbed[2][1])
    for zero in (0, 1, 3):
        assert losses(place, undisturbed[zero][1]) == pytest.approx(theirs, rel=1e-5)


def test_a_run_goes_on_with_any_number_of_processes_as_if_it_had_had_them_from_the_start(place: Path) -> None:
    # without dropout, which every process draws for itself
    alone = losses(place, start(place, "alone", processes=1, dropout=0.0)[2])
    start(place, "elastic", processes=2, dropout=0.0, kill_at=8)
    start(place, "elastic", processes=1, dropout=0.0, kill_at=16)
    _, _, mlflow_run = start(place, "elastic", processes=4, dropout=0.0)
    assert losses(place, mlflow_run) == pytest.approx(alone, rel=1e-5)


def test_a_folder_with_another_run_is_refused_naming_what_differs(place: Path, tmp_path: Path) -> None:
    shards = ShardSet(str(place / "set"))
    config, roots = tiny.config(shards), {"training": shards.manifest.root}
    open_folder(config, str(tmp_path), roots)
    open_folder(replace(config, data=replace(config.data, threads=7)), str(tmp_path), roots)
    other = replace(config, seed=5, optim=replace(config.optim, lr=0.5))
    with pytest.raises(
        ValueError, match=r"holds another run; these fields differ: optim.lr: 0.5 != 0.01; seed: 5 != 0"
    ):
        open_folder(other, str(tmp_path), roots)
    with pytest.raises(ValueError, match="data root of training"):
        open_folder(config, str(tmp_path), {"training": "0" * 64})


def test_a_checkpoint_that_was_not_completed_is_never_taken(place: Path, quiet: Path) -> None:
    copy = place / "half"
    shutil.copytree(quiet, copy)
    shutil.rmtree(copy / "export")
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    (newest / "complete.json").unlink()
    start(place, "half", processes=2)
    assert furthest(quiet, copy) == 0.0


def test_a_damaged_checkpoint_is_passed_over_as_if_it_had_not_been_written_unless_all_are(
    place: Path, quiet: Path
) -> None:
    copy = place / "damaged"
    shutil.copytree(quiet, copy)
    shutil.rmtree(copy / "export")
    older, newest = sorted(path for path in (copy / "checkpoints").iterdir() if path.is_dir())
    damage(newest)
    start(place, "damaged", processes=2)
    assert furthest(quiet, copy) == 0.0
    shutil.rmtree(copy / "export")
    damage(older)
    damage(newest)
    with pytest.raises(AssertionError, match=rf"has no whole checkpoint: .*{newest.name}.*{older.name} is damaged"):
        start(place, "damaged", processes=2)


def damage(checkpoint: Path) -> None:
    broken = next(checkpoint.glob("part-00001*.safetensors"))
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)


def test_a_run_names_what_it_leaves_out_whatever_its_processes(tmp_path: Path) -> None:
    shards = tiny.shard_set(tmp_path / "set", spoilt=(3, 17))
    data = replace(tiny.config(shards).data, validation="")
    _, folder, mlflow_run = start(tmp_path, "spoilt", processes=2, data=data)
    assert sorted(path.stem for path in (folder / "refused").iterdir()) == ["000000000003", "000000000017"]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for metric, last in {"data_refused": 2.0, "data_retries": 0.0}.items():
        assert client.get_metric_history(mlflow_run, metric)[-1].value == last
    read = [metric.value for metric in client.get_metric_history(mlflow_run, "data_bytes_per_second")]
    assert len(read) == STEPS and sum(read) > 0
    with pytest.raises(AssertionError, match=r"2 pictures are refused, more than data.refused_limit 1; .*/refused"):
        start(tmp_path, "strict", processes=2, data=replace(data, refused_limit=1))


def test_an_unwritable_target_is_refused_before_anything_starts() -> None:
    with pytest.raises(OSError, match="cannot write to /proc/vitscale"):
        Folder("/proc/vitscale").check_writable()
