"""EfficientNet: scaled as the paper says, wired as timm's in both its paddings, counted exactly."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pipeline.architectures import efficientnet as presets
from pipeline.architectures.efficientnet import Efficientnet, efficientnet_b0
from pipeline.models.efficientnet import Bottleneck, EfficientNet, SameConv2d, StochasticDepth, initialise
from pipeline.models.flops import efficientnet as flops
from tests import timm
from tests.parity import passed

pytestmark = pytest.mark.timeout(300)

SMALL = Efficientnet(width=0.25, depth=0.5, image_size=32, dropout=0.0, stochastic_depth=0.0)
PUBLISHED = {  # side in pixels, parameters with 1000 classes, multiply-accumulates in units of 10^9
    "b0": (224, 5_288_548, 0.386),
    "b1": (240, 7_794_184, 0.687),
    "b2": (260, 9_109_994, 0.994),
    "b3": (300, 12_233_232, 1.827),
    "b4": (380, 19_341_616, 4.394),
    "b5": (456, 30_389_784, 10.266),
    "b6": (528, 43_040_704, 19.068),
    "b7": (600, 66_347_960, 37.746),
}


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=drawn(1), dtype=torch.float64)


@torch.no_grad()
def built(config: Efficientnet = SMALL, classes: int = 7) -> EfficientNet:
    """In fp64, with weights drawn so that each of them counts, and statistics near those of pictures."""
    model = EfficientNet(config, classes).double()
    generator = drawn()
    initialise(model, generator)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, float("bn" in name and name.endswith("weight")), 0.2, generator=generator)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model(images(4, 64, 64))
    for norm in norms:
        norm.momentum = 0.01
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer *= torch.empty_like(buffer).uniform_(0.8, 1.2, generator=generator)
    return model


def beside(config: Efficientnet, classes: int) -> Any:
    """timm's model of the same scaling and padding, in fp64."""
    module: Any = timm.load("timm.models.efficientnet")
    tensorflow = config.padding == "same"
    return module._gen_efficientnet(
        "tf_efficientnet_b0" if tensorflow else "efficientnet_b0",
        channel_multiplier=config.width,
        depth_multiplier=config.depth,
        pad_type="same" if tensorflow else "",
        bn_eps=config.epsilon,
        num_classes=classes,
    ).double()


# --- parity ---------------------------------------------------------------------------------------------------------

SYMMETRIC = replace(SMALL, padding="symmetric", epsilon=1e-5)
B0 = replace(efficientnet_b0, dropout=0.0, stochastic_depth=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        (SMALL, 64, 64),
        (SMALL, 75, 98),
        (SYMMETRIC, 64, 64),
        (SYMMETRIC, 75, 98),
        (replace(SMALL, width=0.4, depth=1.3), 96, 33),
        (B0, 64, 96),
        (replace(B0, padding="symmetric", epsilon=1e-5), 64, 96),
    ],
    ids=["small", "odd", "symmetric", "odd and symmetric", "scaled", "B0", "B0 of PyTorch"],
)
def test_every_output_and_gradient_is_as_if_timm_had_computed_it(
    config: Efficientnet, height: int, width: int, training: bool
) -> None:
    ours, theirs = built(config).train(training), beside(config, 7).train(training)
    theirs.load_state_dict(ours.state_dict())
    pictures = images(3, height, width)
    toward = torch.randn(3, 7, generator=drawn(2), dtype=torch.float64)
    found = [passed(model, pictures, toward) for model in (ours, theirs)]
    assert list(found[0]) == list(found[1])
    largest = max(float(value.norm()) for value in found[0].values())
    for name, value in found[0].items():
        away = float((value - found[1][name]).norm())
        assert away <= 1e-8 * float(value.norm()) + 1e-14 * largest, name
    assert float(found[0]["logits"].std(0).min()) > 1e-3


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "efficientnet_b0"])
def test_every_model_of_timm_takes_our_weights_and_gives_our_features(name: str) -> None:
    config = B0 if name.startswith("tf") else replace(B0, padding="symmetric", epsilon=1e-5)
    ours, theirs = built(config, 1000).eval(), timm.load("timm").create_model(name).double().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    pictures = images(1, 64, 96)
    features = ours.forward_features(pictures)
    torch.testing.assert_close(features.tokens.mT.unflatten(2, features.grid), theirs.forward_features(pictures))


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_its_number_of_parameters_and_multiplications(name: str) -> None:
    config, (side, parameters, gigas) = getattr(presets, f"efficientnet_{name}"), PUBLISHED[name]
    assert config.image_size == side
    assert flops.parameters(config, 1000) == parameters
    assert flops.macs(config, 1000) / 1e9 == pytest.approx(gigas, rel=2e-3)
    with torch.device("meta"):
        model = EfficientNet(config, 1000)
    assert sum(each.numel() for each in model.parameters()) == parameters


