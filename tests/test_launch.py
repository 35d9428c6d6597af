"""Runs under Ray Train survive: `python jobs/pretrain.py` for real, its processes and its driver killed by SIGKILL."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from jobs import pretrain as job
from pipeline.cli import run
from pipeline.config import Config
from pipeline.experiments import known
from pipeline.launch import halving, micro_batch_of
from pipeline.train.board import DEMANDED, LEAVING, MORE, TERMINATED, Board
from pipeline.train.checkpoint import complete, name_of
from shards.storage import Folder
from tests import tiny
from tests.family import family, kill_all, kill_run
from tests.gang import JobProcess

ROOT = Path(__file__).resolve().parents[1]
STEPS = 160
pytestmark = pytest.mark.timeout(600)
TINY = {
    "classes": 3,
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.hidden": 32,
    "model.patch": 4,
    "model.image-size": 12,
    "model.dropout": 0.1,
    "data.lanes": 8,
    "batch": 16,
    "duration": STEPS / 2,  # of 32 pictures
    "optim.warmup": 5,
    "save-every": 10,
    "log-every": 10,
    "processes": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    tiny.shard_set(folder / "set")
    return folder


def words(place: Path, name: str, **changes: object) -> list[str]:
    """The command line of a tiny run; `data__shards` is --data.shards."""
    given = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    options = {**TINY, "data.shards": place / "set", "to": place / "runs", "run": name, **given}
    return ["demo", *(f"--{option}={value}" for option, value in options.items())]


class Driver:
    """`python jobs/pretrain.py`, which starts a Ray of its own unless an address is given; its home is the place.

    On that Ray, whose nodes are children of the test, its MLflow is where it would be without one.
    """

    def __init__(self, place: Path, name: str, cluster: str = "", **changes: object) -> None:
        self.run = Folder(str(changes.get("to", place / "runs"))) / name
        self.folder = Path(self.run.url)
        left = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", *(() if cluster else ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")))
        kept = {k: v for k, v in os.environ.items() if k not in left}
        self._cluster = cluster
        if cluster:
            changes = {"tracking_uri": mlflow_at(place), **changes}
        env = {**kept, "HOME": str(place), **({"RAY_ADDRESS": cluster} if cluster else {})}
        self._process = JobProcess("pretrain.py", *words(place, name, **changes), env=env, cwd=place)

    def workers(self) -> list[psutil.Process]:
        """The processes of the run."""
        return family(None if self._cluster else self._process.pid, "TrainWorker")

    def wait_for_checkpoint(self, after: int = 0) -> None:
        """Return when there is a complete checkpoint of a later step."""
        limit = time.monotonic() + 240
        while not any(step > after for step in complete(self.run)):
            assert self._process.poll() is None, self.end()
            assert time.monotonic() < limit
            time.sleep(0.02)

    def started(self) -> str:
        """The word of the last start of the run's processes, empty before the first."""
        return self.run.read("attempt").decode() if self.run.exists("attempt") else ""

    def wait_for_start(self, but: str = "") -> str:
        """Return when the processes of the run have started once more; the word of that start."""
        limit = time.monotonic() + 240
        while (word := self.started()) in ("", but):
            assert self._process.poll() is None, self.end()
            assert time.monotonic() < limit
            time.sleep(0.02)
        return word

    def tell(self, number: int) -> None:
        """Send the driver a signal."""
        self._process.send_signal(number)

    def kill(self) -> list[psutil.Process]:
        """Kill the driver alone; returns its family, which has to follow it."""
        started = family(self._process.pid)
        self._process.kill()
        self._process.wait()
        return started

    def kill_with_workers(self) -> None:
        """Kill the driver and the processes of the run, none of which does a step more."""
        kill_run(self._process)

    def end(self, code: int = 0) -> str:
        """What it said, on stdout where it ends well and on stderr otherwise."""
        try:
            said, wrong = self._process.communicate(timeout=240)
        finally:
            kill_all(self._process)
        assert self._process.returncode == code, said + wrong
        return wrong if code else said


