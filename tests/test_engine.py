"""A model under DeepSpeed computes as if it were alone, whatever is divided, left out, recomputed or gone on from.

Real DeepSpeed on gloo, in processes that stay from test to test.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.architectures import Architecture, Cmt, Efficientnet, Maxvit
from pipeline.config import Config, Data, Optim, Suppression, Vit
from pipeline.data.loader import Batch
from pipeline.train import blocks, engine
from pipeline.train.engine import Engine, Fragment
from pipeline.train.norms import BatchNorm, exact
from pipeline.train.objective import Objective
from pipeline.train.run import build
from pipeline.world import World
from tests.gang import Gang

pytestmark = pytest.mark.timeout(600)  # the first test waits for six processes to start
CPU = torch.device("cpu")
VIT = Vit(width=16, depth=2, heads=2, hidden=32, patch=4, image_size=12)
EVERY = [(zero, precision) for zero in range(4) for precision in ("fp32", "bf16") if zero or precision == "fp32"]
OPTIMS = (
    Optim(lr=3e-3, warmup=0, weight_decay=0.05, average=0.9, decayed="matrices"),
    Optim(optimizer="sgd", lr=3e-2, warmup=0, weight_decay=0.01),
)
BATCH = 12
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def gangs() -> Iterator[dict[int, Gang]]:
    made = {size: Gang(size) for size in (1, 2, 3)}
    yield made
    for gang in made.values():
        gang.close()


@pytest.fixture(scope="module")
def two(gangs: dict[int, Gang]) -> Gang:
    return gangs[2]


def config(**changes: Any) -> Config:
    made = Config(
        name="tiny", classes=3, model=VIT, data=Data(lanes=12), optim=OPTIMS[0], objective="softmax",
        batch=BATCH, micro_batch=2, zero=2, precision="fp32",
    )  # fmt: skip
    made = replace(made, **changes)
    made.check(1)
    return made


class Run:
    """Steps on pictures that depend on the step alone, cut among the processes."""

    def __init__(self, world: World, chosen: Config) -> None:
        self.world, self.config = world, chosen
        settings = engine.settings
        # Small models have only parameters that stage 3 would leave whole.
        whole = {"stage3_param_persistence_threshold": 0} if chosen.zero == 3 else {}

        def changed(given: Config, processes: int) -> dict[str, Any]:
            made = settings(given, processes)
            return {**made, "zero_optimization": {**made["zero_optimization"], **whole}}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "settings", changed)
            model = build(chosen)
            # A head of zeros lets no gradient through, and of what rounding leaves Adam makes large steps.
            for name, parameter in model.named_parameters():
                if name.endswith(("head.weight", "classifier.weight", "fc.weight")):
                    nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(5))
            self.engine = Engine(chosen, model, world, CPU)

    def step(self, number: int, spoil: float | None = None, rate: float | None = None) -> float:
        """The loss of a step, which may be spoilt by a picture of such pixels on the last process."""
        chosen, world = self.config, self.world
        images, labels = batch(number, chosen.model.image_size)
        if spoil is not None:
            images[-1] = spoil
        share = world.share(BATCH)
        self.engine.set_rate(chosen.optim.lr if rate is None else rate)
        self.engine.seed(number)
        losses, size = [], chosen.micro(world.size)
        for first in range(share.start, share.stop, size):
            logits = self.engine.forward(images[first : first + size]).float()
            losses.append(cross_entropy(logits, labels[first : first + size]))
            self.engine.backward(losses[-1])
            self.engine.step()
        return float(self.engine.mean(torch.stack(losses).detach().mean()))

    def everything(self) -> Weights:
        """All that a step may change, as this process sees it."""
        states = {
            f"{f.parameter}/{f.start}/{name}": v.clone() for f in self.engine._own() for name, v in f.states.items()
        }
        compute = {f"computes/{name}": p.detach().clone() for name, p in self.engine.model.named_parameters()}
        steps = {str(i): s["step"].clone() for i, s in enumerate(self.engine._base.state.values()) if "step" in s}
        return states | compute | steps | self.engine.buffers() | self.engine.extra()


def batch(number: int, size: int) -> tuple[Tensor, Tensor]:
    """(12, 3, s, s) and labels (12), of which 0 is the most frequent."""
    draw = torch.Generator().manual_seed(number)
    labels = (torch.randint(0, 6, (BATCH,), generator=draw) - 3).clamp(min=0)
    images = torch.randn(BATCH, 3, size, size, generator=draw) + labels[:, None, None, None]
    return images, labels


def same(ours: Weights, theirs: Weights) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def furthest(ours: Weights, theirs: Weights) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)


# --- the same losses ------------------------------------------------------------------------------------------------


def trained(world: World, chosen: Config, steps: int = 4) -> tuple[list[float], Weights]:
    run = Run(world, chosen)
    losses = [run.step(number) for number in range(steps)]
    return losses, run.engine.raw_weights()


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMS, ids=lambda optim: optim.optimizer)
def test_every_stage_has_the_same_losses_whatever_the_processes(gangs: dict[int, Gang], optim: Optim) -> None:
    alone, _ = gangs[1].run(trained, config(zero=0, optim=optim))[0]
    assert alone[-1] < alone[0]
    for size, zero in product((2, 3), range(4)):
        losses, _ = gangs[size].run(trained, config(zero=zero, optim=optim))[0]
        assert losses == pytest.approx(alone, rel=1e-5), (size, zero)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_stage_computes_the_same_with_its_state_on_the_cpu(two: Gang, zero: int) -> None:
    ours, theirs = (two.run(trained, config(zero=zero, offload=offload)) for offload in (True, False))
    assert ours[0][0] == pytest.approx(theirs[0][0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_a_model_computes_the_same_whether_its_activations_are_kept_or_recomputed(two: Gang, zero: int) -> None:
    model = replace(VIT, dropout=0.2, stochastic_depth=0.2)
    ours, theirs = (two.run(trained, config(zero=zero, model=model, recompute=again))[0] for again in (True, False))
    assert ours[0] == theirs[0] and same(ours[1], theirs[1])


NORMED: dict[str, Architecture] = {
    "cmt": Cmt((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2), (8, 4, 2, 1), stem=8, features=32, image_size=32),
    "maxvit": Maxvit(stem=8, widths=(32, 32), depths=(1, 1), window=2, image_size=32),
    "efficientnet": Efficientnet(width=0.25, depth=0.3, image_size=32),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", NORMED)
def test_every_batch_norm_counts_a_batch_once_whether_it_is_recomputed_or_not(two: Gang, family: str) -> None:
    chosen = config(zero=2, model=NORMED[family], micro_batch=3)
    ours, theirs = (two.run(trained, replace(chosen, recompute=again), 2)[0] for again in (True, False))
    assert ours[0] == theirs[0] and same(ours[1], theirs[1])


def compiled_and_not(world: World, chosen: Config) -> list[list[float]]:
    return [trained(world, replace(chosen, compiled=compiled))[0] for compiled in (True, False)]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_compute_what_plain_ones_do(gangs: dict[int, Gang], recompute: bool) -> None:
    ours, theirs = gangs[1].run(compiled_and_not, config(zero=2, recompute=recompute))[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "recompute"), [(True, False), (False, True), (True, True)])
def test_wrapped_blocks_keep_the_names_of_their_weights_and_their_hooks(compiled: bool, recompute: bool) -> None:
    for chosen in (VIT, *NORMED.values()):
        model = build(config(model=chosen))
        names = list(model.state_dict())
        exact(model, everywhere=False)
        blocks.wrap(model, compiled=compiled, recompute=recompute)
        assert list(model.state_dict()) == names
        assert all("forward" in vars(block) for block in blocks.blocks_of(model)) and blocks.blocks_of(model)


def learnt(world: World, chosen: Config) -> list[float]:
    """Losses of the run's objective, whose hooks look into the model."""
    run = Run(world, chosen)
    objective, losses = Objective(chosen, run.engine), []
    for number in range(3):
        draw, share = torch.Generator().manual_seed(number), world.share(BATCH)
        pixels = torch.randint(0, 256, (BATCH, 12, 12, 3), generator=draw, dtype=torch.uint8)[share.start : share.stop]
        labels = batch(number, 12)[1][share.start : share.stop, None]
        ones, zeros = torch.ones(len(share)), torch.zeros(len(share), dtype=torch.long)
        given = Batch(pixels, labels, torch.arange(BATCH)[share.start : share.stop], ones, zeros)
        run.engine.set_rate(1e-3)
        loss = objective(given)
        run.engine.backward(loss)
        run.engine.step()
        losses.append(float(run.engine.mean(loss.detach())))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "suppression"])
