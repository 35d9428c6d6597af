"""Laws of `jobs/prepare.py`, with a real Ray and a real S3 server."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray import cloudpickle

from shards.build import build, finish, make_shard, parts
from shards.datasets import fashion_mnist, find, known
from shards.image import KEEP, encode
from shards.manifest import INDEX, MANIFEST, Manifest, ShardSet
from shards.recipe import Recipe
from shards.sources import Arrays, Origin, Picture, Pictures, listing
from shards.storage import Folder
from shards.verify import verify
from tests.family import kill_all
from tests.gang import run_job

pytestmark = pytest.mark.timeout(180)
PREPARE = Path(__file__).resolve().parents[1] / "jobs" / "prepare.py"
# Workers cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class Given:
    """Encoded pictures, just as a test says them."""

    data: list[bytes]
    numbers: tuple[int, ...]
    classes = ()

    @property
    def table(self) -> pa.Table:
        keys, labels = [f"p{number:04}" for number in self.numbers], [[number % 3] for number in self.numbers]
        count = len(keys)
        return listing(keys, [0] * count, list(range(count)), [-1] * count, labels)

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, numbers: np.ndarray) -> "Given":
        return replace(self, numbers=tuple(self.numbers[int(number)] for number in numbers))

    def __iter__(self) -> Iterator[Picture]:
        for number in self.numbers:
            yield Picture(f"p{number:04}", self.data[number], (number % 3,))


@dataclass(frozen=True)
class Deadly(Given):
    """Pictures that kill the first process which packs their middle one."""

    flag: str = ""

    def __iter__(self) -> Iterator[Picture]:
        for picture in super().__iter__():
            if picture.key == f"p{len(self.data) // 2:04}" and Folder(self.flag).create("died", b""):
                os.kill(os.getpid(), signal.SIGKILL)
            yield picture


def encoded(count: int, broken: int = 0) -> list[bytes]:
    pixels = np.random.default_rng(1).integers(0, 256, (count, 12, 12), np.uint8)
    return [encode(one)[: 100 if number < broken else None] for number, one in enumerate(pixels)]


def given(count: int, broken: int = 0) -> Given:
    return Given(encoded(count, broken), tuple(range(count)))


def recipe(each: int = 10) -> Recipe:
    return Recipe("test", "all", "none", ("a", "b", "c"), samples_per_shard=each)


def make(to: Path, pictures: Pictures, each: int = 10) -> dict[str, bytes]:
    build(recipe(each), lambda: pictures, Folder(str(to)))
    return contents(to)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def prepare(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python jobs/prepare.py`, on the Ray that this process has joined, if any."""
    if ray.is_initialized():
        environment.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    return run_job("prepare.py", *words, env={**os.environ, **environment})


def without_progress(printed: str) -> str:
    """What a verification has printed, but for lines on its progress, of which a slow one has some."""
    return re.sub(r"^verify .* pictures \(.*\n", "", printed, flags=re.MULTILINE)


# what a build makes


def test_a_set_is_the_same_bytes_whoever_makes_its_shards_in_whatever_order(local_ray: None, tmp_path: Path) -> None:
    by_ray, wanted = make(tmp_path / "a", given(97)), recipe()
    assert sorted(by_ray) == [*(f"{n:06}.tar" for n in range(10)), INDEX, MANIFEST]
    plan = wanted.plan(97)
    for shard in reversed(range(plan.shards)):
        make_shard(shard, given(97).take(plan.numbers(shard)), Folder(str(tmp_path / "b")), KEEP)
    assert {name: data for name, data in by_ray.items() if name.endswith("tar")} == {
        name: data for name, data in contents(tmp_path / "b").items() if name.endswith("tar")
    }


def test_every_picture_is_in_one_shard_or_refused(local_ray: None, tmp_path: Path) -> None:
    make(tmp_path / "a", given(200, broken=2), 30)
    found = ShardSet(str(tmp_path / "a"))
    keys = [row["key"] for shard in range(len(found.counts)) for row in found.rows(shard).to_pylist()]
    assert sorted(keys) == [f"p{number:04}" for number in range(2, 200)]
    assert (found.manifest.samples, found.manifest.refused) == (198, {"truncated": 2})
    assert [found.rows(shard).num_rows for shard in range(len(found.counts))] == found.counts.tolist()


def test_more_than_a_hundredth_refused_fails_the_job_each_time_it_is_run(local_ray: None, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="more than 1% of 200 pictures are refused: 3 truncated"):
            make(tmp_path / "a", given(200, broken=3), 30)
    assert not (tmp_path / "a" / MANIFEST).exists()


def test_a_worker_that_is_killed_changes_nothing(local_ray: None, tmp_path: Path) -> None:
    deadly = Deadly(encoded(40), tuple(range(40)), str(tmp_path / "flag"))
    made = make(tmp_path / "a", deadly)
    assert (tmp_path / "flag" / "died").exists()
    assert made == make(tmp_path / "b", given(40))


