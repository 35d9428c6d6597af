"""Exchange trained models with other programs.

    python jobs/export.py RUN --to FILE_OR_FOLDER --format timm

writes the model of a finished run, or of an export's folder, as others read it: `timm` (a folder with its config.json,
or weights alone as FILE.safetensors), `hf` (a folder for transformers), `onnx`, or `npz` (vision_transformer's, or
BiT's).

    python jobs/export.py --from FILE --to FOLDER

makes of someone else's weights a folder that jobs/finetune.py takes as its checkpoint: .npz of vision_transformer,
AugReg, big_vision and BiT; .safetensors and .pth of timm, DeiT, CMT and Hugging Face. `--model` names the model where
the file does not show it, `--size` the size of pictures that its positions are to be for, `--classes` another head.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.cli import parse, run

if TYPE_CHECKING:
    from pipeline.models.weights.exported import Exported
    from pipeline.models.weights.foreign import Foreign
    from shards.storage import Folder

NORMALISATIONS = {
    "half": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


@dataclass(frozen=True)
class Out:
    """Write a model as others read it."""

    to: str
    """File or folder to write, or its URL."""
    format: Literal["timm", "hf", "onnx", "npz"]


@dataclass(frozen=True)
class In:
    """Make others' weights a checkpoint."""

    to: str
    """Folder to write, or its URL."""
    model: str = ""
    """Which model it is, say deit_b16, where the file does not show it or shows another."""
    size: int = 0
    """Side of the pictures it is to be for; if 0 as the named model has it, and the file where none is named."""
    classes: int = -1
    """Classes of the head; another number than the file's gives one of zeros, and -1 takes what there is."""
    normalisation: Literal["", "half", "imagenet"] = ""
    """How pixels were scaled: by 0.5, or as ImageNet's; if empty, as the files beside it say or as is usual."""


def main(argv: list[str]) -> None:
    """Do what the words say."""
    match argv:
        case [] | ["-h" | "--help", *_]:
            print(__doc__)
        case [source, *options] if not source.startswith("-"):
            send(source, parse(Out, options))
        case _ if "--from" in argv[:-1]:
            at = argv.index("--from")
            fetch(argv[at + 1], parse(In, argv[:at] + argv[at + 2 :]))
        case _:
            raise ValueError("export takes a run's folder first, or --from and a file")


def send(source: str, wanted: Out) -> None:
    """Write the model at `source` as others read it."""
    # Imported here, so that --help answers at once.
    from pipeline.models.weights.exported import find

    exported = find(source)
    files, said = {"timm": to_timm, "hf": to_hf, "onnx": to_onnx, "npz": to_npz}[wanted.format](exported, wanted.to)
    folder, names = place(wanted.to, list(files))
    for name, data in zip(names, files.values(), strict=True):
        folder.write(name, data)
    print("\n".join([*said, f"written: {', '.join(f'{folder.absolute}/{name}' for name in names)}"]))


def place(to: str, names: list[str]) -> "tuple[Folder, list[str]]":
    """The folder and the names in it: `to` is the folder, or the first file where it ends as that does."""
    from shards.storage import Folder

    if not to.endswith(Path(names[0]).suffix):
        return Folder(to), names
    parent, _, last = to.rstrip("/").rpartition("/")
    return Folder(parent or "."), [last, *(name.replace(names[0], last) for name in names[1:])]


Files = tuple[dict[str, bytes], list[str]]


def to_timm(exported: "Exported", to: str) -> Files:
    """timm's files by name, and what there is to say of them."""
    from safetensors.torch import save

    from pipeline.architectures import Hybrid
    from pipeline.models.weights import timm

    about, config = exported.about, exported.config
    name, settings = timm.model(config, exported.classes)
    weights, left = timm.write(exported.weights(), config)
    files = {"model.safetensors": save(weights, metadata={"format": "pt"})}
    if not to.endswith(".safetensors"):
        files["config.json"] = encoded(timm.description(config, exported.classes, about["mean"], about["std"]))
    said = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in settings.items())])
    differs = isinstance(config, Hybrid) and config.standardisation == "deviation"
    notes = ["timm's trunk standardises with another epsilon: its answers differ a little"] if differs else []
    return files, [*dropped(left), *notes, f"timm.create_model({said}, checkpoint_path=...)"]


