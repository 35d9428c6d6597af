"""Weights under our names, made to fit a model: resized where its pictures have another size, with a head or a new one.

What is not taken is either left by a rule, and reported, or an error with its name: nothing is dropped in silence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.architectures import Architecture, Cmt, Maxvit, Vit
from pipeline.models.build import build
from pipeline.models.cmt import resized_bias
from pipeline.models.maxvit import resized as with_resized_tables
from pipeline.models.vit import resized_positions

Head = Literal["if it fits", "taken", "fresh"]
# By family: the layers whose size is the number of classes.
_HEADS = ("head", "head_dist", "head.fc", "classifier")
# What a trained model may have and a fine-tuned one not (Dosovitskiy et al. 2021, section 3.2; a mean over patches).
_LEAVABLE = ("pre_logits.weight", "pre_logits.bias", "cls_token")
# How often a BatchNorm has seen a batch decides nothing where it has a momentum; older files lack it.
_COUNTER = "num_batches_tracked"


class Resized(NamedTuple):
    """A tensor that was interpolated, with its shape before and after."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What became of the tensors of a file; each name stands in one of the first two or in `left`."""

    taken: tuple[str, ...]
    resized: tuple[Resized, ...]
    left: tuple[str, ...]
    missing: tuple[str, ...]
    """What the model has and the file lacks, or has for other classes: zeros."""

    def lines(self) -> list[str]:
        """The report, a line for each kind that there is anything of."""
        made = [f"taken: {len(self.taken)} tensors"]
        made += [f"resized: {name} from {_by(before)} to {_by(after)}" for name, before, after in self.resized[:8]]
        if more := len(self.resized) - 8:
            made += [f"resized: {more} more"] if more > 0 else []
        made += [f"left: {_some(self.left)}"] if self.left else []
        made += [f"zeros, since the file has none that fit: {_some(self.missing)}"] if self.missing else []
        return made


def classes_of(weights: Mapping[str, Tensor]) -> int:
    """Classes of the head among the weights; 0 where there is none."""
    return next((len(weights[f"{head}.weight"]) for head in _HEADS if f"{head}.weight" in weights), 0)