def test_what_is_there_is_not_made_again(local_ray: None, tmp_path: Path) -> None:
    def never() -> Pictures:
        raise AssertionError("nobody has to look at the pictures")

    made = make(tmp_path / "a", given(40))
    assert build(recipe(), never, Folder(str(tmp_path / "a"))).samples == 40
    assert contents(tmp_path / "a") == made


@pytest.mark.parametrize("kept", [(), (0, 1, 2), (3,), (0, 1, 2, 3)])
def test_whatever_was_made_before_a_build_ends_as_if_undisturbed(
    local_ray: None, tmp_path: Path, kept: tuple[int, ...]
) -> None:
    wanted, half = recipe(), tmp_path / "half"
    for shard in kept:
        make_shard(shard, given(40).take(wanted.plan(40).numbers(shard)), Folder(str(half)), KEEP)
    half.mkdir(exist_ok=True)
    (Folder(str(half)) / "parts").create("recipe.json", _claim_of(tmp_path, wanted))
    (half / f".000003.tar.{'a' * 32}").write_bytes(b"what a killed writer leaves")
    assert make(half, given(40)) == make(tmp_path / "whole", given(40))


def test_no_set_is_there_before_each_of_its_files_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, plan = Folder(str(tmp_path)), recipe().plan(40)
    for shard in range(plan.shards):
        make_shard(shard, given(40).take(plan.numbers(shard)), target, KEEP)
    draft = Manifest("test/all", recipe().values(), ("a", "b", "c"), (), {}, {})

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", full)
        with pytest.raises(OSError, match="no space left"):
            finish(draft, parts(plan.shards, target), target, 0.01)
    assert not target.exists(MANIFEST)
    finish(draft, parts(plan.shards, target), target, 0.01)
    assert ShardSet(target.url).manifest.samples == 40


def _claim_of(tmp_path: Path, wanted: Recipe) -> bytes:
    """The record that a build makes before its first shard."""

    class Stop(Exception):
        pass

    class Stopping(Given):
        def take(self, numbers: np.ndarray) -> Given:
            raise Stop

    with pytest.raises(Stop):
        build(wanted, lambda: Stopping([], tuple(range(40))), Folder(str(tmp_path / "stopped")))
    return (tmp_path / "stopped" / "parts" / "recipe.json").read_bytes()


def test_a_target_that_holds_anything_else_is_refused_and_left_as_it_is(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"files that are no part of test/all: holiday\.jpg"):
        make(tmp_path / "a", given(40))
    made = make(tmp_path / "b", given(40))
    with pytest.raises(ValueError, match="another shard set: samples_per_shard is 10 there, 20 here"):
        make(tmp_path / "b", given(40), 20)
    assert contents(tmp_path / "a") == {"holiday.jpg": b""} and contents(tmp_path / "b") == made


def test_a_source_that_fails_leaves_nothing_at_the_target(tmp_path: Path) -> None:
    def fails() -> Pictures:
        raise ValueError("no such pictures")

    with pytest.raises(ValueError, match="no such pictures"):
        build(recipe(), fails, Folder(str(tmp_path / "a")))
    assert contents(tmp_path) == {}