def test_every_preset_is_scaled_as_in_the_code_of_the_paper() -> None:
    expected = {  # width, depth, share of features dropped
        "b0": (1.0, 1.0, 0.2), "b1": (1.0, 1.1, 0.2), "b2": (1.1, 1.2, 0.3), "b3": (1.2, 1.4, 0.3),
        "b4": (1.4, 1.8, 0.4), "b5": (1.6, 2.2, 0.4), "b6": (1.8, 2.6, 0.5), "b7": (2.0, 3.1, 0.5),
    }  # fmt: skip
    for name, (width, depth, dropout) in expected.items():
        config = getattr(presets, f"efficientnet_{name}")
        assert (config.width, config.depth, config.dropout, config.stochastic_depth) == (width, depth, dropout, 0.2)
    assert [each.blocks for each in presets.efficientnet_b7.stages] == [4, 7, 7, 10, 10, 13, 4]
    assert [each.channels for each in presets.efficientnet_b7.stages] == [32, 48, 80, 160, 224, 384, 640]
    assert (presets.efficientnet_b7.stem, presets.efficientnet_b7.head) == (64, 2560)


sizes = st.builds(
    Efficientnet,
    width=st.floats(0.2, 2.0),
    depth=st.floats(0.1, 2.0),
    image_size=st.integers(1, 200),
    padding=st.sampled_from(["same", "symmetric"]),
)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(sizes, st.integers(0, 20))
def test_every_count_is_torchs_own_whatever_the_configuration(config: Efficientnet, classes: int) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = EfficientNet(config, classes).eval()
        model(torch.empty(2, 3, config.image_size, config.image_size))
    assert sum(each.numel() for each in model.parameters()) == flops.parameters(config, classes)
    assert 2 * 2 * flops.macs(config, classes) == counter.get_total_flops()


@given(st.floats(0.05, 8.0))
def test_no_number_of_channels_is_a_tenth_less_than_asked_for_whatever_the_width(width: float) -> None:
    config = Efficientnet(width=width)
    asked = [32, *(each.channels for each in efficientnet_b0.stages), 1280]
    for channels, given_ in zip(
        asked, [config.stem, *(each.channels for each in config.stages), config.head], strict=True
    ):
        assert given_ % 8 == 0 and given_ >= max(8, 0.9 * channels * width)
        assert given_ <= max(8, channels * width + 8)


# --- initialisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_weight_begins_as_in_the_code_of_the_paper() -> None:
    model = EfficientNet(replace(B0, width=0.5), 100)
    for each in [*model.parameters(), *model.buffers()]:
        each.fill_(5)
    initialise(model, drawn(), head_bias=-10.0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            side, depthwise = module.kernel_size[0], module.groups > 1
            fan_out = side * side * (1 if depthwise else module.out_channels)
            spread = 4 / math.sqrt(2 * module.weight.numel())
            assert float(module.weight.std()) == pytest.approx(math.sqrt(2 / fan_out), rel=spread), name
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert module.bias is not None and module.running_mean is not None and module.running_var is not None
            assert (module.weight == 1).all() and not module.bias.any()
            assert not module.running_mean.any() and (module.running_var == 1).all()
            assert module.momentum == pytest.approx(1 - 0.99) and module.eps == 1e-3
    assert model.classifier and (model.classifier.bias == -10).all()
    furthest = float(model.classifier.weight.abs().max())
    assert 0.099 < furthest <= 0.1 and float(model.classifier.weight.std()) == pytest.approx(0.1 / 3**0.5, rel=0.02)


def test_every_weight_follows_from_the_generator_alone() -> None:
    states = []
    for noise, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(noise)
        model = EfficientNet(SMALL, 7)
        initialise(model, drawn(seed))
        states.append(model.state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = {name for name in first if first[name].ndim > 1}
    assert {name for name in first if not torch.equal(first[name], other[name])} == matrices


# --- forward pass ---------------------------------------------------------------------------------------------------


@cache
def fixed() -> EfficientNet:
    return built().eval().requires_grad_(False)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.sampled_from([3, 5]), st.sampled_from([1, 2, 3]))
def test_every_padding_is_by_half_of_what_is_missing(height: int, width: int, kernel: int, stride: int) -> None:
    convolution = SameConv2d(1, 1, kernel, stride, bias=False).double()
    nn.init.ones_(convolution.weight)
    found = convolution(torch.ones(1, 1, height, width, dtype=torch.float64))[0, 0]

    def seen(side: int) -> list[int]:
        """How many pixels of a row each step of the filter covers."""
        steps = math.ceil(side / stride)
        missing = max(0, (steps - 1) * stride + kernel - side)
        starts = [step * stride - missing // 2 for step in range(steps)]
        return [sum(0 <= start + offset < side for offset in range(kernel)) for start in starts]

    assert found.tolist() == [[float(rows * columns) for columns in seen(width)] for rows in seen(height)]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from(["same", "symmetric"]))
def test_every_size_and_shape_gives_a_place_for_each_32_pixels(height: int, width: int, padding: Any) -> None:
    model = built(replace(SMALL, padding=padding)).eval()
    features = model.forward_features(images(2, height, width))
    assert features.grid == (math.ceil(height / 32), math.ceil(width / 32)) and features.prefix == 0
    assert features.tokens.shape == (2, features.grid[0] * features.grid[1], SMALL.head)
    assert features.patches.isfinite().all()


def test_every_logit_is_the_classifiers_of_the_mean_over_places() -> None:
    pictures = images(3, 64, 96)
    pooled = fixed().forward_features(pictures).tokens.mean(1)
    assert fixed().classifier
    torch.testing.assert_close(fixed()(pictures), pooled @ fixed().classifier.weight.T + fixed().classifier.bias)
    headless = EfficientNet(SMALL, 0).double().eval()
    headless.load_state_dict({name: value for name, value in fixed().state_dict().items() if "classifier" not in name})
    torch.testing.assert_close(headless(pictures), pooled)


def test_every_picture_of_a_batch_is_as_if_alone() -> None:
    pictures = images(4, 40, 64)
    together = fixed()(pictures)
    for row, picture in zip(together, pictures, strict=True):
        torch.testing.assert_close(fixed()(picture[None])[0], row, rtol=1e-9, atol=1e-9)
    assert float((together[1:] - together[0]).abs().amin(1).max()) > 1e-3


def test_every_layout_in_memory_gives_the_same() -> None:
    model, pictures = built().eval(), images(2, 64, 64)
    plain = model(pictures)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    turned = model(pictures.to(memory_format=torch.channels_last))
    torch.testing.assert_close(turned, plain, rtol=1e-9, atol=1e-9)


def test_every_stage_can_be_computed_anew_for_its_gradient() -> None:
    """Activation checkpointing of `blocks`, as if it were not there."""
    model, pictures = built(replace(SMALL, stochastic_depth=0.5)), images(4)
    found: list[dict[str, Tensor | None]] = []
    for anew in (False, True):
        for stage in model.blocks if anew else []:
            forward = stage.forward
            stage.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
        torch.manual_seed(0)
        model.zero_grad()
        model(pictures).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(model.blocks) == 7
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())  # type: ignore[arg-type]


