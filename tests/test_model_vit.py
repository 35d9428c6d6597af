"""ViT and DeiT are those of the papers and of timm: sizes, names, outputs, gradients, first weights, any picture."""

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pipeline.architectures import vit as presets
from pipeline.architectures.vit import Vit
from pipeline.config import Config, from_dict, to_dict
from pipeline.models import flops
from pipeline.models import vit as module
from pipeline.models.vit import (
    Block,
    StochasticDepth,
    TwoLogits,
    VisionTransformer,
    initialise,
    resized_positions,
    sines_and_cosines,
)
from tests import timm
from tests.parity import close, passed

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore:pictures of .* do not divide:UserWarning")]

SMALL = Vit(width=32, depth=3, heads=4, hidden=64, patch=4, image_size=16)
VARIANTS = {
    "plain": SMALL,
    "pixels left over": replace(SMALL, image_size=18),
    "tanh layer": replace(SMALL, representation=True),
    "mean of patches": replace(SMALL, pooling="gap"),
    "attention pooling": replace(SMALL, pooling="map"),
    "attention pooling behind a tanh layer": replace(SMALL, pooling="map", representation=True),
    "sines": replace(SMALL, positions="sincos2d"),
    "sines and mean": replace(SMALL, positions="sincos2d", pooling="gap"),
    "positions of patches alone": replace(SMALL, prefix_positions=False),
    "registers": replace(SMALL, registers=3),
    "registers without positions": replace(SMALL, registers=2, prefix_positions=False),
    "registers and mean": replace(SMALL, registers=2, pooling="gap"),
    "distilled": replace(SMALL, distillation=True),
    "distilled, with registers": replace(SMALL, distillation=True, registers=2),
    "exact GELU": replace(SMALL, gelu="erf"),
    "no bias": replace(SMALL, qkv_bias=False),
    "no bias, attention pooling": replace(SMALL, qkv_bias=False, pooling="map"),
    "DeiT's first weights": replace(SMALL, initialisation="deit", pooling="map"),
}
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)

# Parameters and billions of multiply-accumulates, as published or as timm's models of the same name have them.
PUBLISHED: dict[str, tuple[Vit, int, float | None]] = {
    "vit_tiny_patch16_224": (presets.vit_ti16, 5_717_416, 1.254),
    "vit_small_patch16_224": (presets.vit_s16, 22_050_664, 4.599),
    "vit_small_patch32_224": (presets.vit_s32, 22_878_952, None),
    "vit_base_patch8_224": (presets.vit_b8, 86_576_872, None),
    "vit_base_patch16_224": (presets.vit_b16, 86_567_656, 17.564),
    "vit_base_patch32_224": (presets.vit_b32, 88_224_232, 4.409),
    "vit_base_patch16_384": (replace(presets.vit_b16, image_size=384), 86_859_496, 55.484),
    "vit_large_patch16_224": (presets.vit_l16, 304_326_632, 61.555),
    "vit_large_patch16_384": (replace(presets.vit_l16, image_size=384), 304_715_752, 191.066),
    "vit_large_patch32_224": (presets.vit_l32, 306_535_400, 15.377),
    "vit_huge_patch14_224": (presets.vit_h14, 632_045_800, 167.295),
    "vit_giant_patch14_224": (presets.vit_giant14, 1_012_611_432, None),
    "vit_gigantic_patch14_224": (presets.vit_gigantic14, 1_844_440_680, None),
    "deit_tiny_patch16_224": (presets.deit_ti16, 5_717_416, None),
    "deit_small_patch16_224": (presets.deit_s16, 22_050_664, None),
    "deit_base_patch16_224": (presets.deit_b16, 86_567_656, None),
    "deit_tiny_distilled_patch16_224": (presets.deit_ti16_distilled, 5_910_800, None),
    "deit_small_distilled_patch16_224": (presets.deit_s16_distilled, 22_436_432, None),
    "deit_base_distilled_patch16_224": (presets.deit_b16_distilled, 87_338_192, 17.657),
    "deit_base_distilled_patch16_384": (replace(presets.deit_b16_distilled, image_size=384), 87_630_032, None),
}


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(model: nn.Module, seed: int = 0) -> None:
    """Weights that let everything through: none is near zero, so that none can be forgotten."""
    generator = chance(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)


