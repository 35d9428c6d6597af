"""The optimizers of a run: what they update, what they spare, and what they keep of each tensor.

That is the same whether they are handed parameters or, by ZeRO, flat stretches of many.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.config import Optim

MASTER, AVERAGE = "master", "average"
"""What there is of each weight beside the optimizer's own: the fp32 weight, and its moving average."""


def optimizer_of(optim: Optim, named: Iterable[tuple[str, nn.Parameter]], undecayed: set[str]) -> torch.optim.Optimizer:
    """The optimizer of these parameters, at a rate of 0 until one is set; those `undecayed` have a group of their own.

    AdamW is Loshchilov and Hutter 2019 (algorithm 2). SGD has heavy-ball momentum, and its decay is an L2 penalty: a
    part of the gradient, and of the momentum. Both by torch's fused kernels. Adafactor is Shazeer and Stern 2018
    (algorithms 4 and 5), without a first moment; the rate is relative to the weights.
    """
    groups = groups_of(optim, named, undecayed)
    match optim.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=0.0)


def groups_of(optim: Optim, named: Iterable[tuple[str, nn.Parameter]], undecayed: set[str]) -> list[dict]:
    """The parameters with the decay of each: one group where all decay, else a second for those that do not."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    spared = undecayed if optim.decayed == "matrices" else set()
    unknown = spared - {name for name, _ in trained}
    assert not unknown, f"parameters that should not decay, but are not there: {sorted(unknown)}"
    decayed = [parameter for name, parameter in trained if name not in spared]
    others = [parameter for name, parameter in trained if name in spared]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def states_of(optim: Optim) -> tuple[str, ...]:
    """Names of what the optimizer keeps of each weight, a number each."""
    match optim.optimizer:
        case "adamw":
            return ("exp_avg", "exp_avg_sq")
        case "sgd":
            return ("momentum_buffer",) if optim.momentum else ()
        case "adafactor":
            return ()


def factored_of(optim: Optim, shape: torch.Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the optimizer keeps of a whole parameter in fewer numbers than it has."""
    if optim.optimizer != "adafactor":
        return {}
    if len(shape) < 2:
        return {"variance": tuple(shape)}
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def state_after(optim: Optim, values: Tensor, updates: int) -> dict[str, Tensor]:
    """What the optimizer keeps of a tensor after so many updates, with zeros to be filled in.

    After none, it is what the optimizer itself would begin with.
    """
    state = {name: torch.zeros_like(values, requires_grad=False) for name in states_of(optim)}
    for name, shape in factored_of(optim, values.shape).items():
        state[name] = values.new_zeros(shape, requires_grad=False)
    if optim.optimizer == "sgd":
        return state
    # The fused kernel counts where the weights are.
    where = values.device if optim.optimizer == "adamw" else torch.device("cpu")
    return {"step": torch.tensor(float(updates), dtype=torch.float32, device=where), **state}


@torch.no_grad()
def follow(averages: list[Tensor], weights: list[Tensor], kept: float) -> None:
    """Move each average towards its weights: kept * average + (1 - kept) * weight (Polyak and Juditsky 1992).

    The exponential form, with `kept` for 0.9999 in table 2 of Dosovitskiy et al. 2021, and no correction at the start.
    """
    torch._foreach_lerp_(averages, weights, 1 - kept)  # type: ignore[attr-defined]