@pytest.mark.slow
def test_every_compiled_pass_is_the_eager_one_without_a_break() -> None:
    torch.compiler.reset()
    compiled = torch.compile(fixed(), backend="aot_eager", fullgraph=True)
    pictures = images(2, 40, 64)
    torch.testing.assert_close(compiled(pictures), fixed()(pictures))
    torch.compiler.reset()


# --- regularisation -------------------------------------------------------------------------------------------------


def test_every_block_is_left_out_the_more_often_the_later_it_comes() -> None:
    model = EfficientNet(efficientnet_b0, 7)
    blocks = [block for stage in model.blocks for block in stage.children()]
    assert len(blocks) == 16
    rates = {index: block.drop.rate for index, block in enumerate(blocks) if isinstance(block.drop, StochasticDepth)}
    assert rates == pytest.approx({index: 0.2 * index / 16 for index in (2, 4, 6, 7, 9, 10, 12, 13, 14)})


def test_every_picture_skips_a_block_or_has_it_scaled_up_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    layer, x = StochasticDepth(0.25), torch.rand(4000, 2, 3, 3) + 1
    kept = layer(x).div(x).flatten(1)  # b 18
    assert (kept.amax(1) - kept.amin(1)).max() < 1e-5
    share = kept[:, 0]
    assert {round(value, 4) for value in share.tolist()} == {0.0, 1.3333}
    assert abs(float(share.mean()) - 1) < 6 * math.sqrt(0.25 / 0.75 / 4000)
    assert torch.equal(layer.eval()(x), x)


def test_every_skipped_block_is_as_if_not_there() -> None:
    model = built(replace(SMALL, depth=1.0, stochastic_depth=0.999)).train()
    block = model.blocks[1].get_submodule("1")
    assert isinstance(block, Bottleneck) and block.drop
    block.drop.rate = 1 - 1e-12
    x = torch.randn(3, SMALL.stages[1].channels, 8, 8, generator=drawn(5), dtype=torch.float64)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_every_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    model = built(replace(SMALL, dropout=0.5)).eval()
    pictures = images(2)
    assert torch.equal(model(pictures), fixed()(pictures))
    model.dropout.train()
    assert not torch.equal(model(pictures), model(pictures))


def test_every_norm_and_bias_is_left_alone_by_weight_decay_and_no_other() -> None:
    names = {name for name, _ in fixed().named_parameters()}
    assert fixed().undecayed() == {name for name in names if ".bn" in f".{name}" or name.endswith(".bias")}
    assert {name.split(".")[-1] for name in names - fixed().undecayed()} == {"weight"}


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(SMALL, width=0.0), "^width is 0.0; more than 0"),
        (replace(SMALL, depth=-1.0), "^depth is -1.0; more than 0"),
        (replace(SMALL, epsilon=math.nan), "^epsilon is nan; more than 0"),
        (replace(SMALL, image_size=0), "^image_size is 0; at least 1"),
        (replace(SMALL, dropout=1.0), "^dropout is 1.0; .* at least 0 and below 1"),
        (replace(SMALL, stochastic_depth=-0.1), "^stochastic_depth is -0.1; .* at least 0 and below 1"),
    ],
)
def test_every_model_that_cannot_be_is_refused_by_name(config: Efficientnet, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientNet(config, 7)
