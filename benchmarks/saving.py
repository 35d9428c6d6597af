"""How fast a checkpoint is saved: ratios over named peers, of the same state, in turns.

    python benchmarks/saving.py [--quick] [--model vit_b16_in21k] [--rounds 7] [--folder DIR]

The state is what AdamW has of an experiment's model: weights and two moments in fp32 (ViT-B/16 of ImageNet-21k: 1.2
GB), in one process. All files are on the disk (fsync) when the clock stops, and the old ones removed before it starts;
the order is drawn anew in each round, and the first round warms up.

- `ours`: `Checkpoints`, with a digest of each chunk and the completion record, from the call to the end of the writing;
- `torch_save`: torch.save and fsync, without digests; `dcp`: torch.distributed.checkpoint with `FileSystemWriter`
  (sync_files) and as many threads as ours; `floor`: the same bytes written in one piece and fsync, without digests;
- `stall`: how long `Checkpoints.save` keeps training waiting; `memcpy`: the state copied into memory that is there.

A ratio is a median over the rounds, of a peer's seconds over ours; above 1 ours is faster. It is worth something on a
quiet machine only, and says as much of the disk as of the program. `_cpu` is the processor's time, of all threads; that
in which the system writes what is in its cache is not in it. DIR (default: a temporary folder) has to be on the disk
that is meant, not in memory. --quick takes fewer rounds of the same state: in a state of some megabytes nothing but
fixed costs would be measured. Needs 6 GB of memory and 4 GB of disk. Last line: the figures as JSON.
"""

import argparse
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers.contest import divide_rounds, report, take_turns
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.experiments import load
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.engine import Fragment
from pipeline.train.parts import THREADS
from pipeline.train.run import build
from pipeline.world import World
from shards.storage import Folder

STATES = ("master", "exp_avg", "exp_avg_sq")


class State:
    """As much of an engine as a checkpoint asks for, with a model's parameters and moments."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.states = {
            name: {state: torch.randn(p.numel()) for state in STATES} for name, p in model.named_parameters()
        }

    def tensors(self) -> dict[str, Tensor]:
        return {f"{state}/{name}": held for name, states in self.states.items() for state, held in states.items()}

    def fragments(self) -> list[Fragment]:
        return [Fragment(name, 0, states) for name, states in self.states.items()]

    def prepare_restore(self, optimizer_steps: int) -> list[Fragment]:
        return self.fragments()

    def optimizer_steps(self) -> int:
        return 0

    def buffers(self) -> dict[str, Tensor]:
        return {}

    def extra(self) -> dict[str, Tensor]:
        return {}

    def load_buffers(self, values: dict[str, Tensor]) -> None:
        pass

    def load_extra(self, values: dict[str, Tensor]) -> None:
        pass

    def restored(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def agree(self, value: Any) -> Any:
        return value


def contestants(state: State, folder: Path) -> dict[str, Callable[[], dict[str, float]]]:
    """By name, what saves the state and gives seconds."""
    checkpoints, tensors = Checkpoints(Folder(str(folder / "ours")), World(), "bench", keep=1), state.tensors()
    target = {name: torch.zeros_like(values) for name, values in tensors.items()}
    plain = memoryview(bytearray(b"".join(values.numpy().data.cast("B") for values in tensors.values())))
    step = 0

    def ours() -> dict[str, float]:
        nonlocal step
        step += 1
        began = time.perf_counter()
        checkpoints.save(step, state, dict)
        stalled = time.perf_counter() - began
        checkpoints.wait()
        return {"ours": time.perf_counter() - began, "stall": stalled}

    def memcpy() -> dict[str, float]:
        began = time.perf_counter()
        for name, values in tensors.items():
            target[name].copy_(values)
        return {"memcpy": time.perf_counter() - began}

    def torch_save() -> dict[str, float]:
        began = time.perf_counter()
        with (folder / "torch").open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        return {"torch_save": time.perf_counter() - began}

    def dcp() -> dict[str, float]:
        began = time.perf_counter()
        save(dict(tensors), storage_writer=FileSystemWriter(folder / "dcp", sync_files=True, thread_count=THREADS))
        return {"dcp": time.perf_counter() - began}

    def floor() -> dict[str, float]:
        began = time.perf_counter()
        with (folder / "floor").open("wb", buffering=0) as file:
            left = plain
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        return {"floor": time.perf_counter() - began}

    return {"ours": ours, "memcpy": memcpy, "torch_save": torch_save, "dcp": dcp, "floor": floor}


def clear(folder: Path) -> None:
    """Remove what peers have left, and let the disk come to rest: removing is not what is measured."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()


def timed(name: str, save: Callable[[], dict[str, float]], folder: Path) -> Callable[[int], dict[str, float]]:
    """A turn of a contestant: its seconds, and those of the processor."""

    def turn(number: int) -> dict[str, float]:
        clear(folder)
        began = time.process_time()
        taken = save()
        taken |= {f"{name}_cpu": time.process_time() - began}
        print(f"round {number}", {what: round(seconds, 3) for what, seconds in taken.items()}, flush=True)
        return taken

    return turn


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--model", default="vit_b16_in21k", help="an experiment")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")
    state = State(build(load(given.model)))
    size = sum(values.numel() * 4 for values in state.tensors().values())
    with tempfile.TemporaryDirectory(dir=given.folder) as aside:
        folder = Path(aside)
        turns = {name: timed(name, save, folder) for name, save in contestants(state, folder).items()}
        taken = take_turns(turns, 3 if given.quick else given.rounds)
    times = {what: [one[what] for one in rounds] for rounds in taken.values() for what in rounds[0]}
    ratios = {f"save_over_{peer}": divide_rounds(times[peer], times["ours"]) for peer in ("torch_save", "dcp", "floor")}
    ratios["memcpy_over_stall"] = divide_rounds(times["memcpy"], times["stall"])
    report(ratios, {"bytes": size, **{f"{name}_seconds": median(found) for name, found in times.items()}})


if __name__ == "__main__":
    main()