def mlflow_at(place: Path) -> str:
    """Where a run on a laptop puts it."""
    return f"sqlite:///{place}/.local/share/vitscale/mlflow.db"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def as_if(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(place: Path, name: str, status: str = "FINISHED") -> list[int]:
    """Steps at which the run has a loss in MLflow."""
    client = MlflowClient(mlflow_at(place))
    experiment = client.get_experiment_by_name("vitscale")
    assert experiment
    (only,) = client.search_runs([experiment.experiment_id], f"tags.`vitscale.run` = '{name}'")
    assert only.info.status == status
    return sorted(metric.step for metric in client.get_metric_history(only.info.run_id, "loss"))


EVERY_LINE = list(range(2, STEPS + 1, 2))  # an epoch, which ends a line, is two steps


@pytest.fixture(scope="module")
def quiet(place: Path, address: str) -> Path:
    """A run that nobody disturbs."""
    driver = Driver(place, "quiet", address)
    assert f"quiet: {STEPS} steps; " in driver.end()
    return driver.folder


# --- death ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_whose_process_is_killed_goes_on_by_itself_as_if_nothing_had_happened(
    place: Path, quiet: Path, address: str
) -> None:
    driver = Driver(place, "worker-killed", address)
    driver.wait_for_checkpoint(after=20)
    driver.workers()[1].kill()
    said = driver.end()
    assert re.search(rf"worker-killed: goes on after step \d+ of {STEPS}\n", said)
    assert as_if(driver.folder, quiet)
    assert logged(place, "worker-killed") == EVERY_LINE


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_goes_on_when_it_is_started_again_as_if_nothing_had_happened(
    place: Path, quiet: Path, address: str
) -> None:
    driver = Driver(place, "driver-killed", address)
    driver.wait_for_checkpoint(after=20)
    driver.kill_with_workers()
    assert not (driver.folder / "export").exists()
    again = Driver(place, "driver-killed", address)
    assert "driver-killed: goes on after step" in again.end()
    assert as_if(again.folder, quiet)
    assert logged(place, "driver-killed") == EVERY_LINE


@pytest.mark.slow
def test_a_run_that_is_told_to_end_saves_first_and_goes_on_from_there_whoever_is_told(
    place: Path, address: str
) -> None:
    # No checkpoint is due, and no failure is forgiven: to be told in time is none.
    endless = {"duration": 10**6, "save_every": 10**6, "max_failures": 0}
    driver = Driver(place, "told", address, **endless)
    begun = driver.wait_for_start()
    driver.workers()[1].terminate()
    driver.wait_for_start(but=begun)
    first = complete(Folder(str(driver.folder)))[-1]
    driver.tell(signal.SIGTERM)
    assert "stopped" in driver.end(130)
    second = complete(Folder(str(driver.folder)))[-1]
    assert second > first > 0
    again = Driver(place, "told", address, **endless)
    again.wait_for_start(but=driver.started())
    again.tell(signal.SIGINT)
    again.end(130)
    third = complete(Folder(str(again.folder)))[-1]
    assert third > second
    # A run that stops does not wait for MLflow: what it could not send goes with the checkpoint.
    sent = [step for step in logged(place, "told", status="KILLED") if step % 2 == 0]
    assert len(sent) == len(set(sent)), "each line once"
    kept = json.loads((again.folder / "checkpoints" / name_of(third) / "complete.json").read_bytes())["metrics"]
    lines = [record["step"] for record in kept if "loss" in record["values"] and record["step"] % 2 == 0]
    assert sorted({*sent, *lines}) == list(range(2, third + 1, 2)), "each of the lines that are due"


@pytest.mark.parametrize(("fits", "starts"), [(8, 0), (4, 1), (2, 2)])
def test_a_run_whose_micro_batches_do_not_fit_goes_on_with_halves_and_computes_the_same(
    tmp_path: Path, fits: int, starts: int
) -> None:
    config, folder, failed = tiny.config(tiny.shard_set(tmp_path / "set")), Folder(str(tmp_path / "run")), 0

    def work(config: Config) -> int:
        if config.micro(2) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. GPU 0 has a total capacity of 79 GiB")
        return config.micro(2) * config.passes(2) * 2

    while True:
        try:
            with halving(folder, config, 2):
                batch = work(micro_batch_of(folder, config))
                break
        except torch.OutOfMemoryError:
            failed += 1
            config = micro_batch_of(folder, config)
    assert (batch, failed) == (config.batch, starts)
    assert micro_batch_of(folder, replace(config, micro_batch=64)).micro_batch == (fits if starts else 64)


def test_a_process_of_an_earlier_start_gives_up_no_later_one() -> None:
    board = Board()
    old = board.begin(True)
    assert board.begin(False) == old == 1
    new = board.begin(True)
    board.give_up("another start of this run has taken over", old)
    assert board.why_given_up() == "" and new == 2
    board.give_up("another start of this run has taken over", new)
    assert board.why_given_up() and board.begin(True) == 0


