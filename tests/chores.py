"""Work for the actors of a sweep that costs nothing, leaves word of each performance, and can be held up or spoilt."""

import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.transfer.finetune import Trial


@dataclass(frozen=True)
class Chores:
    """What is said of them lies in `folder`, for all processes to see."""

    folder: str

    def __call__(
        self, trials: Sequence[Trial], source: str, data: str, *, threads: int
    ) -> Iterator[tuple[Trial, dict[str, Any]]]:
        for trial in trials:
            self._write(f"performed/{trial.name}/{uuid.uuid4().hex}", str(os.getpid()))
            while self._path("hold").exists():
                time.sleep(0.02)
            match self._path(f"spoilt/{trial.name}").read_text() if self._path(f"spoilt/{trial.name}").exists() else "":
                case "memory":
                    raise torch.OutOfMemoryError("a GPU's memory is full")
                case "value":
                    raise ValueError("spoilt")
            accuracy = int(trial.name[:6], 16) / 2**24
            result = {"trial": asdict(trial), "accuracy": accuracy, "correct": 0, "count": 1, "classes": 2}
            yield trial, json.loads(json.dumps({**result, "seconds": 0.0}))

    def hold(self) -> None:
        """Let no chore come to its end."""
        self._write("hold", "")

    def let_go(self) -> None:
        """Let all come to their ends."""
        self._path("hold").unlink()

    def spoil(self, trial: str, how: str) -> None:
        """Have a trial fail, each time."""
        self._write(f"spoilt/{trial}", how)

    def performed(self) -> Counter[str]:
        """How often each trial was begun."""
        return Counter(path.parent.name for path in self._path("performed").glob("*/*"))

    def at_work(self) -> dict[str, int]:
        """While they are held: the process that has begun each trial last."""
        began = sorted(self._path("performed").glob("*/*"), key=lambda path: path.stat().st_mtime_ns)
        return {path.parent.name: int(path.read_text()) for path in began}

    def _write(self, name: str, text: str) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path(uuid.uuid4().hex)
        aside.write_text(text)
        aside.rename(path)

    def _path(self, name: str) -> Path:
        return Path(self.folder) / name
