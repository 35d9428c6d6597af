"""A trained model as this project keeps it: `model.safetensors`, and a `model.json` that is written last."""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline.architectures import Architecture, described, family
from shards.storage import Folder

WEIGHTS, ABOUT = "model.safetensors", "model.json"


@dataclass(frozen=True)
class Exported:
    """What lies in a folder; `weights` are read when they are needed."""

    folder: Folder
    about: dict[str, Any]

    @property
    def config(self) -> Architecture:
        """The architecture."""
        return described(self.about["architecture"], self.about["model"])

    @property
    def classes(self) -> int:
        """Classes of the head, 0 for none."""
        return int(self.about["classes"])

    @property
    def digest(self) -> str:
        """The sha256 of the weights."""
        return str(self.about["digest"])

    @property
    def architecture(self) -> str:
        """Digest of the architecture alone."""
        deciding = {"family": family(self.config), **asdict(self.config)}
        return sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def scaled(self, images: Tensor) -> Tensor:
        """Pictures (b, 3, s, s) in [-1, 1], as the model learnt to see them: with its mean and deviation."""
        if self.about["mean"] == self.about["std"] == [0.5] * 3:
            return images
        mean, deviation = (
            torch.tensor(self.about[name], dtype=images.dtype, device=images.device)[:, None, None]
            for name in ("mean", "std")
        )
        return (images * 0.5 + 0.5 - mean) / deviation

    def weights(self) -> dict[str, Tensor]:
        """The weights; ValueError where the file is not the described one."""
        data = self.folder.read(WEIGHTS)
        if sha256(data).hexdigest() != self.about["digest"]:
            raise ValueError(f"{self.folder.absolute}/{WEIGHTS} is damaged: its digest is not the recorded one")
        return load(data)


def find(url: str) -> Exported:
    """The model that a run has exported, or that lies in `url` itself; ValueError where there is none."""
    for folder in (Folder(url) / "export", Folder(url)):
        if folder.exists(ABOUT):
            return Exported(folder, json.loads(folder.read(ABOUT)))
    raise ValueError(f"{Folder(url).absolute} holds no export/{ABOUT}: the run is not there or has not finished")


def put(
    folder: Folder,
    state: dict[str, Tensor],
    model: Architecture,
    classes: int,
    *,
    mean: list[float],
    std: list[float],
    metrics: dict[str, Any] | None = None,
    **origin: Any,
) -> None:
    """Write a model, whose description comes last; `origin` says what it came of: a run's config, or another source."""
    data = save(state)
    folder.write(WEIGHTS, data)
    about = {
        "format": 1,
        "digest": sha256(data).hexdigest(),
        "architecture": family(model),
        "model": asdict(model),
        "classes": classes,
        "mean": mean,
        "std": std,
        "metrics": metrics or {},
        **origin,
    }
    folder.write(ABOUT, json.dumps(about, indent=1).encode())