def test_every_reason_to_stop_but_that_of_a_person_ends_with_the_start_that_it_was_for() -> None:
    board = Board()
    for reason in (MORE, TERMINATED, LEAVING):
        assert board.begin(True) and board.ask_to_stop(reason) and board.stop_asked() == reason
        board.leave()
    assert board.begin(True) and board.stop_asked() == 0
    assert board.ask_to_stop(DEMANDED)
    board.ask_to_stop(MORE)
    board.leave()
    assert not board.begin(True) and not board.ask_to_stop(DEMANDED) and board.stop_asked() == DEMANDED


def test_a_smaller_word_of_another_process_stands(tmp_path: Path) -> None:
    config, folder = tiny.config(tiny.shard_set(tmp_path / "set")), Folder(str(tmp_path / "run"))
    folder.write("micro_batch", b"1")
    with pytest.raises(torch.OutOfMemoryError), halving(folder, config, 2):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert folder.read("micro_batch") == b"1"


def test_a_picture_alone_that_does_not_fit_is_said_with_the_memory_there_is(tmp_path: Path) -> None:
    config = tiny.config(tiny.shard_set(tmp_path / "set"), micro_batch=1)
    said = r"not even a micro-batch of 1 fits .* 79 GiB\. Use --recompute"
    with pytest.raises(ValueError, match=said), halving(Folder(str(tmp_path / "run")), config, 2):
        raise torch.OutOfMemoryError("CUDA out of memory. GPU 0 has a total capacity of 79 GiB.\nmore")


@pytest.mark.slow
def test_nothing_of_a_run_outlives_its_driver(place: Path) -> None:
    driver = Driver(place, "orphaned", duration=10**6)
    driver.wait_for_checkpoint()
    left = driver.kill()
    assert psutil.wait_procs(left, timeout=90)[1] == []  # Ray's own agents take a minute to notice


@pytest.mark.slow
def test_a_finished_run_says_so_without_a_ray(place: Path, quiet: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in quiet.rglob("*")}
    driver = Driver(place, "quiet", cluster="127.0.0.1:1")  # where no Ray is
    assert driver.end() == f"quiet is finished: {STEPS} steps; {quiet}/export\n"
    assert {path: path.stat().st_mtime_ns for path in quiet.rglob("*") if path != quiet} == {
        path: when for path, when in before.items() if path != quiet
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system to fill up")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_is_named_and_the_last_complete_checkpoint_stays_usable(
    place: Path, quiet: Path, small_disk: Path, address: str
) -> None:
    driver = Driver(place, "full", address, to=small_disk, max_failures=0)
    driver.wait_for_checkpoint(after=20)
    fill(small_disk / "somebody else's")
    said = driver.end(2).splitlines()[-1]  # after what Ray itself had to say
    assert re.fullmatch(rf"error: .*No space left on device.*{small_disk}/full.*", said), said
    usable = complete(Folder(str(driver.folder)))[-1]
    (small_disk / "somebody else's").unlink()
    again = Driver(place, "full", address, to=small_disk)
    assert f"full: goes on after step {usable} of {STEPS}\n" in again.end()
    assert as_if(again.folder, quiet)