def built(config: Vit, classes: int = 7) -> VisionTransformer:
    model = VisionTransformer(config, classes).double()
    spread(model)
    return model


def pictures(count: int, height: int, width: int) -> Tensor:
    return torch.randn(count, 3, height, width, generator=chance(1), dtype=torch.float64)


def square(count: int, config: Vit) -> Tensor:
    return pictures(count, config.image_size, config.image_size)


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("classes", [0, 7])
def test_every_parameter_and_every_multiplication_is_counted(config: Vit, classes: int) -> None:
    with torch.device("meta"):
        model = VisionTransformer(config, classes).eval()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.empty(1, 3, config.image_size, config.image_size))
    assert sum(p.numel() for p in model.parameters()) == flops.parameters(config, classes)
    assert 2 * flops.macs(config, classes) == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_preset_has_the_published_size_and_the_names_of_timm(name: str) -> None:
    config, count, giga = PUBLISHED[name]
    with torch.device("meta"):
        ours = VisionTransformer(config, 1000)
        theirs = timm.load("timm").create_model(name, num_classes=1000)
    assert flops.parameters(config, 1000) == sum(p.numel() for p in ours.parameters()) == count
    assert giga is None or flops.macs(config, 1000) / 1e9 == pytest.approx(giga, rel=0.005)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize(("config", "count"), [(presets.deit_s24, 43.3e6), (presets.deit_b24, 171.6e6)])
def test_every_deeper_deit_has_twice_the_blocks(config: Vit, count: float) -> None:
    assert config.depth == 24 and flops.parameters(config, 1000) == pytest.approx(count, rel=0.005)


def test_every_model_pretrained_on_21843_classes_has_the_published_size() -> None:
    counts = {presets.vit_b16: 103_186_515, presets.vit_l16: 326_740_307, presets.vit_h14: 660_385_363}
    for config, count in counts.items():
        assert flops.parameters(replace(config, representation=True), 21_843) == count


# --- parity ---------------------------------------------------------------------------------------------------------

TIMM: dict[str, tuple[Vit, dict[str, Any]]] = {
    "plain": (replace(SMALL, gelu="erf"), {}),
    "tanh GELU": (SMALL, {"act_layer": "gelu_tanh"}),
    "no bias": (replace(SMALL, gelu="erf", qkv_bias=False), {"qkv_bias": False}),
    "another epsilon": (
        replace(SMALL, gelu="erf", epsilon=1e-2, pooling="map"),
        {"global_pool": "map", "class_token": False, "norm_layer": partial(nn.LayerNorm, eps=1e-2)},
    ),
    "mean of patches": (
        replace(SMALL, gelu="erf", pooling="gap"),
        {"global_pool": "avg", "class_token": False, "fc_norm": False},
    ),
    "attention pooling": (replace(SMALL, gelu="erf", pooling="map"), {"global_pool": "map", "class_token": False}),
    "attention pooling beside registers": (
        replace(SMALL, gelu="erf", pooling="map", registers=2),
        {"global_pool": "map", "class_token": False, "reg_tokens": 2},
    ),
    "registers": (replace(SMALL, gelu="erf", registers=3), {"reg_tokens": 3}),
    "registers without positions": (
        replace(SMALL, gelu="erf", registers=2, prefix_positions=False),
        {"reg_tokens": 2, "no_embed_class": True},
    ),
    "distilled": (replace(SMALL, gelu="erf", distillation=True), {}),
}


