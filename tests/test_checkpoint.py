"""What was saved is read bit for bit, by however many, or is not taken at all."""

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.config import Config, Vit
from pipeline.models.weights import exported
from pipeline.train import checkpoint, parts
from pipeline.train.checkpoint import COMPLETE, Checkpoints, complete, name_of, newest, restore
from pipeline.train.engine import Fragment
from pipeline.world import World
from shards.storage import Folder

pytestmark = pytest.mark.timeout(300)

STATES = ("master", "exp_avg", "exp_avg_sq")
SIZES = (7, 300, 1, 64, 129)
Log = list[str]


class Meeting:
    """Where the processes of a test, which are threads, show each other what each has."""

    def __init__(self, size: int) -> None:
        self.barrier, self.held = Barrier(size, timeout=60), [None] * size
        self.said: Any = None

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.held[rank] = value
        self.barrier.wait()
        held = list(self.held)
        self.barrier.wait()
        return held


class Plain:
    """An engine without a model: parameters of these sizes, whose states laid end to end are cut among processes."""

    def __init__(
        self,
        world: World,
        *,
        seed: int | None = 0,
        sizes: tuple[int, ...] = SIZES,
        cuts: tuple[int, ...] | None = None,
        states: tuple[str, ...] = STATES,
        meeting: Meeting | None = None,
    ) -> None:
        self.world, self.sizes, self.device, self.meeting = world, sizes, torch.device("cpu"), meeting
        total = sum(sizes)
        cuts = cuts or tuple(World(rank, world.size).share(total).start for rank in range(1, world.size))
        self.start, self.end = [0, *cuts, total][world.rank : world.rank + 2]
        draw = torch.Generator().manual_seed(seed or 0)
        whole = {state: torch.randn(total, generator=draw) for state in states}
        self.flat = {k: v if seed is not None else torch.zeros(total) for k, v in whole.items()}
        self.small = {"buffers": {"mean": torch.arange(5.0)}, "extra": {"rows": torch.tensor([3, 1 << 40])}}
        if seed is None:
            self.small = {kind: {k: torch.zeros_like(v) for k, v in held.items()} for kind, held in self.small.items()}
        self.updates = 0 if seed is None else 41
        self.model = nn.Module()
        for number, size in enumerate(sizes):
            self.model.register_parameter(f"p{number}", nn.Parameter(torch.zeros(1, size)))

    def fragments(self) -> list[Fragment]:
        found, first = [], 0
        for number, size in enumerate(self.sizes):
            low, high = max(first, self.start), min(first + size, self.end)
            if low < high:
                found.append(Fragment(f"p{number}", low - first, {k: v[low:high] for k, v in self.flat.items()}))
            first += size
        return found

    def own(self) -> dict[str, Tensor]:
        return {state: values[self.start : self.end] for state, values in self.flat.items()}

    def optimizer_steps(self) -> int:
        return self.updates

    def buffers(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.small["buffers"].items()}

    def extra(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.small["extra"].items()}

    def prepare_restore(self, optimizer_steps: int) -> list[Fragment]:
        self.updates = optimizer_steps
        for values in self.flat.values():
            values.zero_()
        return self.fragments()

    def load_buffers(self, values: dict[str, Tensor]) -> None:
        self.small["buffers"] = values

    def load_extra(self, values: dict[str, Tensor]) -> None:
        self.small["extra"] = values

    def restored(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.gather(self.world.rank, value) if self.meeting else [value]

    def agree(self, value: Any) -> Any:
        if not self.meeting:
            return value
        if self.world.first:
            self.meeting.said = value
        self.meeting.barrier.wait()
        return self.meeting.said


def same(ours: Plain, theirs: Plain) -> bool:
    """Whether what one process has is what another engine has there, bit for bit."""
    there = {state: values[ours.start : ours.end] for state, values in theirs.flat.items()}
    small = all(torch.equal(v, ours.small[kind][k]) for kind, held in theirs.small.items() for k, v in held.items())
    return all(torch.equal(v, there[k]) for k, v in ours.own().items()) and small and ours.updates == theirs.updates


def every(steps: int) -> Callable[[int], bool]:
    """After so many steps, and again after as many."""
    return Config("tiny", 3, milestone_every=steps).is_milestone


def save_all(folder: Folder, step: int, size: int, *, seed: int = 0, attempt: str = "one", **more: Any) -> None:
    """A checkpoint by so many processes; `more` goes to the engines or the checkpoints."""
    names = ("keep", "milestone", "export", "owned")
    of_engine = {name: value for name, value in more.items() if name not in names}
    of_saving = {"keep": 2, **{name: value for name, value in more.items() if name in names}}
    saving = [Checkpoints(folder, World(rank, size), attempt, **of_saving) for rank in range(size)]
    for rank, one in enumerate(saving):
        one.save(step, Plain(World(rank, size), seed=seed, **of_engine), lambda: {"metrics": [step]})
    for one in saving:
        one.wait()


def read_all(folder: Folder, step: int, size: int, **of_engine: Any) -> list[Plain]:
    engines = [Plain(World(rank, size), seed=None, **of_engine) for rank in range(size)]
    for engine in engines:
        restore(folder, step, engine)
    return engines


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "CHUNK", 256)
    monkeypatch.setattr(parts, "PAGE", 64)


