"""MaxViT against timm's of the same weights, and what its windows, grids and relative biases promise."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pipeline.architectures import maxvit as sizes
from pipeline.architectures.maxvit import HEAD_WIDTH, Maxvit, maxvit_b, maxvit_s, maxvit_t, maxvit_t_384
from pipeline.models.flops.maxvit import macs, parameters
from pipeline.models.maxvit import (
    Block,
    MultiAxisVisionTransformer,
    RelativeBias,
    StochasticDepth,
    from_grids,
    from_windows,
    grids,
    initialise,
    resize_bias,
    resized,
    windows,
)
from tests import timm

pytestmark = pytest.mark.timeout(300)

SMALL = Maxvit(stem=32, widths=(32, 64, 64, 96), depths=(1, 2, 1, 1), window=2, image_size=64)
"""One stage as wide as what comes before it, two that are wider, one that has two blocks."""
TIMM = {"t": "tiny", "s": "small", "b": "base", "l": "large", "xl": "xlarge"}
PUBLISHED: dict[tuple[str, int], tuple[int, float]] = {
    # parameters with 1000 classes; 10^9 multiply-accumulates with timm's, which reads tables by matrix products
    ("t", 224): (30_916_528, 5.552), ("t", 384): (30_977_008, 17.393), ("t", 512): (31_049_584, 33.250),
    ("s", 224): (68_927_956, 11.589), ("s", 384): (69_018_676, 35.670), ("s", 512): (69_127_540, 66.907),
    ("b", 224): (119_467_708, 23.922), ("b", 384): (119_653_468, 73.453), ("b", 512): (119_876_380, 137.411),
    ("l", 224): (211_785_560, 43.520), ("l", 384): (212_033_240, 132.090), ("l", 512): (212_330_456, 243.926),
    ("xl", 224): (474_951_952, 97.255), ("xl", 384): (475_323_472, 292.082), ("xl", 512): (475_769_296, 532.900),
}  # fmt: skip
SHIFTS = ("stem.conv1.bias", "pre_norm.bias")
"""What a batch norm takes away again in training, so that its gradient is nothing but rounding."""


def preset(size: str, pixels: int) -> Maxvit:
    return getattr(sizes, f"maxvit_{size}" if pixels == 224 else f"maxvit_{size}_{pixels}")


def built(config: Maxvit = SMALL, classes: int = 7, *, number: int = 0) -> MultiAxisVisionTransformer:
    """With weights, biases and statistics that all count for something."""
    model, generator = MultiAxisVisionTransformer(config, classes), torch.Generator().manual_seed(number)
    initialise(model, generator)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
            elif name.endswith("table"):
                value.normal_(generator=generator)
            else:
                nn.init.normal_(value, std=value[0].numel() ** -0.5, generator=generator)
        for value in model.buffers():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5, generator=generator)
    return model


def images(count: int, height: int = 64, width: int | None = None) -> Tensor:
    return torch.randn(count, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def copied(model: MultiAxisVisionTransformer, size: str = "") -> Any:
    """timm's model with the same weights: that of the size's name, or one with a small model's numbers."""
    maxxvit, config = timm.load("timm.models.maxxvit"), model.config
    if size:
        reference = getattr(maxxvit, f"maxvit_{TIMM[size]}_tf_{config.image_size}")(num_classes=1000)
    else:
        wiring = maxxvit.model_cfgs["maxvit_tiny_tf"]
        numbers = {"stem_width": config.stem, "embed_dim": config.widths, "depths": config.depths}
        wiring = replace(wiring, **numbers, head_hidden_size=config.widths[-1])
        classes = model.head.fc.out_features if model.head.fc else 0
        reference = maxxvit.MaxxVit(wiring, img_size=config.image_size, num_classes=classes)
    reference.load_state_dict(model.state_dict())
    return reference.to(next(model.parameters()).dtype).train(model.training)


