"""One file a picture, decoded and cropped by Pillow to uint8, as timm's loader does."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from peers.chain import Pixels, plain
from peers.contest import BATCH, FILES, Task, Turn, loader, samples


class Files(Dataset[tuple[Pixels, int]]):
    """The pictures of a folder."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(map(str, folder.glob("*.jpg")))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> tuple[Pixels, int]:
        with open(self.paths[at], "rb") as file:
            return plain(file.read()), at % 100


def together(rows: list[tuple[Pixels, int]]) -> tuple[Tensor, Tensor]:
    """A batch: (n, 3, 224, 224) uint8, and the labels."""
    return torch.from_numpy(np.stack([pixels for pixels, _ in rows])), torch.tensor([label for _, label in rows])


def turns(task: Task) -> Turn:
    batches = loader(Files(task.pictures / FILES), batch_size=BATCH, shuffle=True, collate_fn=together)
    return lambda number: samples(batches)
