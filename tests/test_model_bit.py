"""BiT: wired as timm's, counted exactly, begun as in the paper's code, whatever the size of the pictures."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pipeline.architectures import bit as presets
from pipeline.architectures.bit import Bit
from pipeline.models.bit import ResNetV2, Unit, initialise
from pipeline.models.flops import bit as flops
from pipeline.models.standardised import StandardisedConv2d, standardise
from tests import timm
from tests.parity import passed

pytestmark = pytest.mark.timeout(300)

SMALL = Bit((1, 2, 1, 1), 1, 32)
PUBLISHED = {  # parameters with 1000 classes, and multiply-accumulates of 224 x 224 pixels in units of 10^9
    "bit_r50x1": (25_549_352, 4.089),
    "bit_r50x3": (217_319_080, 36.082),
    "bit_r101x1": (44_541_480, 7.801),
    "bit_r101x3": (387_934_888, 69.492),
    "bit_r152x2": (236_335_208, 45.814),
    "bit_r152x4": (936_533_224, 182.777),
}


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=drawn(1))


@torch.no_grad()
def built(config: Bit = SMALL, classes: int = 7) -> ResNetV2:
    """In fp64, with weights drawn so that each of them counts, the head's too."""
    model = ResNetV2(config, classes).double()
    generator = drawn()
    for parameter in model.parameters():
        nn.init.normal_(parameter, float(parameter.ndim == 1), 0.3, generator=generator)
    return model


def beside(config: Bit, classes: int) -> Any:
    """timm's model of the same wiring, in fp64, with the epsilon of the paper's code."""
    module: Any = timm.load("timm.models.resnetv2")
    wiring = {"stem_type": "fixed", "width_factor": config.factor, "num_classes": classes}
    model = module.ResNetV2(list(config.units), **wiring).double()
    for each in model.modules():
        if isinstance(each, module.StdConv2d):
            each.eps = 1e-10
    return model


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "height", "width"),
    [(SMALL, 32, 32), (SMALL, 45, 64), (replace(SMALL, factor=2), 33, 31), (presets.bit_r50x1, 64, 40)],
    ids=["small", "oblong", "twice as wide", "R50x1"],
)
def test_every_output_and_gradient_is_as_if_timm_had_computed_it(config: Bit, height: int, width: int) -> None:
    ours, theirs = built(config), beside(config, 7)
    theirs.load_state_dict(ours.state_dict())
    pictures = images(2, height, width).double()
    toward = torch.randn(2, 7, generator=drawn(2), dtype=torch.float64)
    found = [passed(model, pictures, toward) for model in (ours, theirs)]
    assert list(found[0]) == list(found[1])
    for name, value in found[0].items():
        assert float((value - found[1][name]).norm() / value.norm()) < 1e-8, name
    assert float(found[0]["logits"].std(0).min()) > 0.01


def test_every_model_of_timm_takes_our_weights_as_they_are_named() -> None:
    ours, theirs = ResNetV2(presets.bit_r50x1, 1000), timm.load("timm").create_model("resnetv2_50x1_bit")
    initialise(ours, drawn())
    assert ours.head
    nn.init.normal_(ours.head.fc.weight, generator=drawn(3))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    pictures = images(1, 64, 64)
    found, expected = ours.eval()(pictures).detach(), theirs.eval()(pictures).detach()
    # timm adds 1e-8 to the variance of the weights, which is about 1/4608 in the widest filters here.
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert (
        ours.forward_features(pictures)
        .tokens.mT.unflatten(2, (2, 2))
        .allclose(theirs.forward_features(pictures), atol=1e-3)
    )


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_its_number_of_parameters_and_multiplications(name: str) -> None:
    config, (parameters, gigas) = getattr(presets, name), PUBLISHED[name]
    assert flops.parameters(config, 1000) == parameters
    assert flops.macs(config, 1000) / 1e9 == pytest.approx(gigas, rel=1e-3)


def test_every_multiplication_of_a_larger_picture_is_counted() -> None:
    for name, side, gigas in (("r50x1", 448, 16.351), ("r101x3", 448, 277.951), ("r152x4", 480, 839.254)):
        config = replace(getattr(presets, f"bit_{name}"), image_size=side)
        assert flops.macs(config, 1000) / 1e9 == pytest.approx(gigas, rel=1e-3)


