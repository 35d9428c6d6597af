"""The loop. What it does to the world it is handed: batches, engine, log, validate, save."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.data.mix import applied, normalised, targets
from pipeline.data.plan import ends_epoch
from pipeline.objectives.classify import loss
from pipeline.optim.schedule import learning_rate
from pipeline.seed import number
from pipeline.train.engine import Engine


def train(
    config: Config,
    engine: Engine,
    batches: Iterator[Batch],
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
            batch = next(batches)
            images, targets, weights = to_device(batch, engine.device, config.classes)
            value = loss(engine.forward(images), targets, config.objective, config.smoothing, weights)
            engine.backward(value)
            engine.step()
            losses.append(value.detach())

        done = step + 1
        log(done, {"loss": torch.stack(losses).mean(), "gradient_norm": engine.gradient_norm, "lr": rate})
        if ends_epoch(done, config.batch, samples) or done == steps:
            validate(done)
        if done % config.save_every == 0 or done == steps:
            save(done)


def to_device(batch: Batch, device: torch.device, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (b, 3, s, s), normalised and mixed on the device, what they show, and their weights (b).

    What they show is labels (b, m), or where pictures were mixed the share of each class (b, c).
    """
    images = normalised(batch.images.to(device, non_blocking=True))
    labels, weights = (each.to(device, non_blocking=True) for each in (batch.labels, batch.weights))
    if batch.draws is None:
        return images, labels, weights
    draws = batch.draws.to(device, non_blocking=True)
    if draws.mixing is None:
        return applied(images, draws), labels, weights
    pairs = weights.unflatten(0, (-1, 2)).prod(1, keepdim=True).expand(-1, 2).flatten()  # what is mixed with nothing
    return applied(images, draws), targets(labels, draws, classes), pairs
