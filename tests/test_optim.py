"""Optimizers and learning rates: what decays, what is kept, and how the rate goes."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.config import Optim, Vit
from pipeline.models.build import build
from pipeline.optim.optimizers import factored_of, follow, optimizer_of, state_after, states_of
from pipeline.optim.schedule import learning_rate

pytestmark = pytest.mark.timeout(300)
EVERY = ("adamw", "sgd", "adafactor")

# --- learning rate --------------------------------------------------------------------------------------------------

optims = st.builds(
    Optim,
    lr=st.floats(1e-6, 10),
    warmup=st.integers(0, 50),
    decay=st.sampled_from(["linear", "cosine", "constant", "rsqrt"]),
    end_lr=st.floats(0, 1e-6),
    timescale=st.integers(1, 1000),
    cooldown=st.integers(0, 50),
)


@given(optims, st.integers(1, 300))
def test_no_rate_leaves_the_stretch_from_nothing_to_the_peak_whatever_the_schedule(optim: Optim, steps: int) -> None:
    rates = [learning_rate(optim, step, steps) for step in range(steps + 1)]
    assert all(0 <= rate <= optim.lr * (1 + 1e-12) for rate in rates)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(rates[optim.warmup :]))


@given(optims, st.integers(1, 300))
def test_every_schedule_is_continuous(optim: Optim, steps: int) -> None:
    """No step is more than the warm-up, the decay and the cooldown together can change the rate by."""
    rates = [learning_rate(optim, step, steps) for step in range(steps + 1)]
    decay = math.pi / 2 / max(1, steps - optim.warmup) if optim.decay in ("linear", "cosine") else 0.0
    decay = 0.5 / optim.timescale if optim.decay == "rsqrt" else decay
    most = sum(1 / each for each in (optim.warmup, optim.cooldown) if each) + decay
    assert all(abs(later - earlier) <= optim.lr * most * (1 + 1e-9) for earlier, later in pairwise(rates))


@given(optims, st.integers(1, 300))
def test_every_cooldown_ends_at_nothing_and_changes_nothing_before_it(optim: Optim, steps: int) -> None:
    assume(optim.cooldown)
    without = replace(optim, cooldown=0)
    assert learning_rate(optim, steps, steps) == 0
    for step in range(steps - optim.cooldown + 1):
        assert learning_rate(optim, step, steps) == learning_rate(without, step, steps)


@given(optims, st.integers(1, 100), st.integers(101, 1000), st.integers(0, 100))
def test_the_length_of_a_run_does_not_change_its_rates_whatever_the_step_of_rsqrt(
    optim: Optim, short: int, long: int, step: int
) -> None:
    open_ended = replace(optim, decay="rsqrt", cooldown=0)
    assert learning_rate(open_ended, step, short) == learning_rate(open_ended, step, long)


def test_rsqrt_is_the_half_after_three_timescales() -> None:
    optim = Optim(lr=0.8, warmup=100, decay="rsqrt", timescale=50)
    assert learning_rate(optim, 100, 10_000) == 0.8
    assert learning_rate(optim, 100 + 3 * 50, 10_000) == pytest.approx(0.4)


# --- optimizers -----------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return build(Vit(width=8, depth=1, heads=2, hidden=16, patch=4, image_size=8), 3)


@pytest.mark.parametrize("optimizer", EVERY)
def test_only_what_the_model_does_not_name_decays(optimizer: str) -> None:
    """With a gradient of nothing, all that is left of a step is the decay."""
    model, optim = small(), Optim(optimizer=optimizer, decayed="matrices", weight_decay=0.5)  # type: ignore[arg-type]
    spared = model.undecayed()  # type: ignore[operator]
    assert (
        {"cls_token", "pos_embed", "norm.bias", "head.bias"} < spared < {name for name, _ in model.named_parameters()}
    )
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    made = optimizer_of(optim, model.named_parameters(), spared)
    for group in made.param_groups:
        group["lr"] = 0.1
    made.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.ones_like(parameter)) == (name in spared), name


def test_every_parameter_decays_where_all_shall() -> None:
    made = optimizer_of(Optim(weight_decay=0.5), (model := small()).named_parameters(), model.undecayed())  # type: ignore[operator]
    assert [group["weight_decay"] for group in made.param_groups] == [0.5]
    assert len(made.param_groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", EVERY)
def test_every_state_is_begun_as_the_optimizer_would_begin_it(optimizer: str, momentum: float) -> None:
    optim = Optim(optimizer=optimizer, momentum=momentum)  # type: ignore[arg-type]

    def trained(begun: bool) -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((3, 4), (5,), (2, 3, 2, 2))]
        made = optimizer_of(optim, [(str(i), p) for i, p in enumerate(parameters)], set())
        for parameter in parameters if begun else ():
            if state := state_after(optim, parameter.detach(), 0):
                made.state[parameter] = state
        for group in made.param_groups:
            group["lr"] = 0.1
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            made.step()
        kept = [made.state[p][name] for p in parameters for name in (*states_of(optim), *factored_of(optim, p.shape))]
        return [p.detach() for p in parameters] + kept

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained(True), trained(False), strict=True))


@given(st.floats(0, 1, exclude_max=True), st.lists(st.floats(-10, 10), min_size=1, max_size=5))
def test_every_average_is_what_is_kept_of_it_and_the_rest_of_the_weights(kept: float, weights: list[float]) -> None:
    average, expected = [torch.tensor([1.0], dtype=torch.float64)], 1.0
    for weight in weights:
        follow(average, [torch.tensor([weight], dtype=torch.float64)], kept)
        expected = kept * expected + (1 - kept) * weight
    assert float(average[0]) == pytest.approx(expected, abs=1e-12)
