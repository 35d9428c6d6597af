"""The loop. What it does to the world it is handed: batches, engine, log, validate, save."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.loader import Batch
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
            images, labels = to_device(batch, engine.device)
            value = loss(engine.forward(images), labels, config.objective, config.smoothing)
            engine.backward(value)
            engine.step()
            losses.append(value.detach())

        done = step + 1
        log(done, {"loss": torch.stack(losses).mean(), "gradient_norm": engine.gradient_norm, "lr": rate})
        if ends_epoch(done, config.batch, samples) or done == steps:
            validate(done)
        if done % config.save_every == 0 or done == steps:
            save(done)


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pictures (b, 3, s, s) in [-1, 1], normalised on the device, and their labels."""
    images = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return images.float().div_(127.5).sub_(1), batch.labels.to(device, non_blocking=True)
