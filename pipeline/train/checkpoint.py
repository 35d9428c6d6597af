"""Checkpoints that any number of processes can read, of which only whole ones count.

`step-00000700/` holds one safetensors file a process (`parts.py`: stretches of parameters and of the optimizer's
state, laid flat), beside each a record of what is in it with the digests of its chunks, what all processes have alike
(`buffers.*`, `extra.*`), and, written last by process 0, `complete.json` with all the records. Each record begins with
its own digest. Writing goes on beside the training: it begins with a copy of the state, and all else is another
thread's.
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.optim.optimizers import AVERAGE, MASTER
from pipeline.train.engine import Fragment
from pipeline.train.parts import Damaged, Image, fill, of_format_1
from pipeline.world import World
from shards.storage import Folder

FORMAT = 2
CHECKPOINTS = "checkpoints"
COMPLETE = "complete.json"
SET_ASIDE = "damaged.json"
NEWEST = "newest.json"
PARTS_SECONDS = 900.0
POLL_SECONDS = 0.05

_SEAL = b'{"sha256": "'

Export = Callable[[int, dict[str, Tensor]], None]


class TakenOver(RuntimeError):
    """The run's folder is another start's by now."""

    def __init__(self) -> None:
        super().__init__("another start of this run has taken over")


class Stateful(Protocol):
    """What a checkpoint asks of an engine; `Engine` says what each of these does."""

    @property
    def model(self) -> nn.Module: ...
    def fragments(self) -> list[Fragment]: ...
    def optimizer_steps(self) -> int: ...
    def buffers(self) -> dict[str, Tensor]: ...
    def extra(self) -> dict[str, Tensor]: ...
    def prepare_restore(self, optimizer_steps: int) -> list[Fragment]: ...
    def load_buffers(self, values: dict[str, Tensor]) -> None: ...
    def load_extra(self, values: dict[str, Tensor]) -> None: ...
    def restored(self) -> None: ...
    def agree(self, value: Any) -> Any: ...
    def gather(self, value: Any) -> list[Any]: ...


def name_of(step: int) -> str:
    """The folder of the checkpoint or milestone after `step` steps."""
    return f"step-{step:08}"


def complete(folder: Folder) -> list[int]:
    """Steps of the complete checkpoints in a run's folder, in order; also those that a listing does not show yet."""
    checkpoints = folder / CHECKPOINTS
    known = {*_listed(checkpoints), *_noted(checkpoints)}
    return sorted(step for step in known if checkpoints.exists(f"{name_of(step)}/{COMPLETE}"))


def newest(folder: Folder, world: World, engine: Stateful, say: Callable[[str], None]) -> tuple[int, dict[str, Any]]:
    """Put the newest undamaged checkpoint into the engine; returns its step and record, 0 and {} where there is none.

    Every process has to call, and all take the same one. Process 0 says which damaged ones were passed over, and
    takes their completion records aside. ValueError names all where none is whole.
    """
    damaged: dict[int, str] = {}
    for step in reversed(engine.agree(_candidates(folder) if world.first else [])):
        record, problem = {}, ""
        try:
            record = _fill_engine(folder, step, engine)
        except Damaged as error:
            problem = error.detail
        if problem := next(filter(None, engine.gather(problem)), ""):
            damaged[step] = f"checkpoint {name_of(step)} is damaged ({problem})"
            continue
        engine.restored()  # together, and so not before all have found it whole
        for passed, what in damaged.items() if world.first else ():
            say(f"{what}: going on from {name_of(step)}")
            _set_aside(folder / CHECKPOINTS / name_of(passed))
        return step, record
    if damaged:
        raise ValueError(f"{folder.absolute} has no whole checkpoint: {'; '.join(damaged.values())}")
    return 0, {}


def restore(folder: Folder, step: int, engine: Stateful) -> dict[str, Any]:
    """Put the state after `step` steps into the engine; returns its completion record.

    A process reads no more than the chunks that hold something of its own. `Damaged` names a file that is; ValueError
    a checkpoint of another model or a newer version.
    """
    record = _fill_engine(folder, step, engine)
    engine.restored()
    return record


def _fill_engine(folder: Folder, step: int, engine: Stateful) -> dict[str, Any]:
    """What `restore` does in each process by itself."""
    place = folder / CHECKPOINTS / name_of(step)
    record = _completion(place)
    wanted = engine.prepare_restore(record["optimizer_steps"])
    filled = sum(fill(place, part, wanted) for part in record["files"])
    needed = sum(values.numel() for fragment in wanted for values in fragment.states.values())
    if filled != needed:
        raise ValueError(f"{place.absolute} holds {filled:,} of {needed:,} numbers: it is of another model")
    for kind, take in (("buffers", engine.load_buffers), ("extra", engine.load_extra)):
        about = record["alike"].get(kind)
        take(_alike(place, about) if about else {})
    return record


@dataclass(frozen=True)
class _Begun:
    """What a save keeps beside the image: taken while training waits."""

    step: int
    word: str
    """Of this save's files alone."""
    optimizer_steps: int
    alike: dict[str, dict[str, Tensor]]
    shapes: dict[str, torch.Size]
    ask: Callable[[], dict[str, Any]]


