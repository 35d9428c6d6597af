"""The loop. What it does to the world it is handed: batches, objective, engine, log, validate, save."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.data.plan import ends_epoch
from pipeline.optim.schedule import learning_rate
from pipeline.seed import number
from pipeline.train.engine import Engine


def train(
    config: Config,
    engine: Engine,
    batches: Iterator[Batch],
    objective: Callable[[Batch], Tensor],
    *,
    samples: int,
    start: int,
    log: Callable[[int, dict[str, float | Tensor]], None],
    validate: Callable[[int], None],
    save: Callable[[int], None],
) -> None:
    """Take the steps from `start` to the end of the run over a corpus of `samples` pictures.

    `log`, `validate` and `save` are told how many steps are done; `log` gets tensors and decides when to look at them.
    """
    world, steps = engine.world, config.steps(samples)
    passes = config.passes(world.size)
    for step in range(start, steps):
        rate = learning_rate(config.optim, step, steps)
        engine.set_rate(rate)
        # What a model draws (dropout) depends on the step and the process, not on what was drawn before.
        engine.seed(number("step", config.seed, step, world.rank))
        losses = []
        for _ in range(passes):
            value = objective(next(batches))
            engine.backward(value)
            engine.step()
            losses.append(value.detach())

        done = step + 1
        log(done, {"loss": torch.stack(losses).mean(), "gradient_norm": engine.gradient_norm, "lr": rate})
        if ends_epoch(done, config.batch, samples) or done == steps:
            validate(done)
        if done % config.save_every == 0 or done == steps:
            save(done)