def test_every_preset_of_every_depth_and_width_is_counted_as_if_built() -> None:
    depths = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3), "200": (3, 24, 36, 3)}
    for depth, units in depths.items():
        for factor in (1, 2, 3, 4):
            config = getattr(presets, f"bit_r{depth}x{factor}")
            assert config == Bit(units, factor, 224)
            with torch.device("meta"):
                model = ResNetV2(config, 10)
            assert sum(each.numel() for each in model.parameters()) == flops.parameters(config, 10)
            assert len(model.blocks) == sum(units)


sizes = st.builds(
    Bit,
    units=st.tuples(*[st.integers(1, 3)] * 4),
    factor=st.integers(1, 3),
    image_size=st.integers(1, 200),
)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(sizes, st.integers(0, 20))
def test_every_count_is_torchs_own_whatever_the_configuration(config: Bit, classes: int) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = ResNetV2(config, classes)
        model(torch.empty(2, 3, config.image_size, config.image_size))
    assert sum(each.numel() for each in model.parameters()) == flops.parameters(config, classes)
    assert 2 * 2 * flops.macs(config, classes) == counter.get_total_flops()


# --- standardised weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels last"])
@pytest.mark.parametrize("side", [1, 3, 7])
def test_every_filter_is_standardised_as_if_by_hand(side: int, layout: torch.memory_format) -> None:
    weight = torch.randn(5, 6, side, side, generator=drawn(), dtype=torch.float64).mul(3).add(2)
    weight = weight.to(memory_format=layout).requires_grad_()
    found = standardise(weight, 0.25)
    assert found.is_contiguous(memory_format=layout)
    by_hand = torch.stack([(each - each.mean()) / (each.var(correction=0) + 0.25).sqrt() for each in weight])
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-12)
    toward = torch.randn(weight.shape, generator=drawn(1), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((found * toward).sum(), weight),
        torch.autograd.grad((by_hand * toward).sum(), weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@given(st.floats(0.1, 10), st.floats(-1, 1))
@settings(max_examples=20, deadline=None)
def test_every_convolution_forgets_the_scale_and_the_mean_of_its_weights(scale: float, mean: float) -> None:
    convolution = StandardisedConv2d(4, 8, 3, 2).double()
    assert convolution.bias is None
    nn.init.normal_(convolution.weight, generator=drawn(1))
    x = torch.randn(2, 4, 9, 7, generator=drawn(), dtype=torch.float64)
    before = convolution(x)
    torch.testing.assert_close(before, conv2d(x, standardise(convolution.weight, 1e-10), stride=2, padding=1))
    with torch.no_grad():
        convolution.weight.mul_(scale).add_(mean)
    torch.testing.assert_close(convolution(x), before, rtol=1e-6, atol=1e-6)


def test_every_statistic_of_half_precision_is_as_if_of_full_precision() -> None:
    weight = torch.randn(4, 512, 3, 3, generator=drawn()).mul(1e-2).add(1e-2).bfloat16()
    found, expected = standardise(weight, 1e-10), standardise(weight.double(), 1e-10)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


# --- initialisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_weight_begins_as_in_the_code_of_the_paper() -> None:
    model = ResNetV2(SMALL, 10)
    for parameter in model.parameters():
        parameter.fill_(5.0)
    initialise(model, drawn(), head_bias=-10.0)
    assert model.head and not model.head.fc.weight.any() and (model.head.fc.bias == -10).all()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == name.endswith("weight")).all()
        elif "conv" in name:
            fan_in = parameter[0].numel()
            assert float(parameter.std()) == pytest.approx(fan_in**-0.5, rel=0.05), name
            assert float(parameter.abs().max()) <= 2 / 0.879 * fan_in**-0.5


def test_every_weight_follows_from_the_generator_alone() -> None:
    states = []
    for noise, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(noise)
        model = ResNetV2(SMALL, 7)
        initialise(model, drawn(seed))
        states.append(model.state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    convolutions = {name for name in first if "conv" in name}
    assert {name for name in first if not torch.equal(first[name], other[name])} == convolutions


def test_every_new_model_gives_every_class_its_head_bias() -> None:
    model = ResNetV2(SMALL, 7)
    initialise(model, drawn(), head_bias=-10.0)
    assert torch.equal(model(images(3)), torch.full((3, 7), -10.0))


# --- forward pass ---------------------------------------------------------------------------------------------------

MODEL = built().requires_grad_(False)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 100), st.integers(1, 100))
def test_every_size_and_shape_gives_a_place_for_each_32_pixels(height: int, width: int) -> None:
    features = MODEL.forward_features(images(2, height, width).double())
    assert features.grid == (math.ceil(height / 32), math.ceil(width / 32)) and features.prefix == 0
    assert features.tokens.shape == (2, features.grid[0] * features.grid[1], SMALL.channels[-1])
    assert features.patches.isfinite().all() and features.tokens.amin() == 0