def test_every_objective_sees_into_a_model_that_is_divided_or_recomputed(two: Gang, kind: str) -> None:
    suppression = Suppression(cosine=0.3, contrastive=0.3, mixing=0.0)
    chosen = config(micro_batch=BATCH, **({"objective": kind} if kind == "masked" else {"suppression": suppression}))
    expected = two.run(learnt, chosen)[0]
    for changes in ({"recompute": True}, {"zero": 3}, {"zero": 3, "recompute": True}):
        if kind == "masked" and "zero" in changes:
            with pytest.raises(ValueError, match="objective masked looks inside the model: use zero 1 or 2"):
                replace(chosen, **changes).check(2)
            continue
        assert two.run(learnt, replace(chosen, **changes))[0] == pytest.approx(expected, rel=1e-5), changes


# --- going on -------------------------------------------------------------------------------------------------------


def saved_midway(world: World, chosen: Config) -> tuple[list[float], int, list[Fragment], Weights, Weights, Weights]:
    """The losses of six steps, and what was saved after three: with copies, since training goes on."""
    run = Run(world, chosen)
    losses = [run.step(number) for number in range(3)]
    held, steps = run.engine, run.engine.optimizer_steps()
    copies = [replace(f, states={name: v.clone() for name, v in f.states.items()}) for f in held.fragments()]
    extra, buffers = held.extra(), held.buffers()
    losses += [run.step(number) for number in range(3, 6)]
    return losses, steps, copies, extra, buffers, held.weights()


