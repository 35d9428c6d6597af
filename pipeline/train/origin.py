"""What a run starts from, where that is not chance: the weights of another, which it makes its own."""

import torch
from torch import Tensor, nn

from pipeline.architectures import family
from pipeline.config import Config
from pipeline.models.build import build
from pipeline.models.weights.exported import WEIGHTS, Exported, find
from pipeline.models.weights.fit import fitted


def origin_of(config: Config) -> Exported | None:
    """The model that the run starts from, None for chance.

    ValueError where it is not whole, or where its weights cannot become those of the run's model; they are not read.
    """
    if not config.start:
        return None
    origin = find(config.start)
    where = origin.folder.absolute
    if origin.folder.size(WEIGHTS) is None:
        raise ValueError(f"{where} has a description and no {WEIGHTS}: it is not whole, bring the file back")
    ours, theirs = family(config.model), family(origin.config)
    if ours != theirs:
        raise ValueError(f"start is {where}, a model of the family {theirs}; the run's model is of the family {ours}")
    config.model.check()
    try:
        _fitted(_shapes(origin), config)
    except ValueError as error:
        raise ValueError(f"a run of this model cannot start from {where}: {error}") from error
    return origin


def begin(model: nn.Module, origin: Exported, config: Config, *, head_bias: float) -> None:
    """Give the run's model the weights it starts from, at its own size; its head is zeros, and `head_bias`.

    A model that has learnt to see pictures in other units than [-1, 1] goes on seeing them so.
    """
    state, fresh = _fitted(origin.weights(), config)
    for name in fresh:
        if name.endswith(".bias"):
            state[name].fill_(head_bias)
    model.load_state_dict(state)
    model.register_forward_pre_hook(lambda module, given: (origin.scaled(given[0]), *given[1:]))


def _fitted(weights: dict[str, Tensor], config: Config) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state of the run's model, and what of it is new."""
    classes = 0 if config.objective == "masked" else config.classes
    state, report = fitted(weights, config.model, classes, head="fresh")
    return state, report.missing


def _shapes(origin: Exported) -> dict[str, Tensor]:
    """The weights without their numbers."""
    with torch.device("meta"):
        return dict(build(origin.config, origin.classes).state_dict())