def of_timm(config: Vit, options: dict[str, Any], classes: int = 7) -> Any:
    name = "VisionTransformerDistilled" if config.distillation else "VisionTransformer"
    kind = getattr(timm.load("timm.models.deit" if config.distillation else "timm.models.vision_transformer"), name)
    return kind(
        img_size=config.image_size, patch_size=config.patch, num_classes=classes, embed_dim=config.width,
        depth=config.depth, num_heads=config.heads, mlp_ratio=config.hidden / config.width, **options,
    ).double()  # fmt: skip


def pair(config: Vit, options: dict[str, Any]) -> tuple[VisionTransformer, Any]:
    ours, theirs = built(config), of_timm(config, options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def assert_same(ours: nn.Module, theirs: nn.Module, images: Tensor, tolerance: float = 1e-9) -> None:
    """The same logits, and the same gradients of every parameter and pixel."""
    toward = torch.linspace(-1, 1, ours(images).numel(), dtype=images.dtype).reshape(ours(images).shape)
    found, expected = (passed(model, images, toward) for model in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # The bias of a key shifts all scores of a softmax alike: its gradient is rounding alone.
        close(value, expected[name], 1e-6 if name.endswith(("qkv.bias", "kv.bias")) else tolerance)


@pytest.mark.parametrize(("config", "options"), TIMM.values(), ids=TIMM)
def test_every_output_and_gradient_is_as_if_timm_had_worked_it_out(config: Vit, options: dict[str, Any]) -> None:
    assert_same(*pair(config, options), square(2, config))


@pytest.mark.parametrize("size", [(20, 28), (12, 12), (16, 32)], ids=str)
@pytest.mark.parametrize("name", ["plain", "registers without positions", "distilled"])
def test_whatever_the_picture_is_bicubic_positions_are_as_if_of_timm(name: str, size: tuple[int, int]) -> None:
    config, options = TIMM[name]
    ours, theirs = pair(replace(config, interpolation="bicubic"), {**options, "dynamic_img_size": True})
    assert_same(ours, theirs, pictures(2, *size), tolerance=1e-5)  # timm interpolates in single precision


def test_both_heads_of_a_distilled_model_say_in_training_what_those_of_timm_say() -> None:
    ours, theirs = pair(*TIMM["distilled"])
    theirs.set_distilled_training(True)
    images = square(3, SMALL)
    both = ours.train()(images)
    assert isinstance(both, TwoLogits)
    for mine, timms in zip(both, theirs.train()(images), strict=True):
        close(mine, timms)
    close(ours.eval()(images), (both.labels + both.teacher) / 2)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_every_output_and_gradient_is_as_if_transformers_had_worked_it_out(
    gelu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else transformers would take the hollow torchvision that timm is given for the real one.
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if not isinstance(each, timm._Hollows)])
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    transformers = pytest.importorskip("transformers")
    ours = built(replace(SMALL, gelu=gelu, epsilon=1e-5)).eval()  # type: ignore[arg-type]
    settings_ = transformers.ViTConfig(
        hidden_size=SMALL.width, num_hidden_layers=SMALL.depth, num_attention_heads=SMALL.heads,
        intermediate_size=SMALL.hidden, hidden_act="gelu" if gelu == "erf" else "gelu_pytorch_tanh",
        image_size=SMALL.image_size, patch_size=SMALL.patch, num_labels=7, layer_norm_eps=1e-5,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(settings_).double().eval()
    theirs.load_state_dict({name: of_transformers(name, ours.state_dict()) for name in theirs.state_dict()})
    results = []
    for model in (ours, lambda pixels: theirs(pixels).logits):
        pixels = square(2, SMALL).requires_grad_()
        logits = model(pixels)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), pixels)))
    for mine, other in zip(*results, strict=True):
        close(mine, other)


