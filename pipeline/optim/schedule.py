"""The learning rate as a function of the step."""

import math

from pipeline.config import Optim


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: a rise from 0 in a line, then the decay, then the cooldown.

    As in the paper's code and big_vision (`utils.create_learning_rate_schedule`): warm-up and cooldown are factors,
    which go from 0 to 1 over the first steps and from 1 to 0 over the last, and the decay is

    - linear: from `lr` at the end of the warm-up to `end_lr` at the last step (Dosovitskiy et al. 2021, B.1);
    - cosine: half a period of it, from `lr` to `end_lr` (Loshchilov and Hutter 2017, equation 5, without restarts);
    - rsqrt: lr / sqrt(1 + t / timescale), t steps after the warm-up, so that the length of the run does not enter
      (Zhai et al. 2022, section 3.5, where a cooldown of 50,000 steps follows);
    - constant: `lr`;
    - steps: `lr`, and a tenth of it after each boundary (Kolesnikov et al. 2020, BiT, section 3.3).

    Continuous in the step, whatever the choice but the last.
    """
    after = max(0, step - optim.warmup)
    progress = min(1.0, after / max(1, steps - optim.warmup))
    match optim.decay:
        case "linear":
            rate = optim.end_lr + (optim.lr - optim.end_lr) * (1 - progress)
        case "cosine":
            rate = optim.end_lr + (optim.lr - optim.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        case "rsqrt":
            rate = optim.lr / math.sqrt(1 + after / optim.timescale)
        case "constant":
            rate = optim.lr
        case "steps":
            rate = optim.lr * 0.1 ** sum(step > boundary for boundary in optim.boundaries)
    if optim.warmup:
        rate *= min(1.0, step / optim.warmup)
    if optim.cooldown:
        rate *= min(1.0, max(0, steps - step) / optim.cooldown)
    return rate
