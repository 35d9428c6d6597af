"""MosaicML streaming: MDS files, in its default order (py1e)."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# Its pictures' classes need torchvision, which nothing here uses.
sys.modules["streaming.vision"] = ModuleType("streaming.vision")

from streaming import MDSWriter, StreamingDataset  # noqa: E402

from peers.chain import kernel, stock  # noqa: E402
from peers.contest import BATCH, FILES, WRITE, Task, Turn, loader, samples  # noqa: E402
from peers.sets import labelled, shard_bytes  # noqa: E402


def write(folder: Path) -> int:
    """Shards as large as our shards."""
    size, count = shard_bytes(folder / FILES), 0
    with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "cls": "int"}, size_limit=size) as writer:
        for data, label in labelled(folder / FILES):
            writer.write({"jpg": data, "cls": label})
            count += 1
    return count


class Cropped(StreamingDataset):
    """Pictures as a chain leaves them, and their labels."""

    def __init__(self, chain: Callable[[bytes], Any], **more: Any) -> None:
        super().__init__(**more)
        self.chain = chain

    def __getitem__(self, at: Any) -> Any:
        row = super().__getitem__(at)
        return self.chain(row["jpg"]), row["cls"]


def turns(task: Task) -> Turn:
    if task.part == WRITE:
        return lambda number: write(task.pictures)
    more: dict[str, Any] = {"local": str(task.pictures / "mds"), "shuffle": True, "batch_size": BATCH}
    if task.part == "raw":
        rows = StreamingDataset(**more)
        return lambda number: sum(len(row["jpg"]) > 0 for row in rows)
    batches = loader(Cropped(kernel if task.part == "same" else stock, **more), batch_size=BATCH)
    return lambda number: samples(batches)
