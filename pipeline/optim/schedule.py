"""The learning rate as a function of the step."""

import math

from pipeline.config import Optim


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: a rise from 0 in a line, then the decay.

    As in the paper's code: the decay runs from the end of the warm-up to the last step, and the warm-up multiplies it.
    """
    progress = min(1.0, max(0.0, (step - optim.warmup) / max(1, steps - optim.warmup)))
    match optim.decay:
        case "linear":
            rate = optim.end_lr + (optim.lr - optim.end_lr) * (1 - progress)
        case "cosine":
            rate = optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            rate = optim.lr
    return rate * min(1.0, step / optim.warmup) if optim.warmup else rate