def fill(path: Path) -> None:
    """Take all that is free."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


# --- mistakes -------------------------------------------------------------------------------------------------------


def mistake(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that answers it."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: job.main(argv))
    out, wrong = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and re.fullmatch(r"error: .*\n", wrong), wrong
    return wrong


def test_every_mistake_is_answered_by_a_line_before_a_machine_is_asked_for(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # where no Ray is
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "empty").mkdir()
    for copy in ("short", "unfinished"):
        shutil.copytree(place / "set", tmp_path / copy)
    (tmp_path / "unfinished" / "manifest.json").unlink()
    (tmp_path / "short" / "000002.tar").unlink()
    mistakes: list[tuple[list[str], str]] = [
        (["vit_b17_in21k"], rf"no experiment 'vit_b17_in21k'; there are: {', '.join(known())}$"),
        (
            [*words(place, "a"), "--optim.lrr=3"],
            r"no option --optim.lrr=3 in optim; there are: --optim.optimizer, --optim.lr,",
        ),
        (words(place, "a", batch="many"), r"batch.*many"),
        (words(place, "a", zero=7), r"'7'.*--zero"),
        (words(place, "a", data__shards=tmp_path / "nowhere"), rf"no shard set at {tmp_path}/nowhere"),
        (
            words(place, "a", data__shards=tmp_path / "unfinished"),
            rf"{tmp_path}/unfinished/manifest.json does not exist: the set was not finished",
        ),
        (words(place, "a", data__shards=tmp_path / "short"), r"000002.tar"),
        (words(place, "a", data__validation=tmp_path / "empty"), rf"no shard set at {tmp_path}/empty"),
        (words(place, "a", data__shards=""), r"data.shards is empty"),
        (words(place, "a", classes=4), r"has 3 classes, the run 4"),
        (words(place, "a", to=""), r"--to is missing"),
        (words(place, "a", to="/proc/vitscale"), r"/proc/vitscale"),
        (words(place, "a", batch=20), r"batch 20 does not divide over 8 lanes: a batch of 16 or 24 would"),
        (words(place, "a", processes=3), r"8 lanes do not divide over 3 processes: 2 or 4 processes would do"),
        (words(place, "a", processes="5:7"), r"8 lanes divide over none of these numbers; they do over 1, 2, 4, 8"),
        (words(place, "a", change="optim.lr=fast"), r"--change optim.lr=fast: a field and its number are needed"),
        (words(place, "a", duration=0.1), r"0.1 epochs of 32 pictures are not one step of 16"),
        (words(place, "a", tracking_uri="http://127.0.0.1:9"), r"no MLflow server at http://127.0.0.1:9 .*refused"),
    ]
    for argv, said in mistakes:
        assert re.search(said, mistake(argv, capsys))
    assert not (place / "runs" / "a").exists()


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused_naming_every_field_that_differs(
    place: Path, quiet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_at(place))
    said = mistake(words(place, "quiet", seed=5, optim__lr=0.5), capsys)
    assert f"{quiet} holds another run; these fields differ: optim.lr: 0.5 != 0.004; seed: 5 != 0" in said
    left = place / "runs" / "unfinished"
    left.mkdir()
    about = json.loads((quiet / "config.json").read_text())
    (left / "config.json").write_text(json.dumps({**about, "batch": 32}))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # where no Ray is
    assert "these fields differ: batch: 16 != 32" in mistake(words(place, "unfinished"), capsys)


@pytest.mark.slow
def test_more_processes_than_the_cluster_has_room_for_are_refused_saying_what_there_is(
    place: Path, local_ray: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_at(place))
    said = mistake(words(place, "wide", processes=8, cpus_each=3), capsys)
    assert "wide on 8 processes needs 24 CPU; the cluster has 4 CPU" in said
    assert not (place / "runs" / "wide" / "config.json").exists()


# --- answers at once ------------------------------------------------------------------------------------------------

HEAVY = {"torch", "ray", "numpy", "pyarrow", "deepspeed", "mlflow", "fsspec"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--help"], "vit_h14_in21k    ViT-H/14 on ImageNet-21k"),
        (["demo", "--help"], "--model.width"),
        (["vit_h14_in21k", "--dry-run", "--processes", "8"], "660,382,801"),
        (["vit_h14_in21k", "--dry-run", "--classes", "1000", "--model.no-representation"], "632,045,800"),
    ],
)
def test_every_question_is_answered_without_anything_heavy(argv: list[str], said: str) -> None:
    told = "import runpy, sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
    told += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    ended = subprocess.run(
        [sys.executable, "-c", told, str(ROOT / "jobs" / "pretrain.py"), *argv], capture_output=True, text=True
    )
    assert ended.returncode == 0 and said in ended.stdout
    assert not HEAVY & set(ended.stderr.split())


@pytest.mark.slow
def test_whoever_starts_a_run_and_whoever_controls_it_wait_for_nothing_that_only_its_processes_need() -> None:
    light = "import sys, pipeline.launch, pipeline.train.board, pipeline.train.folder; print(*sys.modules)"
    assert not {"torch", "deepspeed", "mlflow"} & set(modules(light))
    engine = "import sys, torch; from pipeline.train.engine import library; library(torch.device('cpu'))"
    there = modules(f"{engine}; print(*sys.modules); import mlflow")
    assert "deepspeed" in there and "mlflow" not in there


def modules(code: str) -> list[str]:
    """What a Python prints that runs the code."""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()
