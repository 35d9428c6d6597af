"""The results of trials in a folder: one file each, created once, under the name of the trial.

Beside them, in `models`, stands of each model by its digest where it was and what its pretraining had cost.
"""

import json
from typing import TYPE_CHECKING, Any

from shards.storage import Folder

if TYPE_CHECKING:
    from pipeline.models.weights.exported import Exported

Result = dict[str, Any]
"""What came of a trial, as JSON has it: `trial` holds all that decided it."""


class Results:
    """What is known of them, and what is looked up."""

    def __init__(self, folder: Folder) -> None:
        self.place, self.folder = folder, folder / "results"
        self.known: dict[str, Result] = {}

    def load(self) -> dict[str, Result]:
        """All there are, by name; only those that are not known yet are read."""
        names = [file.removesuffix(".json") for file in self.folder.sizes() if file.endswith(".json")]
        fresh = [name for name in names if name not in self.known]
        found = self.folder.ranges([(f"{name}.json", 0, -1) for name in fresh]) if fresh else []
        self.known |= {name: json.loads(data) for name, data in zip(fresh, found, strict=True)}
        return self.known

    def find(self, name: str) -> Result | None:
        """That of one trial, which somebody else may have stored since the last look; None where there is none."""
        if name not in self.known and self.folder.exists(f"{name}.json"):
            self.known[name] = self._read(name)
        return self.known.get(name)

    def store(self, name: str, result: Result) -> Result:
        """Keep a result unless the trial has one; returns the one that counts, as it reads."""
        data = json.dumps(result, indent=1).encode()
        self.known[name] = json.loads(data) if self.folder.create(f"{name}.json", data) else self._read(name)
        return self.known[name]

    def describe(self, source: "Exported") -> None:
        """Keep what a report says of a checkpoint beside its results; who described it first, counts."""
        told = source.about.get("metrics", {})
        about = {"folder": source.folder.absolute, "architecture": source.architecture}
        about |= {name: told[name] for name in ("steps", "exaflops") if name in told}
        (self.place / "models").create(f"{source.digest}.json", json.dumps(about, indent=1).encode())

    def _read(self, name: str) -> Result:
        return json.loads(self.folder.read(f"{name}.json"))