class Checkpoints:
    """The checkpoints of a run, seen by one of its processes.

    `attempt` is one word for all processes of one start of the run: what a start that died has left is never taken
    for a part of a later one's checkpoint. `keep` is how many complete ones stay. `owned` says whether the run's folder
    still is this start's: when it is not, nothing is completed or removed any more. Where `milestone` says so of the
    steps, process 0 gives `export` them and the whole weights (their moving average where there is one) with the
    buffers. Without `beside` nothing is copied, and training waits until a checkpoint is written.
    """

    def __init__(
        self,
        folder: Folder,
        world: World,
        attempt: str,
        *,
        keep: int,
        milestone: Callable[[int], bool] = lambda step: False,
        export: Export | None = None,
        owned: Callable[[], bool] = lambda: True,
        beside: bool = True,
    ) -> None:
        self.folder, self.world, self.attempt, self.keep = folder, world, attempt, keep
        self.milestone, self.export, self.owned, self.beside = milestone, export, owned, beside
        self._saves = 0
        self._image: Image | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, engine: Stateful, extra: Callable[[], dict[str, Any]]) -> None:
        """Begin to write the state after `step` steps; `extra` is asked, by process 0, for what else to keep.

        Returns when the state is copied, into memory that all saves share, or, if not `beside`, written. Waits for the
        one before, and raises what went wrong with it.
        """
        self.wait()
        fragments = engine.fragments()
        if self._image is None or not self._image.fits(fragments):
            self._image = None  # before there is memory for another
            self._image = Image(fragments, whole=self.beside)
        self._image.take(fragments)
        self._saves += 1
        first = self.world.first
        begun = _Begun(
            step,
            word=f"{self.attempt}.{self._saves}",
            optimizer_steps=engine.optimizer_steps(),
            alike={"buffers": engine.buffers(), "extra": engine.extra()} if first else {},
            shapes=_shapes(engine.model) if first else {},
            ask=extra,
        )
        self._writing = self._thread.submit(self._write, self._image, begun)
        if not self.beside:
            self.wait()

    def wait(self) -> None:
        """Return when what was begun is written, or raise what went wrong."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except OSError as error:
                why = f"a checkpoint could not be written ({error.strerror or error}); the one before it stays usable"
                raise OSError(error.errno, why, self.folder.absolute) from error

    def _write(self, image: Image, begun: _Begun) -> None:
        place = self.folder / CHECKPOINTS / name_of(begun.step)
        name = f"part-{self.world.rank:05}.{begun.word}"
        digests = _written(image, place, f"{name}.safetensors")
        place.write(f"{name}.json", _sealed(image.record(f"{name}.safetensors", digests)))
        if self.world.first:
            self._complete(place, begun)

    def _complete(self, place: Folder, begun: _Begun) -> None:
        """Write what there is once, and last that the checkpoint is whole."""
        alike: dict[str, Any] = {}
        for kind, tensors in begun.alike.items():
            if tensors:
                data, name = save(tensors), f"{kind}.{begun.word}.safetensors"
                place.write(name, data)
                alike[kind] = {"file": name, "sha256": sha256(data).hexdigest()}
        files = self._all_parts(place, begun.word)
        if self.milestone(begun.step):
            # First, so that a complete checkpoint, from which a run goes on, never lacks its milestone.
            self._check_owned()
            _milestone(place, files, begun, self.export)
        about = {"format": FORMAT, "step": begun.step, "optimizer_steps": begun.optimizer_steps}
        record = {**about, "parts": self.world.size, "alike": alike, **begun.ask(), "files": files}
        self._check_owned()
        place.write(COMPLETE, _sealed(record))
        self._forget_old(begun)

    def _check_owned(self) -> None:
        if not self.owned():
            raise TakenOver

    def _all_parts(self, place: Folder, word: str) -> list[dict[str, Any]]:
        """The records of all processes, as soon as each has written its own.

        Each is asked for by its name: a listing may come late.
        """
        limit = time.monotonic() + PARTS_SECONDS
        found: list[dict[str, Any]] = []
        while len(found) < self.world.size:
            name = f"part-{len(found):05}.{word}.json"
            try:
                found.append(_unsealed(place, name))
            except FileNotFoundError as error:
                if time.monotonic() > limit:
                    raise TimeoutError(f"{place.absolute}/{name} is not there after {PARTS_SECONDS:g} s") from error
                time.sleep(POLL_SECONDS)
        return found

    def _forget_old(self, begun: _Begun) -> None:
        """Remove all but the newest, what killed starts have left, and complete ones that this start went back behind.

        What counts goes first, so that none is ever half there and counted.
        """
        checkpoints, step = self.folder / CHECKPOINTS, begun.step
        known = sorted({*complete(self.folder), step})
        kept = [other for other in known if other <= step][-self.keep :]
        checkpoints.write(NEWEST, _sealed({"steps": kept}))
        for old in {*_listed(checkpoints), *known} - {*kept}:
            if old < step or old in known:
                checkpoints.remove(f"{name_of(old)}/{COMPLETE}")
                checkpoints.remove(name_of(old))
        place = checkpoints / name_of(step)
        for name in place.sizes():
            if f".{begun.word}." not in name and name != COMPLETE:
                place.remove(name)


def _written(image: Image, place: Folder, name: str) -> list[str]:
    """Put a part into its place, durably; returns the digests of its chunks."""
    if not place.local:
        with tempfile.TemporaryDirectory() as aside:
            digests = image.write(Path(aside) / name)
            place.put(Path(aside) / name, name)
        return digests
    place.local.mkdir(parents=True, exist_ok=True)
    digests = image.write(place.local / name)
    folder = os.open(place.local, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)
    return digests


def _milestone(place: Folder, files: list[dict[str, Any]], begun: _Begun, export: Export | None) -> None:
    """Hand on the whole weights, put together from the parts as they were written."""
    assert export, "milestones need somebody who writes them"
    state = AVERAGE if any(AVERAGE in part["tensors"] for part in files) else MASTER
    whole = [Fragment(name, 0, {state: torch.zeros(shape.numel())}) for name, shape in begun.shapes.items()]
    filled = sum(fill(place, part, whole) for part in files)
    assert filled == sum(shape.numel() for shape in begun.shapes.values()), "the parts do not hold all of the weights"
    weights = {f.parameter: f.states[state].view(begun.shapes[f.parameter]) for f in whole}
    buffers = begun.alike["buffers"].items()
    export(
        begun.step, weights | {name: value.float() if value.is_floating_point() else value for name, value in buffers}
    )


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of the whole parameters; where ZeRO 3 has taken one apart, DeepSpeed keeps its shape beside it."""
    return {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def _listed(checkpoints: Folder) -> list[int]:
    """Steps that have a folder, complete or not."""
    found = (re.fullmatch(r"step-(\d{8,})", name) for name in checkpoints.folders())
    return [int(match[1]) for match in found if match]


def _noted(checkpoints: Folder) -> list[int]:
    """Steps that were complete when the last one was completed, whatever a listing shows."""
    try:
        return _unsealed(checkpoints, NEWEST)["steps"]
    except (FileNotFoundError, Damaged):
        return []


def _candidates(folder: Folder) -> list[int]:
    """Steps of the complete checkpoints; ValueError where there were some that are all gone."""
    found, checkpoints = complete(folder), folder / CHECKPOINTS
    if not found and (gone := _noted(checkpoints)):
        raise ValueError(
            f"the checkpoints of {folder.absolute} are gone, though {CHECKPOINTS}/{NEWEST} names "
            f"{', '.join(map(name_of, gone))}: bring them back, or remove {NEWEST} to start from the beginning"
        )
    return found


def _completion(place: Folder) -> dict[str, Any]:
    """The record of a complete checkpoint, in the form of today's format."""
    try:
        record = _unsealed(place, COMPLETE)
    except FileNotFoundError as error:
        raise Damaged(place, COMPLETE, "it is not there") from error
    if record["format"] > FORMAT:
        raise ValueError(f"{place.absolute} has format {record['format']}; this version reads up to {FORMAT}")
    if record["format"] == 1:
        alike = {"buffers": record["buffers"]} if "buffers" in record else {}
        return {**record, "alike": alike, "files": [of_format_1(part) for part in record["files"]]}
    return record


def _alike(place: Folder, about: dict[str, Any]) -> dict[str, Tensor]:
    """What all processes have alike."""
    try:
        data = place.read(about["file"])
    except FileNotFoundError as error:
        raise Damaged(place, about["file"], "it is not there") from error
    if sha256(data).hexdigest() != about["sha256"]:
        raise Damaged(place, about["file"], "it has another digest than the recorded one")
    return load(data)


def _set_aside(place: Folder) -> None:
    """Make a damaged checkpoint count no more; what it said of itself stays to be looked at."""
    try:
        place.write(SET_ASIDE, place.read(COMPLETE))
    except FileNotFoundError:
        return
    place.remove(COMPLETE)


def _sealed(record: dict[str, Any]) -> bytes:
    """A record as JSON whose first field is the digest of all that follows."""
    body = json.dumps(record).encode()
    return _SEAL + sha256(body).hexdigest().encode() + b'", ' + body[1:]


def _unsealed(place: Folder, name: str) -> dict[str, Any]:
    """What was sealed; `Damaged` if it is not as it was. Records of other formats may have no seal."""
    data = place.read(name)
    try:
        record = json.loads(data)
        if data.startswith(_SEAL):
            found, body = data[len(_SEAL) :][:64], b"{" + data[len(_SEAL) + 64 + len(b'", ') :]
            whole = sha256(body).hexdigest().encode() == found
        else:
            whole = record["format"] == 1 or record["format"] > FORMAT
    except (ValueError, KeyError, TypeError):
        whole, record = False, {}
    if not whole:
        raise Damaged(place, name, "it cannot be read, or has another digest than its own")
    return record
