"""Hybrids are those of the paper and of timm: sizes, names, outputs, gradients, standardised weights, first weights."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, group_norm, max_pool2d, relu
from torch.utils.flop_counter import FlopCounterMode

from pipeline.architectures import hybrid as presets
from pipeline.architectures.hybrid import Hybrid
from pipeline.models import flops
from pipeline.models.hybrid import Convolution, HybridEmbed, HybridTransformer, Root, Unit, initialise, standardised
from tests import timm
from tests.parity import close, passed

pytestmark = pytest.mark.timeout(300)

SMALL = Hybrid(width=32, depth=2, heads=4, hidden=64, image_size=32, trunk=(1, 1))
LIKE_TIMM = replace(SMALL, gelu="erf", standardisation="variance", trunk_epsilon=1e-5, interpolation="bicubic")
VARIANTS = {
    "stride of 8": SMALL,
    "stride of 4": replace(SMALL, trunk=(2,)),
    "root alone": replace(SMALL, trunk=(), patch=2),
    "stride of 16": replace(SMALL, trunk=(1, 2, 1)),
    "an odd size": replace(SMALL, image_size=45),
    "patches of two": replace(SMALL, patch=2),
    "mean of patches": replace(SMALL, pooling="gap"),
    "distilled": replace(SMALL, distillation=True),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)

# Parameters with 1000 classes, and billions of multiply-accumulates, as published or as timm's models have them.
PUBLISHED: dict[str, tuple[Hybrid, int, float | None]] = {
    "vit_tiny_r_s16_p8_224": (presets.r_ti16, 6_337_704, None),
    "vit_small_r26_s32_224": (presets.r26_s32, 36_431_912, 3.464),
    "vit_small_r26_s32_384": (replace(presets.r26_s32, image_size=384), 36_468_392, 10.264),
    "vit_base_r26_s32_224": (presets.r26_b32, 101_383_976, None),
    "vit_base_r50_s16_224": (presets.r50_b16, 98_659_112, 21.535),
    "vit_base_r50_s16_384": (replace(presets.r50_b16, image_size=384), 98_950_952, 67.156),
    "vit_large_r50_s32_224": (presets.r50_l32, 328_994_856, 19.413),
    "vit_large_r50_s32_384": (replace(presets.r50_l32, image_size=384), 329_092_136, 57.136),
}


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(config: Hybrid, classes: int = 7) -> HybridTransformer:
    """With weights that let everything through: none is near zero, so that none can be forgotten."""
    model, generator = HybridTransformer(config, classes).double(), chance()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def pictures(count: int, height: int, width: int) -> Tensor:
    return torch.randn(count, 3, height, width, generator=chance(1), dtype=torch.float64)


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("classes", [0, 7])
def test_every_parameter_and_every_multiplication_is_counted(config: Hybrid, classes: int) -> None:
    with torch.device("meta"):
        model = HybridTransformer(config, classes).eval()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.empty(1, 3, config.image_size, config.image_size))
    assert sum(p.numel() for p in model.parameters()) == flops.parameters(config, classes)
    assert 2 * flops.macs(config, classes) == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_preset_has_the_published_size_and_the_names_of_timm(name: str) -> None:
    config, count, giga = PUBLISHED[name]
    with torch.device("meta"):
        ours = HybridTransformer(config, 1000)
        theirs = timm.load("timm").create_model(name, num_classes=1000)
    assert flops.parameters(config, 1000) == sum(p.numel() for p in ours.parameters()) == count
    assert giga is None or flops.macs(config, 1000) / 1e9 == pytest.approx(giga, rel=0.005)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_every_hybrid_of_the_paper_has_its_stride_and_its_transformer() -> None:
    found = {config: (config.stride, config.grid, config.depth) for config in (presets.r50_b16, presets.r50_b32)}
    found |= {config: (config.stride, config.grid, config.depth) for config in (presets.r50_l16, presets.r50_l32)}
    assert list(found.values()) == [(16, 14, 12), (32, 7, 12), (16, 14, 24), (32, 7, 24)]
    assert (presets.r_ti16.stride, presets.r_ti16.grid) == (32, 7)  # patches of 8 on a map of stride 4


# --- parity ---------------------------------------------------------------------------------------------------------


def of_timm(config: Hybrid, **options: Any) -> Any:
    resnet, layers = timm.load("timm.models.resnetv2"), timm.load("timm.layers")
    convolution = partial(layers.StdConv2dSame, eps=1e-8)
    if config.trunk:
        backbone = resnet.ResNetV2(
            layers=config.trunk, num_classes=0, global_pool="", preact=False, stem_type="same", conv_layer=convolution
        )
    else:
        backbone = resnet.create_resnetv2_stem(3, stem_type="same", preact=False, conv_layer=convolution)
    return timm.load("timm.models.vision_transformer").VisionTransformer(
        img_size=config.image_size, patch_size=config.patch, num_classes=7, embed_dim=config.width,
        depth=config.depth, num_heads=config.heads, mlp_ratio=config.hidden / config.width,
        embed_layer=partial(layers.HybridEmbed, backbone=backbone), **options,
    ).double()  # fmt: skip


PARITY = {
    "stride of 8": LIKE_TIMM,
    "root alone": replace(LIKE_TIMM, trunk=(), patch=2),
    "stride of 16": replace(LIKE_TIMM, trunk=(1, 2, 1)),
    "an odd size": replace(LIKE_TIMM, image_size=45),
}


@pytest.mark.parametrize("config", PARITY.values(), ids=PARITY)
def test_every_output_and_gradient_is_as_if_timm_had_worked_it_out(config: Hybrid) -> None:
    ours, theirs = built(config).eval(), of_timm(config).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = pictures(2, config.image_size, config.image_size)
    toward = torch.linspace(-1, 1, 2 * 7, dtype=images.dtype).reshape(2, 7)
    found, expected = (passed(model, images, toward) for model in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # The bias of a key shifts all scores of a softmax alike: its gradient is rounding alone.
        close(value, expected[name], 1e-6 if name.endswith("qkv.bias") else 1e-9)


@pytest.mark.parametrize("size", [(32, 56), (27, 41)], ids=str)
def test_whatever_the_picture_is_every_output_is_as_if_of_timm(size: tuple[int, int]) -> None:
    ours, theirs = built(LIKE_TIMM).eval(), of_timm(LIKE_TIMM, dynamic_img_size=True).eval()
    theirs.load_state_dict(ours.state_dict())
    images = pictures(2, *size)
    close(ours(images), theirs(images), 1e-5)  # timm interpolates positions in single precision


# --- trunk ----------------------------------------------------------------------------------------------------------


def padded(size: int, side: int, stride: int) -> tuple[int, int]:
    """Places before and after, as in the definition of TensorFlow's "SAME"."""
    left = size % stride
    total = max(side - stride, 0) if left == 0 else max(side - left, 0)
    return total // 2, total - total // 2


