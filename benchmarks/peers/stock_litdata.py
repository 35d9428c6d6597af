"""litdata: its chunks, in its shuffled order."""

from pathlib import Path
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming.writer import BinaryWriter

from peers.chain import kernel, stock
from peers.contest import BATCH, FILES, WORKERS, WRITE, Task, Turn, samples
from peers.sets import labelled, shard_bytes


def write(folder: Path) -> int:
    """Chunks as large as our shards."""
    (folder / "litdata").mkdir()
    writer = BinaryWriter(str(folder / "litdata"), chunk_bytes=shard_bytes(folder / FILES))
    count = 0
    for data, label in labelled(folder / FILES):
        writer[count] = {"jpg": data, "cls": label}
        count += 1
    writer.done()
    writer.merge()
    return count


def turns(task: Task) -> Turn:
    if task.part == WRITE:
        return lambda number: write(task.pictures)
    folder = str(task.pictures / "litdata")
    if task.part == "raw":
        rows = StreamingDataset(folder, shuffle=True)
        return lambda number: sum(len(row["jpg"]) > 0 for row in rows)
    chain = kernel if task.part == "same" else stock

    def cut(row: dict[str, Any]) -> tuple[Any, int]:
        return chain(row["jpg"]), row["cls"]

    pictures = StreamingDataset(folder, shuffle=True, transform=cut)
    batches = StreamingDataLoader(pictures, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)
    return lambda number: samples(batches)