def gone_on(
    world: World, chosen: Config, steps: int, fragments: list[Fragment], extra: Weights, buffers: Weights
) -> tuple[list[float], Weights]:
    run = Run(world, chosen)
    wanted = run.engine.prepare_restore(steps)
    for fragment in wanted:
        filled = torch.zeros(fragment.length, dtype=torch.bool)
        for other in (f for f in fragments if f.parameter == fragment.parameter):
            first, last = (
                max(fragment.start, other.start),
                min(fragment.start + fragment.length, other.start + other.length),
            )
            if first < last:
                assert fragment.states.keys() == other.states.keys()
                for name, values in fragment.states.items():
                    values[first - fragment.start : last - fragment.start] = other.states[name][
                        first - other.start : last - other.start
                    ]
                filled[first - fragment.start : last - fragment.start] = True
        assert filled.all()
    run.engine.load_extra(extra)
    run.engine.load_buffers(buffers)
    run.engine.restored()
    assert run.engine.optimizer_steps() == steps
    return [run.step(number) for number in range(3, 6)], run.engine.weights()


def numbers(fragments: list[Fragment]) -> int:
    return sum(fragment.length for fragment in fragments)


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMS, ids=lambda optim: optim.optimizer)
@pytest.mark.parametrize("zero", range(4))
def test_a_run_goes_on_from_its_fragments_as_if_it_had_not_stopped(
    gangs: dict[int, Gang], zero: int, optim: Optim
) -> None:
    chosen = config(zero=zero, optim=optim)
    parameters = sum(parameter.numel() for parameter in build(chosen).parameters())
    answers = gangs[2].run(saved_midway, chosen)
    losses, steps, _, extra, buffers, weights = answers[0]
    fragments = [fragment for answer in answers for fragment in answer[2]]
    assert numbers(fragments) == parameters, "every number is saved once, and no padding"
    again, weights_again = gangs[2].run(gone_on, chosen, steps, fragments, extra, buffers)[0]
    assert again == losses[3:] and same(weights_again, weights)
    for size in (1, 3):
        elsewhere, _ = gangs[size].run(gone_on, chosen, steps, fragments, extra, buffers)[0]
        assert elsewhere == pytest.approx(losses[3:], rel=1e-5), size


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_run_in_half_precision_goes_on_at_any_number_of_processes(gangs: dict[int, Gang], zero: int) -> None:
    chosen = config(zero=zero, precision="bf16")
    answers = gangs[2].run(saved_midway, chosen)
    losses, steps, _, extra, buffers, weights = answers[0]
    fragments = [fragment for answer in answers for fragment in answer[2]]
    again, weights_again = gangs[2].run(gone_on, chosen, steps, fragments, extra, buffers)[0]
    assert again == losses[3:] and same(weights_again, weights)
    elsewhere, _ = gangs[3].run(gone_on, chosen, steps, fragments, extra, buffers)[0]
    assert elsewhere == pytest.approx(losses[3:], rel=2e-2)