def fitted(
    weights: Mapping[str, Tensor],
    config: Architecture,
    classes: int,
    *,
    head: Head = "if it fits",
    left: tuple[str, ...] = (),
) -> tuple[dict[str, Tensor], Report]:
    """The whole state of the model `config` with so many classes, in fp32, and what became of the weights.

    Positions and tables of relative biases are interpolated to the size of `config`, as its family does. A head is
    taken where it has as many classes, and stands on a tanh layer where the model's does; else it is zeros. A model
    without a tanh layer leaves the file's, one without a class token its class token; `left` names what reading left
    already. ValueError names tensors that the model does not have, that the file lacks, or whose shapes differ, and a
    head of other classes where it was to be "taken".
    """
    with torch.device("meta"):
        model = build(config, classes)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given, dropped = _headed(dict(weights), wanted, classes, head)
    given = {name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    given, moved = _tokens(given, config) if isinstance(config, Vit) else (given, ())
    dropped += moved + tuple(name for name in _LEAVABLE if name in given and name not in wanted)
    given = {name: tensor for name, tensor in given.items() if name not in dropped}
    sized = _resized(given, config, wanted)
    _refuse_misfits(sized, wanted, dropped)
    missing = tuple(name for name in wanted if name not in sized)
    changed = [Resized(n, tuple(t.shape), tuple(sized[n].shape)) for n, t in given.items() if t.shape != sized[n].shape]
    names = {change.name for change in changed}
    state = {name: sized.get(name, torch.zeros(shape)) for name, shape in wanted.items()}
    state |= {name: torch.zeros((), dtype=torch.int64) for name in missing if name.endswith(_COUNTER)}
    report = Report(
        taken=tuple(name for name in sized if name not in names),
        resized=tuple(changed),
        left=left + dropped,
        missing=tuple(name for name in missing if not name.endswith(_COUNTER)),
    )
    return state, report


def take(model: nn.Module, weights: Mapping[str, Tensor], config: Architecture, *, head: Head = "if it fits") -> Report:
    """Put the weights into the model, which is the one of `config`; as `fitted` has it."""
    state = model.state_dict()
    classes = classes_of(state)
    made, report = fitted(weights, config, classes, head=head)
    model.load_state_dict(made)
    return report


def _headed(
    weights: dict[str, Tensor], wanted: Mapping[str, torch.Size], classes: int, head: Head
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights without a head that the model does not get, and the names of that head."""
    names = [f"{one}.{leaf}" for one in _HEADS for leaf in ("weight", "bias") if f"{one}.{leaf}" in weights]
    there = classes_of(weights)
    unlike = "pre_logits.weight" in weights and "pre_logits.weight" not in wanted
    if head == "taken" and (there != classes or unlike):
        why = "it stands on a tanh layer that the model does not have" if unlike and there == classes else (
            f"it has {there:,} classes, the model {classes:,}" if there else "there is none in the file"
        )  # fmt: skip
        raise ValueError(f"the head cannot be taken: {why}; a fresh one can be had instead")
    if head == "fresh" or there != classes or unlike:
        return {name: tensor for name, tensor in weights.items() if name not in names}, tuple(names)
    return weights, ()


def _tokens(weights: dict[str, Tensor], config: Vit) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights with positions for the tokens that the model gives some to; the names of positions given up.

    A token's own position may as well be added to the token (big_vision's `fix_old_checkpoints`), and one without has
    a position of zeros.
    """
    table = weights.get("pos_embed")
    if table is None or config.positions != "learned" or table.ndim != 3:
        return weights, ()
    has = _prefix(table.shape[1], weights)
    wants = config.prefix if config.prefix_positions else 0
    if has == wants:
        return weights, ()
    made, left = dict(weights), ()
    if not wants:
        for i, name in enumerate(("cls_token", "dist_token")[:has]):
            if name in made and not (name == "cls_token" and config.pooling != "token"):
                made[name] = made[name] + table[:, i : i + 1]
        left = () if config.pooling == "token" else ("the class token's position",)
        made["pos_embed"] = table[:, has:]
    elif not has:
        made["pos_embed"] = torch.cat([table.new_zeros(1, wants, table.shape[2]), table], dim=1)
    return made, left


def _prefix(positions: int, weights: Mapping[str, Tensor]) -> int:
    """Positions that are not of a square of patches: as many as the file has tokens, or none."""
    tokens = sum(weights[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in weights)
    found = next((few for few in (tokens, 0) if is_square(positions - few)), None)
    if found is None:
        raise ValueError(f"pos_embed has {positions} positions: no square of patches, alone or beside {tokens} tokens")
    return found


def is_square(number: int) -> bool:
    """Whether so many patches are a square of at least one."""
    return number > 0 and isqrt(number) ** 2 == number


def _resized(
    weights: Mapping[str, Tensor], config: Architecture, wanted: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """The weights with positions and tables of the model's size."""
    made = dict(weights)
    match config:
        case Vit():
            table, own = made.get("pos_embed"), config.prefix if config.prefix_positions else 0
            if config.positions == "learned" and table is not None and is_square(table.shape[1] - own):
                was, side = isqrt(table.shape[1] - own), config.grid
                made["pos_embed"] = resized_positions(table, (was, was), (side, side), config.interpolation)
        case Maxvit():
            made = with_resized_tables(made, config)
        case Cmt():
            for letter, stage in zip("abcd", config.stages, strict=True):
                table = made.get(name := f"relative_pos_{letter}")
                if table is not None and table.ndim == 3:
                    was, side = isqrt(table.shape[1]), config.image_size // stage.stride
                    made[name] = resized_bias(table, (was, was), (side, side), stage.reduction)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def _refuse_misfits(weights: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], dropped: tuple[str, ...]) -> None:
    unexpected = [name for name in weights if name not in wanted]
    fresh = {f"{head}.{leaf}" for head in _HEADS for leaf in ("weight", "bias")}
    lacking = [name for name in wanted if name not in weights and name not in fresh and not name.endswith(_COUNTER)]
    unlike = [
        f"{name} {_by(tensor.shape)}, not {_by(wanted[name])}"
        for name, tensor in weights.items()
        if name in wanted and tensor.shape != wanted[name]
    ]
    said = [
        f"{what}: {_some(names)}"
        for what, names in (("unknown to the model", unexpected), ("lacking", lacking), ("of another shape", unlike))
        if names
    ]
    if said:
        raise ValueError(f"the weights do not fit the model; {'; '.join(said)}")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _some(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