def assert_close(ours: Tensor, theirs: Tensor, relative: float = 1e-9) -> None:
    """Nowhere further apart than so small a share of the largest value."""
    assert float((ours - theirs).detach().abs().max()) <= relative * float(theirs.detach().abs().max())


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("size", "pixels"), PUBLISHED)
def test_every_size_has_the_parameters_of_timm_by_name_and_shape_and_their_published_number(
    size: str, pixels: int
) -> None:
    config, (count, _) = preset(size, pixels), PUBLISHED[size, pixels]
    with torch.device("meta"):
        model = MultiAxisVisionTransformer(config, 1000)
        reference = getattr(timm.load("timm.models.maxxvit"), f"maxvit_{TIMM[size]}_tf_{pixels}")(num_classes=1000)
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (model, reference)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in model.parameters()) == parameters(config, 1000) == count


@pytest.mark.parametrize(("size", "pixels"), PUBLISHED)
def test_every_size_multiplies_as_often_as_published_once_timm_reads_no_tables_by_products(
    size: str, pixels: int
) -> None:
    config = preset(size, pixels)
    w, v = config.window, config.table
    heads = sum(2 * depth * width // HEAD_WIDTH for width, depth in zip(config.widths, config.depths, strict=True))
    tables = heads * (w * w * v * v + w**4 * v)  # rows by one product, columns by another, once for a whole batch
    assert macs(config, 1000) + tables == pytest.approx(1e9 * PUBLISHED[size, pixels][1], abs=1e6)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, bias_window=3), maxvit_t, maxvit_t_384, replace(maxvit_t_384, bias_window=7)]
)
def test_every_parameter_and_every_multiplication_that_torch_counts_is_counted(config: Maxvit, classes: int) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model = MultiAxisVisionTransformer(config, classes).eval()
        model(torch.empty(1, 3, config.image_size, config.image_size))
    assert sum(p.numel() for p in model.parameters()) == parameters(config, classes)
    assert 2 * macs(config, classes) == counter.get_total_flops()


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_every_output_and_gradient_is_as_if_by_timm(training: bool) -> None:
    ours = built().double().train(training)
    theirs, pictures = copied(ours), images(3).double()
    results = [model(pictures) for model in (ours, theirs)]
    assert_close(*results)
    for result in results:
        (result * torch.arange(result.numel()).reshape_as(result)).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, value in ours.named_parameters():
        assert value.grad is not None
        if training and name.endswith(SHIFTS):
            assert max(float(each.abs().max()) for each in (value.grad, expected[name].grad)) < 1e-10
        else:
            assert_close(value.grad, expected[name].grad)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "config"), [("t", maxvit_t), ("s", maxvit_s), ("b", maxvit_b)])
def test_every_size_computes_as_if_it_were_timms(size: str, config: Maxvit) -> None:
    model = built(config, 1000).eval()
    theirs, picture = copied(model, size), images(1, 224)
    with torch.no_grad():
        assert_close(model(picture), theirs(picture), 1e-5)


def test_every_table_is_resized_as_if_by_tensorflow() -> None:
    table = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    larger = resize_bias(table, 5)
    for i in range(9):
        for j in range(9):
            assert_close(larger[:, i, j], by_hand(table, (i + 0.5) * 5 / 9 - 0.5, (j + 0.5) * 5 / 9 - 0.5))


def by_hand(table: Tensor, row: float, column: float) -> Tensor:
    """Bilinear between the centres of cells, the outermost going on beyond theirs."""
    total, last = table.new_zeros(len(table)), table.shape[-1] - 1
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            share = (1 - abs(row - i)) * (1 - abs(column - j))
            total += share * table[:, min(max(i, 0), last), min(max(j, 0), last)]
    return total


# --- windows and grids ----------------------------------------------------------------------------------------------

maps = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
partitions = pytest.mark.parametrize(
    ("take", "put"), [(windows, from_windows), (grids, from_grids)], ids=["windows", "grids"]
)


@partitions
@given(maps)
def test_every_partition_put_back_is_as_if_never_made(take: Callable, put: Callable, shape: tuple) -> None:
    rows, columns, side = shape[0] * shape[2], shape[1] * shape[2], shape[2]
    x = torch.arange(2 * rows * columns * 3).reshape(2, rows, columns, 3)
    taken = take(x, side)
    assert taken.shape == (2, shape[0] * shape[1], side * side, 3)
    assert torch.equal(put(taken, (rows, columns)), x)