def to_hf(exported: "Exported", to: str) -> Files:
    """Hugging Face's files by name, and what there is to say of them."""
    from safetensors.torch import save

    from pipeline.architectures import Vit
    from pipeline.models.weights import huggingface

    about, config = exported.about, exported.config
    if not isinstance(config, Vit):
        raise ValueError(
            f"Hugging Face's layout is written of a ViT, and this is of the family {about['architecture']}"
        )
    weights, left = huggingface.write(exported.weights(), config)
    files = {
        "model.safetensors": save(weights, metadata={"format": "pt"}),
        "preprocessor_config.json": encoded(huggingface.preprocessing(config, about["mean"], about["std"])),
        "config.json": encoded(huggingface.description(config, exported.classes)),
    }
    return files, dropped(left)


def to_onnx(exported: "Exported", to: str) -> Files:
    """ONNX's files by name."""
    from pipeline.models.build import build
    from pipeline.models.weights import onnx

    model = build(exported.config, exported.classes)
    model.load_state_dict(exported.weights())
    name = Path(to).name if to.endswith(".onnx") else "model.onnx"
    with tempfile.TemporaryDirectory() as folder:
        onnx.write(model, exported.config.image_size, Path(folder) / name)
        paths = sorted(Path(folder).iterdir(), key=lambda path: (path.name != name, path.name))
        return {path.name: path.read_bytes() for path in paths}, []


def to_npz(exported: "Exported", to: str) -> Files:
    """The `.npz` of vision_transformer, or of BiT."""
    from pipeline.architectures import Bit, Vit
    from pipeline.models.weights import bit, npz

    match exported.config:
        case Vit() as config:
            arrays = npz.write(exported.weights(), config)
            said = [] if config.gelu == "tanh" else ["vision_transformer computes the tanh form of GELU, the model erf"]
        case Bit():
            arrays, said = bit.write(exported.weights()), []
        case _:
            raise ValueError(f".npz is written of ViT, hybrid and BiT, and this is {exported.about['architecture']}")
    return {"model.npz": npz.packed(arrays)}, said


def dropped(left: tuple[str, ...]) -> list[str]:
    """A line on what the layout has no place for."""
    return [f"left out, as the layout has no place for it: {', '.join(left)}"] if left else []


def encoded(values: dict[str, Any]) -> bytes:
    """JSON as a file has it."""
    return (json.dumps(values, indent=2) + "\n").encode()


def fetch(file: str, wanted: In) -> None:
    """Make a checkpoint of someone else's weights."""
    from pipeline.architectures import at_size, preset
    from pipeline.models.weights import foreign
    from pipeline.models.weights.exported import put
    from pipeline.models.weights.fit import classes_of, fitted
    from shards.storage import Folder

    parent, _, name = file.rpartition("/")
    source = Folder(parent or ".")
    data = source.read(name)
    beside = json.loads(source.read("config.json")) if source.exists("config.json") else None
    found = foreign.read(name, data, beside)
    config = preset(wanted.model) if wanted.model else foreign.architecture(found)
    if wanted.size:
        config = at_size(config, wanted.size)
    classes = classes_of(found.weights) if wanted.classes < 0 else wanted.classes
    state, report = fitted(found.weights, config, classes, left=found.left)
    mean, std = NORMALISATIONS[wanted.normalisation] if wanted.normalisation else scaling(found, source, beside or {})
    origin = {"file": f"{source.absolute}/{name}", "digest": sha256(data).hexdigest(), "layout": found.layout}
    put(Folder(wanted.to), state, config, classes, mean=mean, std=std, source=origin)
    print("\n".join([f"{found.layout}: {config}", *report.lines(), f"written: {Folder(wanted.to).absolute}"]))


def scaling(found: "Foreign", source: "Folder", beside: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and deviation of pixels: as said beside the weights, else ImageNet's for distilled, CMT and EfficientNet."""
    said = beside.get("pretrained_cfg") or {}
    if found.layout == "Hugging Face" and source.exists("preprocessor_config.json"):
        processor = json.loads(source.read("preprocessor_config.json"))
        said = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    if said.get("mean") and said.get("std"):
        return list(said["mean"]), list(said["std"])
    marks = ("dist_token", "relative_pos_a", "conv_stem.weight")
    return NORMALISATIONS["imagenet" if any(mark in found.weights for mark in marks) else "half"]


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