# verify


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda to: None, ""),
        (lambda to: _flip(to / "000002.tar", 600), "000002.tar: its digest is not that of the manifest"),
        (lambda to: _flip(to / "000002.tar", -1), "000002.tar: its digest is not that of the manifest"),
        (lambda to: _flip(to / INDEX, 10), "index.parquet: its digest is not that of the manifest"),
        (lambda to: (to / "000001.tar").unlink(), "000001.tar is missing"),
        (lambda to: (to / MANIFEST).unlink(), "manifest.json does not exist"),
    ],
)
def test_verify_finds_every_flipped_byte(
    local_ray: None, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    make(tmp_path / "a", given(40))
    damage(tmp_path / "a")
    found = verify(str(tmp_path / "a"))
    assert found.startswith(f"{tmp_path / 'a'}/{words}") if words else not found


# the command


@pytest.mark.slow
def test_a_job_killed_half_way_and_started_again_equals_an_undisturbed_one(local_ray: None, tmp_path: Path) -> None:
    options = ("--samples-per-shard", "4", "--to")
    _kill_when(
        [PREPARE, "digits", *options, tmp_path / "a"], lambda: _parts(tmp_path / "a" / "digits" / "train800") >= 20
    )
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a" / "digits" / "train800").glob("*.tar")}
    assert 20 <= len(before) < 200 and not (tmp_path / "a" / "digits" / "train800" / MANIFEST).exists()
    finished = [path.stem + ".tar" for path in (tmp_path / "a" / "digits" / "train800" / "parts").glob("0*.parquet")]
    again = prepare("digits", *options, tmp_path / "a")
    assert again.returncode == 0, again.stderr
    assert all((tmp_path / "a" / "digits" / "train800" / name).stat().st_mtime_ns == before[name] for name in finished)
    dataset = find("digits")
    for split in dataset.splits:
        to = Folder(str(tmp_path / "b" / "digits" / split))
        wanted = Recipe("digits", split, dataset.licence, dataset.classes, samples_per_shard=4)
        build(wanted, lambda split=split: dataset.pictures(split, Origin()), to)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def _parts(folder: Path) -> int:
    return len(list((folder / "parts").glob("0*.parquet")))


def _kill_when(command: list[object], ready: Callable[[], bool]) -> None:
    """Start a Python program and kill it, with all that it started, when it is ready for it."""
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    limit = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < limit, "it ended before it could be killed"
        time.sleep(0.002)
    kill_all(process)
    process.communicate()


def test_a_finished_set_is_said_to_be_there_without_a_ray(local_ray: None, tmp_path: Path) -> None:
    dataset = find("digits")
    for split in dataset.splits:
        wanted = Recipe("digits", split, dataset.licence, dataset.classes)
        build(
            wanted,
            lambda split=split: dataset.pictures(split, Origin()),
            Folder(str(tmp_path / "digits" / split)),
        )
    again = prepare("digits", "--to", tmp_path, RAY_ADDRESS="127.0.0.1:1")  # where no Ray is
    assert again.returncode == 0, again.stderr
    assert (
        again.stdout.splitlines()[0] == f"digits/train800: 800 pictures in 1 shards are at {tmp_path}/digits/train800"
    )
    assert "ray" not in again.stderr.lower()


@pytest.mark.slow
def test_a_bucket_gets_the_bytes_that_a_folder_gets(local_ray: None, s3: str, tmp_path: Path) -> None:
    made = prepare("digits", "--to", s3, "--samples-per-shard", "100")
    assert made.returncode == 0, made.stderr
    dataset = find("digits")
    wanted = Recipe("digits", "test", dataset.licence, dataset.classes, samples_per_shard=100)
    build(wanted, lambda: dataset.pictures("test", Origin()), Folder(str(tmp_path)))
    bucket = Folder(f"{s3}/digits/test")
    assert {name: bucket.read(name) for name in bucket.sizes()} == contents(tmp_path)
    assert (bucket / "parts").sizes() == {} and Folder(f"{s3}/digits").folders() == ["test", "train800", "val200"]
    whole = prepare("verify", bucket.url)
    assert (whole.returncode, without_progress(whole.stdout)) == (0, f"{bucket.url} is whole\n"), whole.stderr
    bucket.write("000003.tar", (tmp_path / "000003.tar").read_bytes()[:-1] + b"x")
    wrong = prepare("verify", bucket.url)
    assert wrong.returncode == 1
    damage = f"wrong: {bucket.url}/000003.tar: its digest is not that of the manifest\n"
    assert without_progress(wrong.stdout) == damage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["minst"], f"no data set 'minst'; do you mean mnist? prepare.py --list shows the {len(known())} there are"),
        (["digits"], "--to is missing: the folder or URL for the shard sets"),
        (
            ["digits", "--tu", "x"],
            "no option --tu; there are: --to, --source, --split, --name, --classes, --samples-per-shard, --seed, "
            "--run, --short-side, --format, --quality, --check, --duplicates, --against, --refused-limit, --keep-sound",
        ),
        (["digits", "--to", "nowhere", "--samples-per-shard", "0"], "samples_per_shard is 0; at least 1 is needed"),
        (["--to", "x"], "the data set comes first, then --to; --list shows the data sets"),
        (["verify", "/nowhere"], "there is no shard set at /nowhere: no such folder, or an empty one"),
        (["digits", "--to", "/proc/x"], "cannot write to /proc/x/digits/train800: No such file or directory"),
    ],
)
def test_every_mistake_is_answered_in_one_line(words: list[str], answer: str) -> None:
    ended = prepare(*words)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"error: {answer}\n")


def test_the_list_shows_every_data_set_with_its_licence() -> None:
    lines = prepare("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(known())
    shown = next(line for line in lines if line.startswith("fashion_mnist"))
    assert "train 60,000, test 10,000" in shown and "MIT" in shown


def test_what_is_fetched_from_the_web_is_kept_and_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "x.gz").write_bytes(b"data")

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *words) -> None:
            super().__init__(*words, directory=str(tmp_path / "web"))

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        web, kept = Folder(f"http://127.0.0.1:{server.server_port}"), Folder(str(tmp_path / "kept"))
        with pytest.raises(FileNotFoundError, match=r"/y\.gz does not exist"):
            fashion_mnist.download(web, ["x.gz", "y.gz"], kept)
        server.shutdown()
    fashion_mnist.download(web, ["x.gz"], kept)
    assert kept.read("x.gz") == b"data" and kept.sizes() == {"x.gz": 4}


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="1 keys, 2 pictures and 2 labels"):
        Arrays(["a"], np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.uint8))