def of_transformers(name: str, state: dict[str, Tensor]) -> Tensor:
    """Which of our weights is what transformers calls so."""
    theirs_to_ours = {
        "vit.embeddings.": "", "patch_embeddings.projection": "patch_embed.proj", "position_embeddings": "pos_embed",
        "vit.layers": "blocks", "vit.layernorm": "norm", "classifier": "head", "layernorm_before": "norm1",
        "layernorm_after": "norm2", "attention.o_proj": "attn.proj", "attention.": "attn.",
    }  # fmt: skip
    for theirs, ours in theirs_to_ours.items():
        name = name.replace(theirs, ours)
    for place, part in enumerate(("q_proj", "k_proj", "v_proj")):
        if part in name:
            return state[name.replace(part, "qkv")].chunk(3)[place]
    return state[name]


# --- first weights --------------------------------------------------------------------------------------------------


@every_variant
def test_every_weight_is_drawn_from_the_generator_and_none_is_left_as_it_was(config: Vit) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        model = VisionTransformer(config, 7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(math.nan)
        initialise(model, chance(seed), head_bias=-3.0)
        return model.state_dict()

    one, again, other = drawn(0), drawn(0), drawn(1)
    assert all(weight.isfinite().all() for weight in one.values())
    assert all(torch.equal(one[name], again[name]) for name in one)
    heads = ("head.weight", "head_dist.weight")
    constant = (*heads, "cls_token") if config.initialisation == "paper" else ()
    matrices = [name for name, weight in one.items() if weight.ndim > 1 and name not in constant]
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    assert all((one[name] == -3).all() for name in one if name in ("head.bias", "head_dist.bias"))
    if config.initialisation == "paper":
        assert not any(one[name].any() for name in heads if name in one)


@torch.no_grad()
def test_every_weight_of_deit_begins_as_in_its_code() -> None:
    config = Vit(
        width=128, depth=2, heads=4, hidden=256, patch=8, image_size=64, distillation=True, initialisation="deit"
    )
    model = VisionTransformer(config, 50)
    initialise(model, chance())
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {"head", "head_dist", "blocks.1.attn.qkv", "blocks.0.mlp.fc2"} < layers.keys()
    tables = [model.pos_embed, *(layer.weight for layer in layers.values())]
    assert all(table is not None and float(table.std()) == pytest.approx(0.02, rel=0.05) for table in tables)
    assert not any(layer.bias.any() for layer in layers.values())
    for token in (model.cls_token, model.dist_token):
        assert token is not None and float(token.std()) == pytest.approx(0.02, rel=0.3)
    bound = (3 * 8 * 8) ** -0.5
    assert 0.98 * bound < float(model.patch_embed.proj.weight.abs().max()) <= bound
    assert 0.8 * bound < float(model.patch_embed.proj.bias.abs().max()) <= bound  # type: ignore[union-attr]


@torch.no_grad()
def test_attention_pooling_and_registers_begin_as_in_the_code_of_their_papers() -> None:
    model = VisionTransformer(replace(SMALL, width=128, hidden=256, pooling="map", registers=8), 3)
    initialise(model, chance())
    pool = model.attn_pool
    assert pool is not None and model.reg_token is not None
    assert float(model.reg_token.std()) == pytest.approx(1e-6, rel=0.1)
    bounds = {
        pool.latent: math.sqrt(6 / (1 + 128)),
        pool.q.weight: math.sqrt(3 / 128),
        pool.kv.weight: math.sqrt(3 / 128),
        pool.proj.weight: math.sqrt(3 / 128),
        pool.mlp.fc1.weight: math.sqrt(6 / (128 + 256)),
    }
    assert all(0.9 * bound < float(weight.abs().max()) <= bound for weight, bound in bounds.items())


# --- positions ------------------------------------------------------------------------------------------------------

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(grids, grids, st.integers(0, 3))
@settings(deadline=None)
def test_bilinear_positions_are_as_if_zoomed_by_the_code_of_the_paper(
    was: tuple[int, int], grid: tuple[int, int], prefix: int
) -> None:
    table = torch.randn(1, prefix + was[0] * was[1], 5, generator=chance(2), dtype=torch.float64)
    found = resized_positions(table, was, grid)
    assert torch.equal(found[:, :prefix], table[:, :prefix])
    image = table[0, prefix:].unflatten(0, was).numpy()
    factors = (grid[0] / was[0], grid[1] / was[1], 1)
    expected = torch.from_numpy(scipy.ndimage.zoom(image, factors, order=1))
    close(found[0, prefix:], expected.flatten(0, 1), 1e-9)


@given(grids, grids, st.sampled_from(["bilinear", "bicubic"]))
@settings(deadline=None)
def test_whatever_the_grid_is_equal_positions_stay_equal_and_its_own_stay_as_they_are(
    was: tuple[int, int], grid: tuple[int, int], how: Any
) -> None:
    table = torch.full((1, 1 + was[0] * was[1], 3), 0.7)
    found = resized_positions(table, was, grid, how)
    assert found.shape == (1, 1 + grid[0] * grid[1], 3)
    torch.testing.assert_close(found, torch.full_like(found, 0.7))
    table = torch.randn(table.shape, generator=chance(3))
    assert torch.equal(resized_positions(table, was, was, how), table)


def test_a_table_that_does_not_fill_its_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="a table of 11 positions does not fill a grid of 3 x 4"):
        resized_positions(torch.zeros(1, 11, 2), (3, 4), (2, 2))