def test_adafactor_goes_on_as_if_it_had_not_stopped(gangs: dict[int, Gang]) -> None:
    chosen = config(zero=0, optim=Optim(optimizer="adafactor", lr=1e-2, warmup=0, average=0.9))
    answers = gangs[2].run(saved_midway, chosen)
    losses, steps, _, extra, buffers, weights = answers[0]
    fragments = [fragment for answer in answers for fragment in answer[2]]
    assert any("row_var" in name for name in extra)
    again, weights_again = gangs[2].run(gone_on, chosen, steps, fragments, extra, buffers)[0]
    assert again == losses[3:] and same(weights_again, weights)


# --- what is left out -----------------------------------------------------------------------------------------------


def spoilt(world: World, chosen: Config, how: str) -> tuple[list[bool], list[int], bool, list[Any]]:
    """Four good steps with a bad one after the second: what was skipped, updates so far, whether all stayed as it was,
    and that it went on as a run without the bad step did."""
    run, quiet = Run(world, chosen), Run(world, chosen)
    skipped: list[bool] = []
    counts: list[int] = []

    def note(of: Run) -> None:
        skipped.append(of.engine.skipped)
        counts.append(of.engine.optimizer_steps())

    if how == "at once":  # before there has been any update
        before = run.everything()
        run.step(9, spoil=float("nan"))
        note(run)
        unchanged = same(before, run.everything())
    else:
        for number in range(2):
            run.step(number)
            note(run)
        before = run.everything()
        if how == "spike":
            run.engine.loss_guard(torch.tensor(1e-3))
        run.step(9, spoil={"nan": float("nan"), "inf": float("inf")}.get(how))
        run.engine.loss_guard(None)
        note(run)
        unchanged = same(before, run.everything())
    first = 0 if how == "at once" else 2
    ours = [run.step(number) for number in range(first, 4)]
    note(run)
    theirs = [quiet.step(number) for number in range(4)][first:]
    return skipped, counts, unchanged and same(run.everything(), quiet.everything()), [ours == theirs]


BAD = [
    *((*each, "nan") for each in EVERY),
    *((*each, "spike") for each in EVERY if each[1] == "fp32"),
    *((zero, "fp32", how) for zero in (0, 2) for how in ("inf", "at once")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "precision", "how"), BAD)
def test_a_bad_step_leaves_everything_as_if_it_had_not_been(two: Gang, zero: int, precision: str, how: str) -> None:
    bad = [True, False] if how == "at once" else [False, False, True, False]
    counts = [0, 4] if how == "at once" else [1, 2, 2, 4]
    for answer in two.run(spoilt, config(zero=zero, precision=precision), how):
        assert answer == (bad, counts, True, [True])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_a_bad_step_with_the_state_on_the_cpu_leaves_everything_as_it_was(two: Gang, zero: int) -> None:
    for answer in two.run(spoilt, config(zero=zero, offload=True), "nan"):
        assert answer == ([False, False, True, False], [1, 2, 2, 4], True, [True])


def test_a_bad_step_leaves_running_statistics_as_if_it_had_not_been(two: Gang) -> None:
    for answer in two.run(spoilt, config(zero=2, model=NORMED["efficientnet"], micro_batch=3), "nan"):
        assert answer == ([False, False, True, False], [1, 2, 2, 4], True, [True])