def test_every_token_is_of_the_place_where_the_picture_changed() -> None:
    pictures = images(1, 256, 512).double()
    changed = pictures.clone()
    changed[:, :, 200:, 480:] += 1e-3  # far from the other corner's field of view, but not from GroupNorm's means
    before, after = MODEL.forward_features(pictures), MODEL.forward_features(changed)
    moved = (after.tokens - before.tokens).norm(dim=2).unflatten(1, before.grid)[0]
    assert divmod(int(moved.flatten().argmax()), before.grid[1]) in {(row, 15) for row in (6, 7)}


def test_every_logit_is_the_heads_of_the_mean_over_places() -> None:
    pictures = images(3, 64, 96).double()
    pooled = MODEL.forward_features(pictures).tokens.mean(1)
    assert MODEL.head
    torch.testing.assert_close(MODEL(pictures), linear(pooled, MODEL.head.fc.weight.flatten(1), MODEL.head.fc.bias))
    headless = ResNetV2(SMALL, 0).double()
    headless.load_state_dict({name: value for name, value in MODEL.state_dict().items() if "head" not in name})
    assert headless.head is None
    torch.testing.assert_close(headless(pictures), pooled)


def test_every_picture_of_a_batch_is_as_if_alone_in_training_too() -> None:
    pictures = images(4, 40, 64).double()
    together = MODEL.train()(pictures)
    for row, picture in zip(together, pictures, strict=True):
        torch.testing.assert_close(MODEL(picture[None])[0], row, rtol=1e-9, atol=1e-9)
    assert float((together[1:] - together[0]).abs().amin(1).max()) > 1e-3


def test_every_border_of_the_pooling_is_zero_as_in_the_paper() -> None:
    stem = built().stem
    negative = -torch.ones(1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        stem.conv.weight.copy_(stem.conv.weight.abs())
    stem.conv.forward = lambda input: torch.full((1, 64, 8, 8), -1.0, dtype=torch.float64)
    pooled = stem(negative)
    assert pooled.shape == (1, 64, 4, 4)
    assert not pooled[:, :, 0].any() and not pooled[:, :, :, 0].any() and (pooled[:, :, 1:, 1:] == -1).all()


def test_every_layout_in_memory_gives_the_same() -> None:
    model, pictures = built(), images(2, 64, 64).double()
    plain = model(pictures)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    turned = model(pictures.to(memory_format=torch.channels_last))
    torch.testing.assert_close(turned, plain, rtol=1e-9, atol=1e-9)


def test_every_pass_of_half_precision_is_near_that_of_full_precision() -> None:
    model = ResNetV2(SMALL, 7)
    initialise(model, drawn())
    assert model.head
    nn.init.normal_(model.head.fc.weight, std=0.02, generator=drawn(4))
    pictures = images(2, 64, 64)
    full = model(pictures).detach()
    half = model.bfloat16()(pictures.bfloat16()).detach()
    assert half.dtype == torch.bfloat16
    assert float((half.float() - full).norm() / full.norm()) < 0.05


def test_every_block_can_be_computed_anew_for_its_gradient() -> None:
    """Activation checkpointing of `blocks`, as if it were not there."""
    model, pictures = built(), images(2).double()
    model(pictures).square().sum().backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    blocks = model.blocks
    assert len(blocks) == 5 and all(isinstance(block, Unit) for block in blocks)
    for block in blocks:
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    model(pictures).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plain[name])  # type: ignore[arg-type]


def test_every_compiled_pass_is_the_eager_one_without_a_break() -> None:
    torch.compiler.reset()
    compiled = torch.compile(MODEL, backend="aot_eager", fullgraph=True)
    pictures = images(2).double()
    torch.testing.assert_close(compiled(pictures), MODEL(pictures))
    torch.compiler.reset()


def test_every_norm_and_bias_is_left_alone_by_weight_decay_and_no_other() -> None:
    names = {name for name, _ in MODEL.named_parameters()}
    left = MODEL.undecayed()
    assert left == {name for name in names if "norm" in name or name == "head.fc.bias"}
    assert {name for name in names - left if "conv" not in name} == {"head.fc.weight"}


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "named"),
    [(Bit((3, 4, 0, 3)), "units"), (Bit(factor=0), "factor"), (Bit(image_size=0), "image_size")],
)
def test_every_model_that_cannot_be_is_refused_by_name(config: Bit, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} is .*at least 1"):
        ResNetV2(config, 7)