@given(st.integers(1, 23), st.integers(1, 23), st.sampled_from([(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)]))
@settings(deadline=None)
def test_every_convolution_pads_as_in_the_code_of_the_paper(height: int, width: int, how: tuple[int, int]) -> None:
    side, stride = how
    layer = Convolution(SMALL, 2, 3, side, stride).double()
    x = torch.randn(1, 2, height, width, generator=chance(), dtype=torch.float64)
    with torch.no_grad():
        top, bottom = padded(height, side, stride)
        left, right = padded(width, side, stride)
        canvas = torch.zeros(1, 2, top + height + bottom, left + width + right, dtype=torch.float64)
        canvas[:, :, top : top + height, left : left + width] = x
        expected = conv2d(canvas, standardised(layer.weight, "deviation"), stride=stride)
        found = layer(x)
    assert found.shape[-2:] == (-(-height // stride), -(-width // stride))
    close(found, expected)


@pytest.mark.parametrize("how", ["deviation", "variance"])
def test_every_filter_is_standardised_as_if_by_hand(how: Literal["deviation", "variance"]) -> None:
    weight = 3e-4 * torch.randn(5, 4, 3, 3, generator=chance(), dtype=torch.float64) + 2
    found = standardised(weight, how)
    for mine, filters in zip(found, weight, strict=True):
        numbers = filters.flatten().tolist()
        mean = sum(numbers) / len(numbers)
        variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
        divisor = variance**0.5 + 1e-5 if how == "deviation" else (variance + 1e-8) ** 0.5
        assert mine.flatten().tolist() == pytest.approx([(number - mean) / divisor for number in numbers], rel=1e-8)


@pytest.mark.parametrize("how", ["deviation", "variance"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"])
def test_every_slope_of_a_filter_is_as_if_by_differences(
    how: Literal["deviation", "variance"], layout: torch.memory_format
) -> None:
    # A deviation of about the 1e-5 beside it, and one far above.
    for size in (2e-5, 0.3):
        weight = size * torch.randn(3, 2, 3, 3, generator=chance(), dtype=torch.float64)
        weight = weight.to(memory_format=layout).requires_grad_()
        assert torch.autograd.gradcheck(lambda w: standardised(w, how), weight, eps=1e-6 * size, atol=1e-4 / size)
        assert standardised(weight, how).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("how", ["deviation", "variance"])
def test_every_filter_of_half_precision_is_standardised_in_single_precision(
    how: Literal["deviation", "variance"],
) -> None:
    weight = torch.randn(8, 64, 3, 3, generator=chance()).bfloat16()
    found = standardised(weight, how)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), standardised(weight.float(), how), rtol=2**-8, atol=1e-6)


def test_every_map_of_the_root_is_as_if_written_out() -> None:
    root = Root(SMALL).double()
    images = pictures(2, 20, 24)
    with torch.no_grad():
        nn.init.normal_(root.norm.bias, generator=chance(3))
        filters = standardised(root.conv.weight, "deviation")
        bordered = torch.zeros(2, 3, 20 + 5, 24 + 5, dtype=torch.float64)  # two before, three after
        bordered[:, :, 2:22, 2:26] = images
        x = group_norm(conv2d(bordered, filters, stride=2), 32, root.norm.weight, root.norm.bias, eps=1e-6)
        x = relu(x)  # so that zeros below and to the right are never the largest
        lower = torch.zeros(2, 64, 11, 13, dtype=torch.float64)
        lower[:, :, :10, :12] = x
        close(root(images), max_pool2d(lower, 3, 2))


def test_every_stage_but_the_first_halves_the_map_by_the_middle_convolution_of_its_first_unit() -> None:
    units = HybridTransformer(replace(SMALL, trunk=(2, 3, 1)), 7).trunk_blocks
    strides = [
        tuple(conv.stride[0] for conv in (unit.conv1, unit.conv2, unit.conv3))
        for unit in units
        if isinstance(unit, Unit)
    ]
    assert strides == [(1, 1, 1)] * 2 + [(1, 2, 1)] + [(1, 1, 1)] * 2 + [(1, 2, 1)]
    shortcuts = [unit.downsample is not None for unit in units if isinstance(unit, Unit)]
    assert shortcuts == [True, False, True, False, False, True]


# --- first weights --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_weight_is_drawn_from_the_generator_and_every_unit_begins_as_its_shortcut() -> None:
    def drawn(seed: int) -> HybridTransformer:
        model = HybridTransformer(replace(SMALL, representation=True), 7)
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        initialise(model, chance(seed), head_bias=-10)
        return model

    one, again, other = (drawn(seed) for seed in (0, 0, 1))
    for (name, weight), same, another in zip(
        one.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, same) and weight.isfinite().all()
        if weight.ndim > 1 and name not in ("head.weight", "cls_token"):
            assert not torch.equal(weight, another)
    assert torch.equal(one(pictures(2, 32, 32).float()), torch.full((2, 7), -10.0))
    for unit in one.trunk_blocks:
        assert isinstance(unit, Unit)
        fan_in = unit.conv2.weight[0].numel()
        assert float(unit.conv2.weight.std()) == pytest.approx(fan_in**-0.5, rel=0.03)
        assert unit.norm1.weight.eq(1).all() and unit.norm2.weight.eq(1).all()
        x = torch.randn(1, unit.conv1.in_channels, 6, 6, generator=chance(2))
        assert torch.equal(unit(x), relu(x if unit.downsample is None else unit.downsample(x)))


# --- forward pass ---------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("size", [(64, 64), (37, 70)], ids=str)
def test_every_picture_of_whatever_size_is_as_if_alone(config: Hybrid, size: tuple[int, int]) -> None:
    model, images = built(config).eval(), pictures(3, *size)
    together = model(images)
    features = model.forward_features(images)
    strides = config.trunk_stride, config.patch
    assert features.grid == tuple(-(-pixels // strides[0]) // strides[1] for pixels in size)
    assert features.patches.shape == (3, features.grid[0] * features.grid[1], config.width)
    for row, picture in zip(together, images, strict=True):
        close(model(picture[None])[0], row)
    assert float((together[0] - together[1]).detach().abs().max()) > 1e-3


def test_every_attention_map_is_one_of_patches_and_prefix() -> None:
    maps = built(SMALL).eval().attention(pictures(2, 32, 40))
    assert [each.shape for each in maps] == [(2, 4, 1 + 4 * 5, 1 + 4 * 5)] * SMALL.depth


def test_every_pixel_left_over_by_patches_of_the_map_is_warned_of() -> None:
    model = built(replace(SMALL, trunk=(), patch=8)).eval()
    with pytest.warns(UserWarning, match="pictures of 34 x 70 pixels .* the last 2 rows and 6 columns"):
        model(pictures(1, 34, 70))


def test_a_picture_without_a_patch_is_refused_with_the_size_that_has_one() -> None:
    model = built(replace(SMALL, trunk=(), patch=8))
    assert model(pictures(1, 29, 29)).shape == (1, 7)
    with pytest.raises(ValueError, match=r"28 x 40 pixels holds no patch of 8: both sides .* at least 29 pixels"):
        model(pictures(1, 28, 40))
    with pytest.raises(ValueError, match=r"trunk is \(3, 0\); every stage needs at least 1 unit"):
        HybridTransformer(replace(SMALL, trunk=(3, 0)), 7)


@every_variant
def test_no_bias_norm_token_or_position_is_decayed_and_every_matrix_is(config: Hybrid) -> None:
    model = HybridTransformer(config, 7)
    names = {name for name, _ in model.named_parameters()}
    words = ("bias", "norm", "token", "pos_embed")
    assert model.undecayed() == {name for name in names if any(word in name for word in words)}


def test_every_unit_and_every_block_is_listed_in_order() -> None:
    model = HybridTransformer(replace(SMALL, trunk=(2, 1)), 7)
    assert isinstance(model.patch_embed, HybridEmbed)
    listed = [*model.trunk_blocks, *model.blocks]
    ran: list[nn.Module] = []
    for each in listed:
        each.register_forward_hook(lambda layer, *_: ran.append(layer))
    model(pictures(1, 32, 32).float())
    assert len(ran) == 2 + 1 + 2 and all(a is b for a, b in zip(ran, listed, strict=True))


def test_every_preset_is_a_model_that_comes_back_from_its_fields() -> None:
    for value in vars(presets).values():
        if isinstance(value, Hybrid):
            value.check()
            assert Hybrid(**asdict(value)) == value
