"""Checkpoints that any number of processes can read, of which only whole ones count.

`step-00000700/` holds one safetensors file a process (stretches of parameters and of AdamW's moments, laid flat),
beside each a record of what is in it with its digest, where the model keeps running means `buffers.*.safetensors`, and,
written last by process 0, `complete.json` with all the records. Writing goes on beside the training: it begins with a
copy of the state, and all else is another thread's.
"""

import json
import os
import struct
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from pipeline.train.engine import STATES, Engine, Fragment
from pipeline.world import World
from shards.storage import Folder, digest

FORMAT = 1
COMPLETE = "complete.json"
PARTS_SECONDS = 900.0


def name_of(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"step-{step:08}"


def complete(folder: Folder) -> list[int]:
    """Steps of the complete checkpoints in a run's folder, in order."""
    names = (folder / "checkpoints").folders()
    return sorted(
        int(name.removeprefix("step-"))
        for name in names
        if name.startswith("step-") and folder.exists(f"checkpoints/{name}/{COMPLETE}")
    )


class Checkpoints:
    """The checkpoints of a run, seen by one of its processes.

    `attempt` is one word for all processes of one start of the run: what a start that died has left is never taken
    for a part of a later one's checkpoint.
    """

    def __init__(self, folder: Folder, world: World, attempt: str, *, keep: int) -> None:
        self.folder, self.world, self.attempt, self.keep = folder, world, attempt, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, engine: Engine, extra: Callable[[], dict[str, Any]]) -> None:
        """Begin to write the state after `step` steps; `extra` is asked, by process 0, for what else to keep.

        Waits for the one before, and raises what went wrong with it.
        """
        self.wait()
        copies = [
            Fragment(f.parameter, f.start, {k: _copy(v) for k, v in f.states.items()}) for f in engine.fragments()
        ]
        about = {"format": FORMAT, "step": step, "optimizer_steps": engine.optimizer_steps(), "parts": self.world.size}
        buffers = engine.buffers() if self.world.first else {}
        self._writing = self._thread.submit(self._write, step, copies, buffers, about, extra)

    def wait(self) -> None:
        """Return when what was begun is written, or raise what went wrong."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except OSError as error:
                why = f"a checkpoint could not be written ({error.strerror or error}); the one before it stays usable"
                raise OSError(error.errno, why, self.folder.absolute) from error

    def restore(self, step: int, engine: Engine) -> dict[str, Any]:
        """Put the state after `step` steps into the engine; returns its completion record.

        A process reads only the files that hold something of its own. ValueError names a file that is damaged.
        """
        place = self.folder / "checkpoints" / name_of(step)
        record = json.loads(place.read(COMPLETE))
        if record["format"] > FORMAT:
            raise ValueError(f"{place.absolute} has format {record['format']}; this version reads up to {FORMAT}")
        wanted = engine.prepare_restore(record["optimizer_steps"])
        filled = sum(self._fill_from(place, part, wanted) for part in record["files"])
        needed = sum(fragment.length for fragment in wanted)
        if filled != needed:
            raise ValueError(f"{place.absolute} holds {filled:,} of {needed:,} numbers: it is of another model")
        if "buffers" in record:
            data = place.read(record["buffers"]["file"])
            if sha256(data).hexdigest() != record["buffers"]["sha256"]:
                raise ValueError(f"{place.absolute}/{record['buffers']['file']} is damaged: its digest is another")
            engine.load_buffers(load(data))
        engine.restored()
        return record

    def _fill_from(self, place: Folder, part: dict[str, Any], wanted: list[Fragment]) -> int:
        """Copy what the file holds of the wanted fragments; returns how many numbers of the weights that was."""
        overlaps = [(f, o) for f in wanted if (o := _overlap(f, part["fragments"].get(f.parameter)))]
        if not overlaps:
            return 0
        with tempfile.TemporaryDirectory() as aside:
            path = place.local / part["file"] if place.local else Path(aside) / part["file"]
            if not place.local:
                place.get(part["file"], path)
            if digest(path) != part["sha256"]:
                raise ValueError(f"{place.absolute}/{part['file']} is damaged: its digest is not the recorded one")
            with safe_open(path, framework="pt") as saved:
                for fragment, (start, end) in overlaps:
                    first = part["fragments"][fragment.parameter][0]
                    for state in STATES:
                        values = saved.get_slice(f"{state}/{fragment.parameter}")[start - first : end - first]
                        fragment.states[state][start - fragment.start : end - fragment.start].copy_(values)
        return sum(end - start for _, (start, end) in overlaps)

    def _write(
        self,
        step: int,
        fragments: list[Fragment],
        buffers: dict[str, Tensor],
        about: dict[str, Any],
        extra: Callable[[], dict[str, Any]],
    ) -> None:
        place = self.folder / "checkpoints" / name_of(step)
        part = f"part-{self.world.rank:05}.{self.attempt}"
        tensors = {f"{state}/{f.parameter}": f.states[state] for f in fragments for state in STATES}
        record: dict[str, Any] = {"file": f"{part}.safetensors"}
        record["fragments"] = {f.parameter: [f.start, f.length] for f in fragments}
        if place.local:
            place.local.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.local, prefix=".writing-") as aside:
            path = Path(aside) / record["file"]
            record["sha256"] = write_safetensors(path, tensors)
            record["bytes"] = path.stat().st_size
            if place.local:
                path.replace(place.local / record["file"])
            else:
                place.put(path, record["file"])
        place.write(f"{part}.json", json.dumps(record).encode())
        if buffers:
            data, name = save(buffers), f"buffers.{self.attempt}.safetensors"
            place.write(name, data)
            about = {**about, "buffers": {"file": name, "sha256": sha256(data).hexdigest()}}
        if self.world.first:
            files = self._all_parts(place)
            place.write(COMPLETE, json.dumps({**about, **extra(), "files": files}).encode())
            self._forget_old(step)

    def _all_parts(self, place: Folder) -> list[dict[str, Any]]:
        """The records of all processes, as soon as each has written its own."""
        names = [f"part-{rank:05}.{self.attempt}.json" for rank in range(self.world.size)]
        limit = time.monotonic() + PARTS_SECONDS
        while missing := [name for name in names if name not in place.sizes()]:
            if time.monotonic() > limit:
                raise TimeoutError(f"{place.absolute}: {missing[0]} is not there after {PARTS_SECONDS:g} s")
            time.sleep(0.05)
        return [json.loads(place.read(name)) for name in names]

    def _forget_old(self, step: int) -> None:
        """Remove all but the newest; what counts goes first, so that none is ever half there and counted."""
        newest = complete(self.folder)[-self.keep :]
        checkpoints = self.folder / "checkpoints"
        for name in checkpoints.folders():
            old = int(name.removeprefix("step-"))
            if old not in newest and old < step:
                checkpoints.remove(f"{name}/{COMPLETE}")
                checkpoints.remove(name)


def _copy(values: Tensor) -> Tensor:
    return values.detach().to("cpu", copy=True)


def _overlap(fragment: Fragment, saved: list[int] | None) -> tuple[int, int] | None:
    """The stretch of the parameter that both have."""
    if saved is None:
        return None
    start, end = max(fragment.start, saved[0]), min(fragment.start + fragment.length, sum(saved))
    return (start, end) if start < end else None


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write contiguous fp32 CPU tensors in the safetensors format, durably; returns the file's sha256.

    The library's own writer makes a copy of everything in memory first and takes several times as long.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        end = offset + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    found = sha256()
    with path.open("wb", buffering=0) as file:
        for data in (struct.pack("<Q", len(text)) + text, *(t.numpy().data.cast("B") for t in tensors.values())):
            found.update(data)
            while data:
                data = data[file.write(data) :]
        os.fsync(file.fileno())
    return found.hexdigest()