@given(maps)
def test_every_window_holds_neighbours_and_every_grid_equal_residues_row_by_row(shape: tuple) -> None:
    rows, columns, side = shape[0] * shape[2], shape[1] * shape[2], shape[2]
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)[None]
    own = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1)
    near, far = windows(places, side)[0], grids(places, side)[0]  # n t 2
    assert torch.equal(near - near[:, :1], own.expand_as(near)) and not (near[:, 0] % side).any()
    apart = torch.tensor([shape[0], shape[1]])
    assert torch.equal(far - far[:, :1], (own * apart).expand_as(far)) and (far[:, 0] < apart).all()


@pytest.mark.parametrize(("layer", "related"), [("attn_block", "same window"), ("attn_grid", "same residues")])
def test_no_token_learns_of_another_whose_window_or_residue_differs(layer: str, related: str) -> None:
    config = replace(SMALL, window=2)
    block = Block(config, 32, 32, halve=False, rate=0.0)
    for value in block.parameters():
        nn.init.normal_(value, std=0.2, generator=torch.Generator().manual_seed(value.numel()))
    block.conv = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    for name in {"attn_block", "attn_grid"} - {layer}:
        setattr(block, name, nn.Identity())
    x = torch.randn(1, 32, 6, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)
    out = block(x)
    for y in range(6):
        for z in range(4):
            (gradient,) = torch.autograd.grad(out[0, :, y, z].square().sum(), x, retain_graph=True)
            reached = {(int(a), int(b)) for a, b in gradient[0].any(0).nonzero()}
            window = {(a, b) for a in range(6) for b in range(4) if (a // 2, b // 2) == (y // 2, z // 2)}
            residue = {(a, b) for a in range(6) for b in range(4) if (a % 3, b % 2) == (y % 3, z % 2)}
            assert reached == (window if related == "same window" else residue)


# --- attention ------------------------------------------------------------------------------------------------------


def test_every_bias_is_the_tables_at_the_offset_of_key_from_query_and_its_gradient_counts_the_pairs() -> None:
    side = 3
    bias = RelativeBias(replace(SMALL, window=side), heads=2)
    nn.init.normal_(bias.relative_position_bias_table, generator=torch.Generator().manual_seed(1))
    table, found = bias.relative_position_bias_table, bias()
    for i in range(side * side):
        for j in range(side * side):
            down, right = j // side - i // side, j % side - i % side
            assert torch.equal(found[:, i, j], table[:, down + side - 1, right + side - 1])
    found.sum().backward()
    pairs = side - torch.arange(1 - side, side).abs()
    assert table.grad is not None and torch.equal(table.grad, torch.outer(pairs, pairs).float().expand(2, -1, -1))


def test_attention_is_as_if_written_out_and_every_row_of_its_weights_sums_to_one() -> None:
    block = built().blocks[1]
    assert isinstance(block, Block)
    attention = block.attn_grid.attn
    x = torch.randn(2, 3, 4, 64, generator=torch.Generator().manual_seed(2))
    shares = attention.weights(x)  # 2 3 h 4 4
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3, 2, 4))
    q, k, v = attention.qkv(x).chunk(3, -1)
    heads = []
    for head in range(2):
        mine = slice(HEAD_WIDTH * head, HEAD_WIDTH * (head + 1))
        products = q[..., mine] @ k[..., mine].mT / math.sqrt(HEAD_WIDTH) + attention.rel_pos()[head]
        torch.testing.assert_close(shares[:, :, head], torch.softmax(products, -1))
        heads.append(shares[:, :, head] @ v[..., mine])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, -1)))