def guarded(world: World, chosen: Config) -> list[bool]:
    """Whether steps are left out at limits around the loss of all processes' pictures."""
    skipped = []
    for share in (0.999, 1.001):
        run = Run(world, chosen)
        loss = Run(world, chosen).step(0)
        run.engine.loss_guard(torch.tensor(loss * share))
        run.step(0)
        skipped.append(run.engine.skipped)
    return skipped


@pytest.mark.parametrize("zero", [0, 2])
def test_every_process_agrees_on_a_spike_by_the_mean_of_all(two: Gang, zero: int) -> None:
    assert two.run(guarded, config(zero=zero)) == [[True, False]] * 2


# --- optimizers and the average -------------------------------------------------------------------------------------


def by_hand(chosen: Config, steps: int) -> tuple[Weights, Weights]:
    """Weights and their average after steps of torch's SGD on whole batches, clipped."""
    model, optim = build(chosen), chosen.optim
    nn.init.normal_(model.head.weight, std=0.3, generator=torch.Generator().manual_seed(5))  # type: ignore[arg-type]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    momentum = {name: torch.zeros_like(value) for name, value in weights.items()}
    average = {name: value.clone() for name, value in weights.items()}
    for number in range(steps):
        images, labels = batch(number, 12)
        model.load_state_dict(weights)
        model.zero_grad()
        cross_entropy(model(images), labels).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        for name, gradient in gradients.items():
            scaled = gradient / max(1.0, float(norm) / optim.clip)
            momentum[name] = optim.momentum * momentum[name] + scaled + optim.weight_decay * weights[name]
            weights[name] = weights[name] - optim.lr * momentum[name]
            average[name] = optim.average * average[name] + (1 - optim.average) * weights[name]
    return weights, average


def with_average(world: World, chosen: Config) -> tuple[Weights, Weights, Tensor, Tensor, bool]:
    """Both sets of weights after four steps, what the model says with the average, and whether it is itself after."""
    run = Run(world, chosen)
    for number in range(4):
        run.step(number)
    before = run.everything()
    images = batch(0, 12)[0].to(run.engine.dtype)
    with torch.no_grad(), run.engine.averaged():
        said = run.engine.model(images).float()
    plain = build(chosen)
    plain.load_state_dict(run.engine.weights())
    with torch.no_grad():
        expected = plain.to(run.engine.dtype)(images).float()
    return run.engine.raw_weights(), run.engine.weights(), said, expected, same(before, run.everything())


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_every_stage_does_by_sgd_and_the_average_what_is_done_by_hand(two: Gang, zero: int) -> None:
    chosen = config(zero=zero, optim=replace(OPTIMS[1], average=0.8, clip=0.5))
    weights, average = by_hand(chosen, 4)
    for raw, averaged, said, expected, itself in two.run(with_average, chosen):
        assert furthest(raw, weights) < 1e-5 and furthest(averaged, average) < 1e-5
        assert furthest(raw, averaged) > 1e-3
        assert torch.allclose(said, expected, atol=1e-5) and itself


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_average_is_fp32_whatever_the_weights_that_compute(two: Gang, zero: int) -> None:
    chosen = config(zero=zero, precision="bf16")
    for _, averaged, said, expected, itself in two.run(with_average, chosen):
        assert all(value.dtype == torch.float32 for value in averaged.values())
        assert torch.allclose(said, expected, atol=1e-6) and itself


def clipped(world: World, chosen: Config, clip: float) -> tuple[float, float]:
    run = Run(world, chosen)
    before = run.engine.raw_weights()
    run.engine.set_clip(clip)
    run.step(0, rate=1.0)
    after = run.engine.raw_weights()
    moved = torch.stack([(after[name] - before[name]).norm() for name in after]).norm()
    return float(moved), float(run.engine.gradient_norm)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_a_clip_that_is_set_in_mid_run_is_the_norm_of_the_next_gradient(two: Gang, zero: int) -> None:
    chosen = config(zero=zero, optim=Optim(optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=1.0))
    for clip in (0.01, 0.0):
        for moved, norm in two.run(clipped, chosen, clip):
            assert moved == pytest.approx(clip or norm, rel=1e-3)


# --- batch norms ----------------------------------------------------------------------------------------------------