def test_every_position_of_a_half_precision_table_is_interpolated_in_single_precision() -> None:
    table = torch.randn(1, 16, 8, generator=chance(4)).bfloat16()
    found = resized_positions(table, (4, 4), (7, 5))
    assert torch.equal(found, resized_positions(table.float(), (4, 4), (7, 5)).bfloat16())


def test_every_sine_is_as_if_written_out() -> None:
    rows, columns, width = 3, 5, 16
    found = sines_and_cosines((rows, columns), width)
    assert found.shape == (1, rows * columns, width)
    for row in range(rows):
        for column in range(columns):
            speeds = [10_000 ** (-k / (width // 4 - 1)) for k in range(width // 4)]
            expected = [f(at * speed) for at in (column, row) for f in (math.sin, math.cos) for speed in speeds]
            assert found[0, row * columns + column].tolist() == pytest.approx(expected, abs=1e-12)


def test_every_learned_position_of_a_prefix_counts_only_where_it_has_one() -> None:
    for own, expected in ((True, 1 + 2 + 16), (False, 16)):
        config = replace(SMALL, registers=2, prefix_positions=own)
        model = built(config)
        assert model.pos_embed is not None and model.pos_embed.shape == (1, expected, SMALL.width)
        before, _ = model.embed(square(2, config))
        with torch.no_grad():
            model.pos_embed.add_(1)
        after, _ = model.embed(square(2, config))
        moved = (after - before).mean((0, 2))
        torch.testing.assert_close(moved[3:], torch.ones_like(moved[3:]))
        torch.testing.assert_close(moved[:3], torch.full_like(moved[:3], float(own)))


# --- forward pass ---------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("size", [(16, 16), (12, 24), (21, 17)], ids=str)
def test_every_picture_of_whatever_size_is_as_if_alone(config: Vit, size: tuple[int, int]) -> None:
    model, images = built(config).eval(), pictures(3, *size)
    together = model(images)
    assert together.shape == (3, 7) and together.isfinite().all()
    for row, picture in zip(together, images, strict=True):
        close(model(picture[None])[0], row)
    assert float((together[0] - together[1]).detach().abs().max()) > 1e-3


@every_variant
def test_every_feature_stands_at_its_place(config: Vit) -> None:
    model, images = built(config, 0).eval(), pictures(2, 12, 20)
    features = model.forward_features(images)
    assert features.grid == (3, 5) and features.prefix == config.prefix
    assert features.tokens.shape == (2, config.prefix + 15, SMALL.width)
    flat = replace(config, depth=1)
    alone = built(flat).eval()
    for block in alone.blocks:  # without attention and MLP each token knows of its own patch alone
        assert isinstance(block, Block)
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    changed = images.clone()
    changed[:, :, 4:8, 12:16] += 1  # row 1, column 3
    moved = (
        (alone.forward_features(changed).patches - alone.forward_features(images).patches).detach().abs().sum((0, 2))
    )
    assert moved.nonzero().flatten().tolist() == [1 * 5 + 3]


@every_variant
def test_every_attention_map_is_what_the_forward_pass_attends_by(config: Vit) -> None:
    model, images = built(config).eval(), pictures(2, 16, 20)
    maps = model.attention(images)
    tokens = config.prefix + 4 * 5
    assert len(maps) == len(model.blocks) == config.depth
    seen: list[tuple[Any, Any]] = []
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attn.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model(images)
    for block, weights, (x, output) in zip(model.blocks, maps, seen, strict=True):
        assert isinstance(block, Block) and weights.shape == (2, config.heads, tokens, tokens)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, config.heads, tokens, dtype=torch.float64))
        v = block.attn.qkv(x).chunk(3, dim=-1)[2].unflatten(-1, (config.heads, -1)).transpose(1, 2)
        close(block.attn.proj((weights @ v).transpose(1, 2).flatten(2)), output)


def test_what_is_pooled_is_what_the_name_says() -> None:
    images = square(2, SMALL)
    for pooling in ("token", "gap"):
        model = built(replace(SMALL, pooling=pooling, registers=2), 0).eval()
        features = model.forward_features(images)
        close(model(images), features.tokens[:, 0] if pooling == "token" else features.tokens[:, 2:].mean(1))
    model = built(replace(SMALL, pooling="token", representation=True)).eval()
    assert model.pre_logits and model.head
    read = torch.tanh(model.forward_features(images).tokens[:, 0] @ model.pre_logits.weight.T + model.pre_logits.bias)
    close(model(images), model.head(read))


def test_every_size_of_pictures_with_pixels_left_over_is_warned_of_once() -> None:
    module._warn_of_pixels.cache_clear()
    model = built(SMALL).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in ((16, 16), (18, 16), (18, 16), (16, 19), (18, 16)):
            model(pictures(1, *size))
    assert [str(each.message) for each in caught] == [
        "pictures of 18 x 16 pixels do not divide into patches: the last 2 rows and 0 columns of pixels are left out",
        "pictures of 16 x 19 pixels do not divide into patches: the last 0 rows and 3 columns of pixels are left out",
    ]


def test_every_pixel_left_over_is_as_if_cut_off() -> None:
    model, images = built(SMALL).eval(), pictures(2, 19, 18)
    close(model(images), model(images[:, :, :16, :16]))


BAD: dict[str, tuple[Vit, str]] = {
    "heads": (replace(SMALL, heads=5), "width 32 does not divide over 5 heads"),
    "size": (replace(SMALL, image_size=3), "a picture of 3 pixels holds no patch of 4: .* at least 4 pixels"),
    "dropout": (replace(SMALL, dropout=1.0), "dropout is 1.0; it is a share"),
    "depth": (replace(SMALL, stochastic_depth=-0.1), "stochastic_depth is -0.1; it is a share"),
    "registers": (replace(SMALL, registers=-1), "registers is -1; at least 0"),
    "sines": (replace(SMALL, width=30, heads=5, positions="sincos2d"), "width 30 does not divide into sines.*: 32"),
    "two readers": (replace(SMALL, distillation=True, pooling="gap"), "beside a class token"),
    "two layers": (replace(SMALL, distillation=True, representation=True), "without representation"),
}


@pytest.mark.parametrize(("config", "message"), BAD.values(), ids=BAD)
def test_every_model_that_cannot_be_is_refused(config: Vit, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTransformer(config, 7)


def test_a_picture_without_a_patch_is_refused_with_the_size_that_has_one() -> None:
    with pytest.raises(ValueError, match=r"3 x 16 pixels holds no patch of 4: both sides .* at least 4 pixels"):
        built(SMALL)(pictures(1, 3, 16))


# --- training -------------------------------------------------------------------------------------------------------


def test_every_branch_of_a_share_of_pictures_is_left_out_and_the_others_are_scaled_up() -> None:
    torch.manual_seed(0)
    layer, x = StochasticDepth(0.25), torch.randn(4000, 2, 3)
    out = layer.train()(x)
    left_out = (out == 0).all(dim=2).all(dim=1)
    torch.testing.assert_close(out[~left_out], x[~left_out] / 0.75)
    assert abs(float(left_out.double().mean()) - 0.25) < 6 * math.sqrt(0.25 * 0.75 / 4000)
    assert torch.equal(layer.eval()(x), x)


def test_the_share_of_pictures_left_out_rises_evenly_from_nothing() -> None:
    model = VisionTransformer(replace(SMALL, depth=5, stochastic_depth=0.2), 7)
    rates = [block.skip.rate for block in model.blocks if isinstance(block, Block)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_every_draw_of_training_follows_from_the_seed_of_torch() -> None:
    model = built(replace(SMALL, dropout=0.2, stochastic_depth=0.4)).train()
    images = square(8, SMALL)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(images)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_gradient_is_as_if_no_activation_had_been_thrown_away(dropout: float) -> None:
    def gradients(wrap: bool) -> dict[str, Tensor]:
        model = built(replace(SMALL, dropout=dropout, stochastic_depth=dropout)).train()
        for block in model.blocks if wrap else ():
            whole: Callable[..., Tensor] = block.forward
            block.forward = lambda x, whole=whole: checkpoint(whole, x, use_reentrant=False)
        torch.manual_seed(3)
        model(square(2, SMALL)).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    kept, recomputed = gradients(False), gradients(True)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distilled", "sines"])
def test_every_model_is_one_graph_and_compiled_it_is_as_if_eager(name: str) -> None:
    model = built(replace(VARIANTS[name], depth=1)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((16, 16), (18, 24)):
        images = pictures(2, *size)
        close(torch.stack(tuple(compiled(images))), torch.stack(tuple(model(images))))


def test_every_logit_of_half_precision_is_near_that_of_full_precision() -> None:
    config = replace(SMALL, width=64, hidden=128)
    model = VisionTransformer(config, 7)
    initialise(model, chance())
    assert model.head
    nn.init.normal_(model.head.weight, generator=chance(5))
    images = square(4, config).float()
    exact, rough = model.eval()(images), model.bfloat16()(images.bfloat16()).float()
    assert float((exact - rough).detach().norm() / exact.detach().norm()) < 0.02


@every_variant
def test_no_bias_norm_token_or_position_is_decayed_and_every_matrix_is(config: Vit) -> None:
    model = VisionTransformer(config, 7)
    names, undecayed = {name for name, _ in model.named_parameters()}, model.undecayed()
    assert undecayed < names
    words = ("bias", "norm", "token", "pos_embed", "latent")
    assert undecayed == {name for name in names if any(word in name for word in words)}


# --- configuration --------------------------------------------------------------------------------------------------


PRESETS = {name: value for name, value in vars(presets).items() if isinstance(value, Vit)}


@pytest.mark.parametrize("config", [*VARIANTS.values(), *PRESETS.values()], ids=[*VARIANTS, *PRESETS])
def test_every_model_comes_back_from_a_written_configuration(config: Vit) -> None:
    config.check()
    run = Config(name="x", classes=10, model=config)
    assert from_dict(to_dict(run)) == run and Vit(**asdict(config)) == config
