"""The loop. What it does to the world it is handed: batches, objective, engine, health, log, validate, probe, save."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline.config import Config, Optim
from pipeline.data.loader import Batch
from pipeline.data.plan import ends_epoch
from pipeline.optim.schedule import learning_rate
from pipeline.seed import number
from pipeline.train.engine import Engine
from pipeline.train.health import GoBack, Health

Values = dict[str, float | Tensor]


def train(
    config: Config,
    engine: Engine,
    batches: Iterator[Batch],
    objective: Callable[[Batch], Tensor],
    *,
    samples: int,
    start: int,
    until: int | None = None,
    health: Health,
    optim: Callable[[int], Optim],
    log: Callable[[int, Values], None],
    validate: Callable[[int], None],
    probe: Callable[[int], None],
    save: Callable[[int], None],
    stop: Callable[[int], bool],
) -> int:
    """Take the steps from `start` to the end of the run over a corpus of `samples` pictures; returns how many are done.

    `until` is the step after which to end, and saved, if that is sooner; the schedule stays that of the whole run.
    `log`, `validate`, `probe`, `save` and `stop` are told how many steps are done; `log` gets tensors and decides when
    to look at them, `probe` is for milestones. Where `stop` says so on any process, the run ends within two steps, and
    saved. `optim` is asked what holds at a step. A step that is left out moves the position in the data, but neither
    weights, optimizer nor schedule. GoBack where a step has to be undone: what is saved is from before it.
    """
    steps = config.steps(samples)
    last = steps if until is None else min(until, steps)
    for step in range(start, last):
        done, chosen = step + 1, optim(step)
        if sick := health.to_leave_out(step):
            for _ in range(config.passes(engine.world.size)):
                next(batches)
            health.settle()
            rate = learning_rate(chosen, step - health.skipped, steps)
            values: Values = {"loss": sick.loss, "gradient_norm": sick.gradient_norm, "lr": rate}
            health.pass_over(sick)
        else:
            values = _take(config, engine, batches, objective, step, steps, health, chosen, stop)
        ends = ends_epoch(done, config.batch, samples) or done == steps
        saves = done % config.save_every == 0 or config.is_milestone(done) or done == last
        if ends or saves or health.asked_to_stop or done % config.log_every == 0:
            health.settle()
        if health.to_undo:
            raise GoBack(health.to_undo)
        log(done, values)
        if ends:
            validate(done)
        if config.is_milestone(done):
            probe(done)
        if saves or health.asked_to_stop:
            save(done)
        if health.asked_to_stop:
            return done
    return max(start, last)


def _take(
    config: Config,
    engine: Engine,
    batches: Iterator[Batch],
    objective: Callable[[Batch], Tensor],
    step: int,
    steps: int,
    health: Health,
    optim: Optim,
    stop: Callable[[int], bool],
) -> Values:
    """Take one step; what it gave is still on its way from the device."""
    # What a model draws (dropout) depends on the step and the process, not on what was drawn before.
    engine.seed(number("step", config.seed, step, engine.world.rank))
    losses, rate = [], 0.0
    for left in reversed(range(config.passes(engine.world.size))):
        value = objective(next(batches))
        engine.backward(value)
        losses.append(value.detach().float())
        if not left:
            # The device has this step's gradients to work out while the step before it is judged.
            health.settle()
            rate = learning_rate(optim, step - health.skipped, steps)
            engine.set_rate(rate)
            engine.set_clip(optim.clip)
            engine.loss_guard(health.guard)
        engine.step()
    loss = torch.stack(losses).mean()
    loss, asked = engine.mean(torch.stack([loss, torch.full_like(loss, stop(step + 1))]))
    left_out = torch.full_like(loss, engine.skipped)
    health.took(step, torch.stack([loss, engine.gradient_norm, left_out, asked]))
    return {"loss": loss, "gradient_norm": engine.gradient_norm, "lr": rate}