def normalised(world: World, dtype: torch.dtype) -> tuple[Weights, Weights]:
    """Outputs and gradients of this process's share of the pictures, and of all; the statistics."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 5, 3, 2, generator=draw) * 3 + 1
    pull = torch.randn(BATCH, 5, 3, 2, generator=draw)
    model = nn.Sequential(nn.BatchNorm2d(5, momentum=0.3))
    nn.init.normal_(model[0].weight, generator=draw)  # type: ignore[arg-type]
    exact(model, everywhere=True)
    model[0].to(dtype)
    model[0].running_mean, model[0].running_var = torch.zeros(5), torch.ones(5)  # type: ignore[assignment]
    share = world.share(BATCH)
    given = images[share.start : share.stop].to(dtype).requires_grad_()
    output = model(given)
    (output.float() * pull[share.start : share.stop]).sum().backward()
    assert given.grad is not None and isinstance(model[0], BatchNorm)
    each = {"output": output.detach(), "gradient": given.grad}
    return each, {"weight": model[0].weight.grad, "bias": model[0].bias.grad, **dict(model.named_buffers())}  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_global_batch_norm_normalises_as_if_one_process_had_all_pictures(
    gangs: dict[int, Gang], dtype: torch.dtype
) -> None:
    near = 1e-5 if dtype == torch.float32 else 5e-2
    each, whole = gangs[1].run(normalised, dtype)[0]
    for size in (2, 3):
        answers = gangs[size].run(normalised, dtype)
        for name, value in each.items():
            assert torch.allclose(torch.cat([a[0][name] for a in answers]), value, atol=near), name
        for name in ("weight", "bias"):
            assert torch.allclose(torch.stack([a[1][name] for a in answers]).sum(0), whole[name], atol=10 * near), name
        for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
            assert all(torch.allclose(a[1][name], whole[name], rtol=1e-5) for a in answers), name


def test_a_model_with_global_batch_norms_trains_as_if_one_process_had_all_pictures(gangs: dict[int, Gang]) -> None:
    model = replace(NORMED["efficientnet"], dropout=0.0, stochastic_depth=0.0)
    chosen = config(zero=2, model=model, micro_batch=BATCH, batch_norm="global", optim=OPTIMS[1])
    losses, weights = gangs[1].run(trained, chosen, 3)[0]
    ours, others = gangs[2].run(trained, chosen, 3)[0]
    assert ours == pytest.approx(losses, rel=1e-4)
    running = [name for name in weights if "running" in name]
    assert running and furthest({n: weights[n] for n in running}, {n: others[n] for n in running}) < 1e-3


def statistics(world: World, chosen: Config) -> Weights:
    run = Run(world, chosen)
    run.step(0)
    return {name: value for name, value in run.engine.buffers().items() if value.is_floating_point()}


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_running_statistics_are_fp32_whatever_the_weights_that_compute(two: Gang, zero: int) -> None:
    half = two.run(statistics, config(zero=zero, model=NORMED["cmt"], precision="bf16"))[0]
    whole = two.run(statistics, config(zero=2, model=NORMED["cmt"]))[0]
    assert all(value.dtype == torch.float32 for value in half.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in half.values())
    assert all(torch.allclose(half[name], whole[name], rtol=0.1, atol=0.1) for name in whole)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"zero": 0, "precision": "bf16"}, "use zero 1 or 2, or precision fp32"),
        ({"zero": 0, "offload": True}, "offload .* needs zero 1, 2 or 3"),
        ({"zero": 3, "compiled": True}, "compiled needs zero 0 to 2"),
        ({"zero": 1, "optim": Optim(optimizer="adafactor")}, "use zero 0 with precision fp32, or adamw or sgd"),
        ({"optim": Optim(lr=-1.0)}, r"optim.lr is -1.0; at least 0"),
        ({"optim": Optim(timescale=0)}, r"optim.timescale is 0; at least 1"),
        ({"optim": Optim(average=1.0)}, r"optim.average is 1.0; it is a share"),
        ({"optim": Optim(betas=(0.9, 1.0))}, r"optim.betas is 1.0; it is a share"),
    ],
)
def test_every_misfit_is_refused_with_what_would_do(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**changes)