def test_every_map_is_the_attention_of_its_layer_and_nothing_else_changes() -> None:
    model, pictures = built().eval(), images(2, 64, 128)
    before = model(pictures)
    found = model.attention(pictures)
    assert torch.equal(model(pictures), before)
    sides = [16, 8, 8, 4, 2]
    assert [tuple(each.shape) for each in found] == [
        (2, side * 2 * side // 4, heads, 4, 4)
        for side, heads in zip(sides, [1, 2, 2, 2, 3], strict=True)
        for _ in range(2)
    ]
    assert all(torch.allclose(each.sum(-1), torch.ones(())) for each in found)
    first = model.blocks[0]
    assert isinstance(first, Block)
    tokens = windows(first.conv(model.stem(pictures)).permute(0, 2, 3, 1), 2)
    torch.testing.assert_close(found[0], first.attn_block.attn.weights(first.attn_block.norm1(tokens)))


# --- tables of relative biases --------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_every_resized_table_keeps_its_middle_and_its_symmetry_whatever_the_windows(
    v: int, w: int, number: int
) -> None:
    table = torch.randn(2, 2 * v - 1, 2 * v - 1, generator=torch.Generator().manual_seed(number))
    found = resize_bias(table, w)
    assert found.shape == (2, 2 * w - 1, 2 * w - 1)
    torch.testing.assert_close(found[:, w - 1, w - 1], table[:, v - 1, v - 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(resize_bias(table.flip(1), w), found.flip(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(resize_bias(table.mT, w), found.mT, atol=1e-5, rtol=1e-5)
    assert torch.equal(resize_bias(table, v), table)


def test_a_model_with_the_tables_of_another_window_is_as_if_they_had_been_resized_before() -> None:
    state = built().state_dict()
    wide = replace(SMALL, window=4, image_size=128)
    kept, changed = (MultiAxisVisionTransformer(c, 7).eval() for c in (replace(wide, bias_window=2), wide))
    kept.load_state_dict(state)
    larger = resized(state, wide)
    changed.load_state_dict(larger)
    assert {name for name in state if larger[name] is not state[name]} == {name for name in state if "table" in name}
    assert torch.equal(kept(images(2, 128)), changed(images(2, 128)))
    kept(images(1, 128)).sum().backward()
    assert all(
        value.grad is not None and value.grad.any() for name, value in kept.named_parameters() if "table" in name
    )


# --- pictures -------------------------------------------------------------------------------------------------------


def test_every_picture_of_a_batch_is_as_if_alone() -> None:
    model, many = built().double().eval(), images(4).double()
    together = model(many)
    for row, picture in zip(together, many, strict=True):
        torch.testing.assert_close(model(picture[None])[0], row)
    assert float((together - together[0])[1:].detach().abs().min(1).values.max()) > 1e-3


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3))
def test_every_size_that_windows_tile_is_taken_whatever_its_shape(rows: int, columns: int) -> None:
    model, pictures = built().eval(), images(2, 64 * rows, 64 * columns)
    with torch.no_grad():
        features, logits, last = model.forward_features(pictures), model(pictures), model.stages(model.stem(pictures))
    assert torch.equal(features.tokens.mT.unflatten(2, features.grid), last)
    assert features.grid == (2 * rows, 2 * columns) and features.prefix == 0
    assert features.tokens.shape == (2, 4 * rows * columns, 96) and features.patches.shape == features.tokens.shape
    torch.testing.assert_close(model.head(features.tokens.mean(1)), logits, atol=1e-5, rtol=1e-5)


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000))
def test_every_other_size_is_refused_by_naming_the_nearest_that_do(height: int, width: int) -> None:
    unit = 32 * maxvit_t.window
    if not height % unit and not width % unit:
        return maxvit_t.check_size(height, width)
    with pytest.raises(ValueError, match=f"windows of 7 .* {height} x {width} pixels") as refused:
        maxvit_t.check_size(height, width)
    message = str(refused.value)
    named = [int(each) for each in re.findall(r"\d+", message.partition(" and ")[2].partition(";")[0])]
    for side in (height, width):
        if side % unit:
            assert {each for each in (side // unit * unit, side // unit * unit + unit) if each} <= set(named)
    assert all(each > 0 and each % unit == 0 for each in named)
    window = re.search(r"a window of (\d+) takes this size", message)
    assert bool(window) == (not height % 32 and not width % 32)
    if window:
        replace(maxvit_t, window=int(window[1])).check_size(height, width)
    return None


def test_every_picture_and_every_model_that_windows_do_not_tile_is_refused() -> None:
    with pytest.raises(
        ValueError, match="64 x 96 pixels: each side has to be a multiple of 64, and 64 or 128 would be"
    ):
        built()(images(1, 64, 96))
    with pytest.raises(ValueError, match="224 or 448 would be the nearest; a window of 12 takes this size"):
        MultiAxisVisionTransformer(replace(maxvit_t, image_size=384), 7)
    for numbers, message in (
        ({"widths": (32, 64)}, "2 widths and 4 depths"),
        ({"widths": (32, 64, 80, 96)}, "width 80 .* heads of 32: 64 or 96 would"),
        ({"stem": 0}, "stem is 0"),
        ({"window": 0}, "window is 0"),
        ({"bias_window": 0}, "bias_window is 0"),
        ({"depths": (1, 0, 1, 1)}, r"depths is \(1, 0, 1, 1\)"),
        ({"stochastic_depth": 1.0}, "stochastic_depth is 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **numbers).check()


# --- training -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_weight_begins_as_in_the_authors_code() -> None:
    model = MultiAxisVisionTransformer(maxvit_t, 1000).to_empty(device="cpu")
    initialise(model, torch.Generator().manual_seed(0), head_bias=-10.0)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and not module.running_mean.any()
            assert module.running_var is not None and not (module.running_var - 1).any()
            assert module.momentum == pytest.approx(1 - 0.99) and module.eps == 1e-3
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight)) and not module.bias.any()
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert torch.equal(module.bias, torch.full_like(module.bias, -10 if name == "head.fc" else 0))
    drawn = [value for value in model.parameters() if value.ndim > 1]
    assert all(float(value.std()) == pytest.approx(0.02, rel=5 * value.numel() ** -0.5) for value in drawn)
    values = torch.cat([value.flatten() for value in drawn])
    assert float(values.abs().max()) > 4 * 0.02  # a normal that is not cut off
    features = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    assert not (model.head(features) == -10).any()


def test_every_weight_follows_from_the_generator_alone() -> None:
    states = []
    for noise, number in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(noise)
        model = MultiAxisVisionTransformer(SMALL, 7)
        initialise(model, torch.Generator().manual_seed(number))
        states.append(model.state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    assert drawn == {name for name, value in first.items() if value.ndim > 1}


def test_every_parameter_decays_but_what_the_authors_code_leaves_out() -> None:
    model = built()
    decayed = {name for name, _ in model.named_parameters()} - model.undecayed()
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert decayed == {f"{name}.weight" for name in layers}


def test_every_branch_of_a_later_block_is_skipped_more_often_and_none_of_the_first() -> None:
    model = MultiAxisVisionTransformer(replace(SMALL, stochastic_depth=0.5), 7)
    rates = [[m.rate for m in block.modules() if isinstance(m, StochasticDepth)] for block in model.blocks]
    assert rates == [[pytest.approx(0.5 * number / 5)] * 3 for number in range(5)]


def test_every_picture_skips_a_branch_whole_or_has_it_scaled_in_training_alone() -> None:
    torch.manual_seed(0)
    skip, x = StochasticDepth(0.25), torch.randn(4000, 2, 3)
    found = skip(x)
    kept = found.any((1, 2))
    assert not found[~kept].any() and float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(found[kept], x[kept] / 0.75)
    assert skip.eval()(x) is x


def test_every_gradient_is_as_if_no_block_were_computed_again() -> None:
    gradients = []
    for again in (False, True):
        model = built(replace(SMALL, stochastic_depth=0.5)).train()
        for block in model.blocks if again else []:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        torch.manual_seed(4)
        model(images(3)).square().sum().backward()
        gradients.append([value.grad for value in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.slow
def test_a_compiled_model_is_as_if_it_were_not() -> None:
    ours, pictures = built(Maxvit(stem=32, widths=(64,), depths=(2,), window=2, image_size=16)).train(), images(2, 16)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pictures), ours(pictures), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("automatic", [False, True])
@torch.no_grad()
def test_half_precision_stays_within_a_twentieth_whatever_casts_to_it(automatic: bool) -> None:
    model, pictures = built().eval(), images(4)
    expected = model(pictures)
    if automatic:
        with torch.autocast("cpu", torch.bfloat16):
            found = model(pictures)
    else:
        found = model.bfloat16()(pictures.bfloat16())
    assert found.dtype == torch.bfloat16
    assert float((found - expected).norm()) < 0.05 * float(expected.norm())


def test_a_model_without_classes_gives_what_its_head_would_have_read() -> None:
    model, bare = built().eval(), built(classes=0).eval()
    left = bare.load_state_dict(model.state_dict(), strict=False)
    assert left.unexpected_keys == ["head.fc.weight", "head.fc.bias"] and not left.missing_keys
    assert model.head.fc is not None
    assert torch.equal(model.head.fc(bare(images(2))), model(images(2)))