@st.composite
def _splits(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes of parameters, and where two worlds cut them; a process may have nothing."""
    sizes = tuple(draw(st.lists(st.integers(1, 90), min_size=1, max_size=5)))
    cuts = st.lists(st.integers(0, sum(sizes)), max_size=4).map(lambda found: tuple(sorted(found)))
    return sizes, draw(cuts), draw(cuts)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(split=_splits())
def test_whatever_number_saved_every_number_reads_bit_for_bit(
    small_chunks: None, tmp_path_factory: pytest.TempPathFactory, split: tuple[tuple[int, ...], ...]
) -> None:
    sizes, written, read = split
    folder = Folder(str(tmp_path_factory.mktemp("split")))
    save_all(folder, 7, len(written) + 1, sizes=sizes, cuts=written)
    quiet = Plain(World(), sizes=sizes)
    assert all(same(engine, quiet) for engine in read_all(folder, 7, len(read) + 1, sizes=sizes, cuts=read))


def test_every_checkpoint_in_a_bucket_is_as_in_a_folder(s3: str) -> None:
    folder, made = Folder(s3), []
    kwargs = {"milestone": every(7), "export": lambda step, weights: made.append((step, weights))}
    for step in (7, 8, 9):
        save_all(folder, step, 2, seed=step, **kwargs)
    assert complete(folder) == [8, 9] and [step for step, _ in made] == [7]
    assert all(same(engine, Plain(World(), seed=9)) for engine in read_all(folder, 9, 3))
    assert (folder / "checkpoints").folders() == [name_of(8), name_of(9)]


def test_every_part_is_a_safetensors_file(folder: Folder) -> None:
    save_all(folder, 7, 2)
    whole = Plain(World()).flat["exp_avg"]
    for rank, (low, high) in enumerate([(0, 7), (250, 301)]):
        (path,) = Path(folder.absolute).glob(f"checkpoints/step-00000007/part-{rank:05}*.safetensors")
        with safe_open(path, framework="pt") as file:
            name = "exp_avg/p0" if rank == 0 else "exp_avg/p1"
            held = file.get_tensor(name)
            assert torch.equal(held, whole[low:high] if rank == 0 else whole[250:307][: len(held)])


# Damage


def flip(path: Path, place: int) -> bytes:
    """Change a bit; returns what the file held."""
    before = path.read_bytes()
    after = bytearray(before)
    after[place] ^= 1 << (place % 8)
    path.write_bytes(after)
    return before


@pytest.mark.slow
def test_every_flipped_byte_of_every_file_is_seen_before_its_values_are_used(
    small_chunks: None, folder: Folder
) -> None:
    sizes = (5, 40)
    save_all(folder, 7, 2, sizes=sizes)
    right, refused = Plain(World(), sizes=sizes), 0
    for path in sorted((Path(folder.absolute) / "checkpoints/step-00000007").iterdir()):
        used = path.suffix == ".safetensors" or path.name == COMPLETE
        # Where tensors are, the record says, and nobody has to ask the file's own header.
        header = int.from_bytes(path.read_bytes()[:8], "little") + 8 if path.name.startswith("part-") else 0
        for place in range(path.stat().st_size):
            before, engine = flip(path, place), Plain(World(), seed=None, sizes=sizes)
            try:
                restore(folder, 7, engine)
                assert same(engine, right) and (place < header or not used)
            except parts.Damaged as error:
                assert used and path.name in str(error)
                refused += 1
            for state, values in engine.flat.items():
                assert bool(((values == 0) | (values == right.flat[state])).all()), (path, place)
            path.write_bytes(before)
    assert refused > 1000 and same(read_all(folder, 7, 1, sizes=sizes)[0], right)


def _flipped(place: Path) -> str:
    path = next(place.glob("part-00001*.safetensors"))
    flip(path, path.stat().st_size - 1)
    return rf"part-00001\.one\.1\.safetensors: chunk {(path.stat().st_size - 1) // 256} has another digest"


def _truncated(place: Path) -> str:
    path = next(place.glob("part-00001*.safetensors"))
    os.truncate(path, path.stat().st_size // 2)
    return r"part-00001\.one\.1\.safetensors: chunk \d+ has another digest"


def _without_part(place: Path) -> str:
    next(place.glob("part-00000*.safetensors")).unlink()
    return r"part-00000\.one\.1\.safetensors: it is not there"


def _unreadable(place: Path) -> str:
    (place / COMPLETE).write_bytes(b'{"sha256": "')
    return "complete.json: it cannot be read"


def _without_buffers(place: Path) -> str:
    next(place.glob("buffers*")).unlink()
    return r"buffers\.one\.1\.safetensors: it is not there"


DAMAGES = [_flipped, _truncated, _without_part, _unreadable, _without_buffers]


def together(folder: Folder, size: int) -> tuple[list[Any], list[Plain], Log]:
    """What `newest` gives to each of several processes, or the error; their engines; and what was said."""
    meeting, said = Meeting(size), Log()
    engines = [Plain(World(rank, size), seed=None, meeting=meeting) for rank in range(size)]
    given: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            given[rank] = newest(folder, World(rank, size), engines[rank], said.append)
        except ValueError as error:
            given[rank] = error

    threads = [Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given, engines, said


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_the_one_before_is_taken_by_every_process_and_it_is_said(
    small_chunks: None, folder: Folder, damage: Callable[[Path], str]
) -> None:
    for step in (600, 700):
        save_all(folder, step, 2, seed=step)
    what = damage(Path(folder.absolute) / "checkpoints/step-00000700")
    given, engines, said = together(folder, 3)
    assert [(step, record["metrics"]) for step, record in given] == [(600, [600])] * 3
    assert all(same(engine, Plain(World(), seed=600)) for engine in engines)
    assert len(said) == 1
    expected = rf"checkpoint step-00000700 is damaged \({what}.*\): going on from step-00000600"
    assert re.fullmatch(expected, said[0]), said
    assert complete(folder) == [600] and together(folder, 2)[2] == []
    save_all(folder, 650, 2, attempt="two")
    save_all(folder, 700, 2, seed=700, attempt="two")
    given, engines, _ = together(folder, 1)
    assert given[0][0] == 700 and same(engines[0], Plain(World(), seed=700)) and complete(folder) == [650, 700]


def test_a_run_never_starts_from_scratch_where_every_checkpoint_is_damaged_or_gone(folder: Folder) -> None:
    assert newest(folder, World(), Plain(World(), seed=None), print) == (0, {})
    for step in (600, 700):
        save_all(folder, step, 1)
        flip(next((Path(folder.absolute) / "checkpoints" / name_of(step)).glob("part-00000*.safetensors")), 5000)
    for _ in range(2):
        given, _, said = together(folder, 2)
        assert not said
        for error in given:
            assert isinstance(error, ValueError)
            assert "no whole checkpoint" in str(error) and "step-00000600" in str(error)
            assert "step-00000700 is damaged (part-00000" in str(error)
    for step in (600, 700):
        (folder / "checkpoints").remove(name_of(step))
    with pytest.raises(
        ValueError, match=r"are gone, though checkpoints/newest.json names step-00000600, step-00000700"
    ):
        newest(folder, World(), Plain(World(), seed=None), print)


def test_a_checkpoint_of_another_model_or_a_newer_version_is_refused_and_not_passed_over(folder: Folder) -> None:
    save_all(folder, 6, 1)
    save_all(folder, 7, 1)
    with pytest.raises(ValueError, match="it is of another model"):
        newest(folder, World(), Plain(World(), seed=None, sizes=(8, 300, 2)), print)
    place = Path(folder.absolute) / "checkpoints/step-00000007" / COMPLETE
    record = json.loads(place.read_bytes())
    del record["sha256"]
    place.write_bytes(checkpoint._sealed({**record, "format": 3}))
    with pytest.raises(ValueError, match="step-00000007 has format 3; this version reads up to 2"):
        newest(folder, World(), Plain(World(), seed=None), print)
    assert complete(folder) == [6, 7]


def test_every_checkpoint_of_format_1_is_still_read(folder: Folder) -> None:
    place, files = folder / "checkpoints/step-00000005", []
    Path(place.absolute).mkdir(parents=True)
    for rank in range(2):
        fragments = Plain(World(rank, 2)).fragments()
        tensors = {f"{state}/{f.parameter}": f.states[state] for f in fragments for state in STATES}
        header, offset = {}, 0
        for name, tensor in tensors.items():
            end = offset + tensor.numel() * 4
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        data = len(text).to_bytes(8, "little") + text + b"".join(t.numpy().tobytes() for t in tensors.values())
        name, held = f"part-{rank:05}.old.safetensors", {f.parameter: [f.start, f.length] for f in fragments}
        place.write(name, data)
        files.append({"file": name, "fragments": held, "sha256": sha256(data).hexdigest(), "bytes": len(data)})
    data = save(Plain(World()).buffers())
    place.write("buffers.old.safetensors", data)
    about = {"file": "buffers.old.safetensors", "sha256": sha256(data).hexdigest()}
    record = {"format": 1, "step": 5, "optimizer_steps": 41, "parts": 2, "buffers": about, "metrics": [5]}
    place.write(COMPLETE, json.dumps({**record, "files": files}).encode())
    right = Plain(World())
    right.small["extra"] = {}
    assert all(same(engine, right) for engine in read_all(folder, 5, 3))
    flip(Path(place.absolute) / "part-00001.old.safetensors", len(data) // 2)
    with pytest.raises(parts.Damaged, match=r"part-00001.old.safetensors is damaged: chunk 0"):
        read_all(folder, 5, 1)


# Killed


def dying(folder: str, point: int) -> None:
    """Complete step 6, then save step 7 and end by SIGKILL at the `point`-th thing that is done to the disk."""
    os.setpgrp()
    parts.CHUNK, parts.PAGE = 2048, 512
    save_all(Folder(folder), 6, 2, seed=6, keep=1)
    left = point

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*given, **named)

        return counting

    for name in ("pwrite", "fsync", "ftruncate", "replace", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    save_all(Folder(folder), 7, 2, seed=7, keep=1)


@pytest.mark.slow
def test_whenever_a_writer_is_killed_what_is_left_is_never_taken_or_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_checkpoint"])
    taken: list[int] = []
    for point in range(200):
        folder = Folder(str(tmp_path / str(point)))
        process = context.Process(target=dying, args=(folder.absolute, point))
        process.start()
        process.join(60)
        said = Log()
        engine = Plain(World(), seed=None)
        step, _ = newest(folder, World(), engine, said.append)
        assert not said and same(engine, Plain(World(), seed=step)), f"at {point}"
        taken.append(step)
        save_all(folder, 8, 1, seed=8, attempt="later", keep=1)
        assert (folder / "checkpoints").folders() == [name_of(8)], "what a killed start left is still there"
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert taken[0] == 6 and taken[-1] == 7 and {6, 7} == {*taken} and len(taken) > 20


# Reading


def test_no_process_reads_more_than_its_part_and_the_borders_of_chunks(
    small_chunks: None, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (2000, 3000, 1000)
    save_all(folder, 7, 4, sizes=sizes)
    read, original = [0], Folder.read

    def counting(self: Folder, name: str, start: int | None = None, end: int | None = None) -> bytes:
        data = original(self, name, start, end)
        read[0] += len(data) if name.startswith("part-") else 0
        return data

    monkeypatch.setattr(Folder, "read", counting)
    for size in (1, 2, 3, 8):
        for rank in range(size):
            engine, read[0] = Plain(World(rank, size), seed=None, sizes=sizes), 0
            restore(folder, 7, engine)
            overlapped = 4 // size + 2
            own = sum(values.numel() * 4 for values in engine.own().values())
            assert own <= read[0] <= own + overlapped * len(STATES) * 2 * 256, (rank, size)


# Saving


def test_what_is_written_is_the_state_at_the_save_whatever_becomes_of_it_meanwhile(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    may, write, memory = Event(), parts.Image.write, set()

    def waiting(image: parts.Image, path: Path) -> list[str]:
        assert may.wait(60)
        memory.add(image._memory.data_ptr())
        return write(image, path)

    monkeypatch.setattr(parts.Image, "write", waiting)
    checkpoints, engine = Checkpoints(folder, World(), "one", keep=2), Plain(World())
    for step in (7, 8):
        kept = Plain(World(), seed=step)
        for state, values in engine.flat.items():
            values.copy_(kept.flat[state])
        checkpoints.save(step, engine, dict)
        for values in engine.flat.values():
            values.add_(1.0)
        engine.small["buffers"]["mean"] += 1.0
        engine.small["buffers"]["mean"] -= 1.0
        may.set()
        checkpoints.wait()
        assert same(read_all(folder, step, 1)[0], kept)
        may.clear()
    assert len(memory) == 1, "each save has memory of its own"


def test_a_checkpoint_is_the_same_byte_for_byte_where_training_waits_for_it(
    folder: Folder, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for beside in (True, False):
        place = folder / str(beside)
        checkpoints, engine = Checkpoints(place, World(), "one", keep=2, beside=beside), Plain(World(), seed=5)
        checkpoints.save(7, engine, dict)
        if beside:
            checkpoints.wait()
        (part,) = [name for name in (place / "checkpoints/step-00000007").sizes() if name.startswith("part-")][1:]
        written.append((place / "checkpoints/step-00000007").read(part))
        assert same(read_all(place, 7, 1)[0], engine)
    assert written[0] == written[1] and len(written[0]) > 2 * 256


def test_a_late_listing_hides_no_checkpoint(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "folders", lambda self: [])
    monkeypatch.setattr(Folder, "sizes", lambda self: {})
    for step in (6, 7, 8):
        save_all(folder, step, 2, seed=step)
        assert complete(folder)[-1] == step
    engine = Plain(World(), seed=None)
    assert newest(folder, World(), engine, print)[0] == 8 and same(engine, Plain(World(), seed=8))
    monkeypatch.undo()
    assert (folder / "checkpoints").folders() == [name_of(7), name_of(8)]


def test_every_save_leaves_the_newest_and_nothing_of_killed_starts_or_abandoned_steps(folder: Folder) -> None:
    checkpoints = folder / "checkpoints"
    checkpoints.write("step-00000003/part-00000.dead.1.safetensors", b"half")
    checkpoints.write("step-00000009/part-00000.dead.1.safetensors", b"half")
    checkpoints.write("notes/mine", b"kept")
    for step in (4, 5, 6, 7):
        save_all(folder, step, 1)
    checkpoints.write("step-00000006/part-00000.dead.1.safetensors", b"half")
    assert complete(folder) == [6, 7]
    assert checkpoints.folders() == ["notes", name_of(6), name_of(7), name_of(9)]  # 9 may be being written
    save_all(folder, 6, 1, attempt="back")  # went back to 5 and left out what came after
    assert complete(folder) == [6]
    assert all(".back.1." in name or name == COMPLETE for name in (checkpoints / name_of(6)).sizes())
    save_all(folder, 10, 1)
    assert checkpoints.folders() == ["notes", name_of(6), name_of(10)]


def test_a_start_that_has_lost_the_run_completes_and_removes_nothing(folder: Folder) -> None:
    save_all(folder, 6, 1)
    with pytest.raises(RuntimeError, match="another start of this run has taken over"):
        save_all(folder, 7, 1, keep=1, owned=lambda: False)
    assert complete(folder) == [6]


def test_what_goes_wrong_in_writing_is_raised_by_the_next_save_and_the_one_before_stays(folder: Folder) -> None:
    checkpoints = Checkpoints(folder, World(), "one", keep=1)
    checkpoints.save(6, Plain(World()), dict)
    checkpoints.wait()
    (Path(folder.absolute) / "checkpoints" / name_of(7)).write_text("a file is in the way")
    checkpoints.save(7, Plain(World()), dict)
    with pytest.raises(OSError, match=r"a checkpoint could not be written .*; the one before it stays usable"):
        checkpoints.save(8, Plain(World()), dict)
    assert complete(folder) == [6] and same(read_all(folder, 6, 1)[0], Plain(World()))


# Milestones


@pytest.mark.parametrize("states", [STATES, ("master", "momentum_buffer"), (*STATES, "average")])
def test_every_milestone_stays_and_is_the_model_whatever_the_processes(folder: Folder, states: tuple[str, ...]) -> None:
    model = Vit(width=16, depth=1, heads=2, hidden=32, patch=4, image_size=12)

    def export(step: int, weights: dict[str, Tensor]) -> None:
        half = [0.5] * 3
        exported.put(
            folder / "milestones" / name_of(step), weights, model, 3, mean=half, std=half, metrics={"steps": step}
        )

    for step in (0, 4, 5, 6, 7, 8):
        save_all(folder, step, 3, seed=step, keep=1, milestone=every(2), export=export, states=states)
    assert complete(folder) == [8]
    assert (folder / "milestones").folders() == [name_of(step) for step in (4, 6, 8)]
    for step in (4, 6, 8):
        found = exported.find(f"{folder.absolute}/milestones/{name_of(step)}")
        assert found.about["metrics"] == {"steps": step} and asdict(found.config) == asdict(model)
        whole = Plain(World(), seed=step, states=states).flat["average" if "average" in states else "master"]
        weights = found.weights()
        assert torch.equal(weights.pop("mean"), torch.arange(5.0))
        assert {k: w.shape for k, w in weights.items()} == {f"p{i}": (1, size) for i, size in enumerate(SIZES)}
        assert torch.equal(torch.cat([weights[f"p{number}"].flatten() for number in range(len(SIZES))]), whole)


def test_no_checkpoint_is_complete_before_its_milestone_is(folder: Folder) -> None:
    def export(step: int, weights: dict[str, Tensor]) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_all(folder, 8, 2, milestone=every(4), export=export)
    assert complete(folder) == []
