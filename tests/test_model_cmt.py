"""CMT: published counts, the layout of its authors' code, and its forward pass computed again from the equations.

No library has the family, so the reference is written out here, in arithmetic alone.

Legend: b batch, d c channels in and out, y x rows and columns, n places, m keys, h heads, e width of a head.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pipeline.architectures.cmt import Cmt, cmt_b, cmt_s, cmt_ti, cmt_xs
from pipeline.models.cmt import (
    Attention,
    Block,
    ConvolutionalTransformer,
    FeedForward,
    StochasticDepth,
    initialise,
    resized_bias,
)
from pipeline.models.flops import cmt as flops

pytestmark = pytest.mark.timeout(300)

Module = TypeVar("Module", bound=nn.Module)
SMALL = Cmt(
    widths=(6, 8, 12, 16), depths=(1, 2, 1, 2), heads=(1, 2, 2, 4), expansion=2.4, stem=4, features=10,
    image_size=64, dropout=0.0,
)  # fmt: skip
CLASSES = 5
# Counted by running the authors' code; the papers' own figures agree but for the parameters of CMT-S.
PUBLISHED = {
    "ti": (cmt_ti, 9_492_426, 0.639e9),
    "xs": (cmt_xs, 15_247_208, 1.547e9),
    "s": (cmt_s, 26_256_160, 4.032e9),
    "b": (cmt_b, 45_715_076, 9.317e9),
    "ti at 224": (replace(cmt_ti, image_size=224), 9_705_546, 1.291e9),
}
every_published = pytest.mark.parametrize(("config", "count", "cost"), PUBLISHED.values(), ids=PUBLISHED)
every_mode = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
every_stage = pytest.mark.parametrize("number", range(4), ids=[f"reduction {k}" for k in SMALL.reductions])


def chance(word: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(word)


def drawn(*shape: int, word: int = 1) -> Tensor:
    return torch.randn(*shape, generator=chance(word), dtype=torch.float64)


def images(count: int, height: int = SMALL.image_size, width: int = SMALL.image_size) -> Tensor:
    return drawn(count, 3, height, width)


@torch.no_grad()
def shaken(module: Module, word: int = 2) -> Module:
    """With random numbers everywhere, in fp64: no zero and no one hides a part of the model."""
    module.double()
    for _, parameter in sorted(module.named_parameters()):
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=chance(word), dtype=torch.float64))
        word += 1
    for name, buffer in sorted(module.named_buffers()):
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=chance(word), dtype=torch.float64) + 0.5)
            word += "running" in name
    return module


def built(config: Cmt = SMALL, classes: int = CLASSES) -> ConvolutionalTransformer:
    return shaken(ConvolutionalTransformer(config, classes))


# --- the paper and its authors' code, written out ---------------------------------------------------------------------


class Plain:
    """The forward pass from a state dict in the layout of the authors' code."""

    def __init__(self, config: Cmt, state: dict[str, Tensor], *, training: bool) -> None:
        self.config, self.state, self.training = config, state, training
        self.maps: list[Tensor] = []

    def logits(self, pictures: Tensor) -> Tensor:
        x = pictures
        for number, stride in ((1, 2), (2, 1), (3, 1)):
            x = self.batch_norm(gelu(self.convolution(x, f"stem_conv{number}", stride)), f"stem_norm{number}")
        for letter, stage in zip("abcd", self.config.stages, strict=True):
            side = self.config.image_size // stage.stride
            squares = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # b d y 2 x 2
            x = torch.einsum("bdyixj,cdij->bcyx", squares, self.state[f"patch_embed_{letter}.proj.weight"])
            x = self.layer_norm(
                x + column(self.state[f"patch_embed_{letter}.proj.bias"]), f"patch_embed_{letter}.norm", 1e-5
            )
            bias = interpolated(self.state[f"relative_pos_{letter}"], (side, side), tuple(x.shape[2:]), stage.reduction)
            for number in range(stage.depth):
                x = self.block(x, bias, f"blocks_{letter}.{number}.", stage.heads, stage.reduction)
        x = self.batch_norm(self.pointwise(x, "_fc"), "_bn")
        x = (x / (1 + torch.exp(-x))).mean((2, 3))
        return x @ self.state["head.weight"].T + self.state["head.bias"]

    def block(self, x: Tensor, bias: Tensor, name: str, heads: int, reduction: int) -> Tensor:
        x = self.depthwise(x, name + "proj") + x
        x = self.attention(self.layer_norm(x, name + "norm1", 1e-6), bias, name + "attn.", heads, reduction) + x
        return self.feed_forward(self.layer_norm(x, name + "norm2", 1e-6), name + "mlp.") + x

    def attention(self, x: Tensor, bias: Tensor, name: str, heads: int, k: int) -> Tensor:
        coarse = x
        if k > 1:
            squares = x.unflatten(3, (-1, k)).unflatten(2, (-1, k))  # b d y k x k
            coarse = torch.einsum("bdyixj,dij->bdyx", squares, self.state[name + "sr.0.weight"][:, 0])
            coarse = self.batch_norm(coarse + column(self.state[name + "sr.0.bias"]), name + "sr.1")
        query, key, value = (
            torch.einsum("bdyx,cd->bcyx", source, self.state[f"{name}{part}.weight"]).flatten(2)
            + self.state[f"{name}{part}.bias"][:, None]
            for source, part in ((x, "q"), (coarse, "k"), (coarse, "v"))
        )  # b c n, b c m
        width, outs, maps = x.shape[1] // heads, [], []
        for head in range(heads):
            mine = slice(head * width, (head + 1) * width)
            scores = torch.einsum("ben,bem->bnm", query[:, mine], key[:, mine]) / math.sqrt(width) + bias[head]
            shares = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
            maps.append(shares)
            outs.append(torch.einsum("bnm,bem->ben", shares, value[:, mine]))
        self.maps.append(torch.stack(maps, 1))
        out = torch.einsum("bdn,cd->bcn", torch.cat(outs, 1), self.state[name + "proj.weight"])
        return (out + self.state[name + "proj.bias"][:, None]).reshape(x.shape)

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        x = self.batch_norm(gelu(self.pointwise(x, name + "conv1.0")), name + "conv1.2")
        x = self.batch_norm(gelu(self.depthwise(x, name + "proj") + x), name + "proj_bn")
        return self.batch_norm(self.pointwise(x, name + "conv2.0"), name + "conv2.1")

    def convolution(self, x: Tensor, name: str, stride: int) -> Tensor:
        taps = ((i, j, self.state[name + ".weight"][:, :, i, j]) for i in range(3) for j in range(3))
        out = sum(torch.einsum("bdyx,cd->bcyx", window(x, i, j)[:, :, ::stride, ::stride], w) for i, j, w in taps)
        return out + column(self.state[name + ".bias"])

    def depthwise(self, x: Tensor, name: str) -> Tensor:
        taps = ((i, j, self.state[name + ".weight"][:, 0, i, j]) for i in range(3) for j in range(3))
        return sum(window(x, i, j) * column(w) for i, j, w in taps) + column(self.state[name + ".bias"])

    def pointwise(self, x: Tensor, name: str) -> Tensor:
        out = torch.einsum("bdyx,cd->bcyx", x, self.state[name + ".weight"][:, :, 0, 0])
        return out + column(self.state[name + ".bias"])

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        mean, var = self.state[name + ".running_mean"], self.state[name + ".running_var"]
        if self.training:
            mean = x.mean((0, 2, 3))
            var = ((x - column(mean)) ** 2).mean((0, 2, 3))
        x = (x - column(mean)) / torch.sqrt(column(var) + 1e-5)
        return x * column(self.state[name + ".weight"]) + column(self.state[name + ".bias"])

    def layer_norm(self, x: Tensor, name: str, epsilon: float) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(1, keepdim=True) + epsilon)
        return x * column(self.state[name + ".weight"]) + column(self.state[name + ".bias"])


def column(values: Tensor) -> Tensor:
    return values[:, None, None]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def window(x: Tensor, row: int, column: int) -> Tensor:
    """What one tap of a kernel of three by three sees: the map, moved, with zeros beyond its edge."""
    height, width = x.shape[2:]
    framed = x.new_zeros(*x.shape[:2], height + 2, width + 2)
    framed[:, :, 1:-1, 1:-1] = x
    return framed[:, :, row : row + height, column : column + width]


def cubic(old: int, new: int) -> Tensor:
    """(new, old): weights of bicubic interpolation along one axis (Keys 1981, a = -3/4); edges are repeated."""
    weights, a = torch.zeros(new, old, dtype=torch.float64), -0.75
    for target in range(new):
        place = (target + 0.5) * old / new - 0.5
        for source in range(math.floor(place) - 1, math.floor(place) + 3):
            t = abs(place - source)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[target, min(max(source, 0), old - 1)] += near if t <= 1 else far
    return weights


def interpolated(table: Tensor, grid: tuple[int, ...], wanted: tuple[int, ...], reduction: int) -> Tensor:
    """(h, n, m) to (h, n', m'): along all four axes at once."""
    keys, wanted_keys = (tuple(side // reduction for side in sides) for sides in (grid, wanted))
    table = table.unflatten(2, keys).unflatten(1, grid)
    axes = [cubic(old, new) for old, new in zip((*grid, *keys), (*wanted, *wanted_keys), strict=True)]
    return torch.einsum("hyxvu,Yy,Xx,Vv,Uu->hYXVU", table, *axes).flatten(3).flatten(1, 2)


def leaves(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """A copy of the state, of which a gradient can be taken."""
    trained = dict(module.named_parameters())
    return {prefix + n: v.detach().clone().requires_grad_(n in trained) for n, v in module.state_dict().items()}


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def compare_gradients(
    module: nn.Module, ours: Tensor, state: dict[str, Tensor], theirs: Tensor, prefix: str = ""
) -> None:
    """Of a sum with random weights; relative to the largest of each parameter."""
    weights = drawn(*ours.shape, word=7)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    expecteds = {name: gradient(state[prefix + name]) for name, _ in module.named_parameters()}
    overall = max(float(expected.abs().max()) for expected in expecteds.values())
    for name, parameter in module.named_parameters():
        expected = expecteds[name]
        # What a normalisation takes away again has no gradient but rounding.
        tolerance = 1e-9 * max(float(expected.abs().max()), 1e-4 * overall)
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@every_mode
@pytest.mark.parametrize("size", [(64, 64), (32, 128), (96, 64)], ids=lambda size: f"{size[0]} x {size[1]}")
def test_every_logit_and_gradient_is_as_if_written_out(training: bool, size: tuple[int, int]) -> None:
    model = built().train(training)
    state = leaves(model)
    ours = model(images(3, *size))
    theirs = Plain(SMALL, state, training=training).logits(images(3, *size))
    assert float(theirs.detach().std()) > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    compare_gradients(model, ours, state, theirs)


@every_mode
@every_stage
def test_every_block_is_as_if_written_out(training: bool, number: int) -> None:
    stage = SMALL.stages[number]
    block = shaken(Block(stage, 0.0)).train(training)
    state = leaves(block, "block.")
    x, bias = drawn(2, stage.width, 8, 16), drawn(stage.heads, 128, 128 // stage.reduction**2, word=3)
    theirs = Plain(SMALL, state, training=training).block(x, bias, "block.", stage.heads, stage.reduction)
    ours = block(x, bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    compare_gradients(block, ours, state, theirs, "block.")


# --- counts and names -------------------------------------------------------------------------------------------------


def on_meta(config: Cmt, classes: int) -> ConvolutionalTransformer:
    with torch.device("meta"):
        return ConvolutionalTransformer(config, classes)


@every_published
def test_every_model_of_the_paper_has_the_published_parameters_and_cost(config: Cmt, count: int, cost: float) -> None:
    assert sum(p.numel() for p in on_meta(config, 1000).parameters()) == flops.parameters(config, 1000) == count
    assert flops.macs(config, 1000) == pytest.approx(cost, rel=0.001)


@st.composite
def configs(draw: st.DrawFn) -> Cmt:
    four = [draw(st.tuples(*[st.integers(1, most)] * 4)) for most in (3, 2, 3)]
    heads, depths, each = four
    widths = tuple(h * e * 2 for h, e in zip(heads, each, strict=True))
    reductions = draw(st.tuples(*[st.sampled_from([1, 2, 3])] * 4))
    config = Cmt(widths, depths, heads, reductions, draw(st.floats(0.5, 5)), draw(st.integers(1, 9)), 7)
    return replace(config, image_size=config.multiple * draw(st.integers(1, 2)))


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(configs(), st.sampled_from([0, 1, 17]))
def test_every_parameter_and_multiplication_is_counted_whatever_the_widths(config: Cmt, classes: int) -> None:
    model = on_meta(config, classes).eval()
    assert sum(p.numel() for p in model.parameters()) == flops.parameters(config, classes)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.empty(2, 3, config.image_size, config.image_size))
    assert counter.get_total_flops() == 2 * 2 * flops.macs(config, classes)


def layout(config: Cmt, classes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the authors' checkpoints, in their order."""
    places = [(config.image_size // stage.stride) ** 2 for stage in config.stages]
    for letter, n, stage in zip("abcd", places, config.stages, strict=True):
        yield f"relative_pos_{letter}", (stage.heads, n, n // stage.reduction**2)
    for number, before in ((1, 3), (2, config.stem), (3, config.stem)):
        yield from weighted(f"stem_conv{number}", config.stem, before, 3, 3)
        yield from normalised(f"stem_norm{number}", config.stem)
    for letter, before, width in zip("abcd", (config.stem, *config.widths), config.widths, strict=False):
        yield from weighted(f"patch_embed_{letter}.proj", width, before, 2, 2)
        yield from weighted(f"patch_embed_{letter}.norm", width)
    for letter, stage in zip("abcd", config.stages, strict=True):
        for number in range(stage.depth):
            d, r, k = stage.width, stage.hidden, stage.reduction
            name = f"blocks_{letter}.{number}."
            yield from weighted(name + "norm1", d)
            for part in ("q", "k", "v", "proj"):
                yield from weighted(f"{name}attn.{part}", d, d)
            if k > 1:
                yield from weighted(name + "attn.sr.0", d, 1, k, k)
                yield from normalised(name + "attn.sr.1", d)
            yield from weighted(name + "norm2", d)
            yield from weighted(name + "mlp.conv1.0", r, d, 1, 1)
            yield from normalised(name + "mlp.conv1.2", r)
            yield from weighted(name + "mlp.proj", r, 1, 3, 3)
            yield from normalised(name + "mlp.proj_bn", r)
            yield from weighted(name + "mlp.conv2.0", d, r, 1, 1)
            yield from normalised(name + "mlp.conv2.1", d)
            yield from weighted(name + "proj", d, 1, 3, 3)
    yield from weighted("_fc", config.features, config.widths[-1], 1, 1)
    yield from normalised("_bn", config.features)
    yield from weighted("head", classes, config.features)


def weighted(name: str, out: int, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name + ".weight", (out, *shape)
    yield name + ".bias", (out,)


def normalised(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from weighted(name, width)
    yield from ((f"{name}.running_{what}", (width,)) for what in ("mean", "var"))
    yield f"{name}.num_batches_tracked", ()


@every_published
def test_every_name_and_shape_is_that_of_the_authors_code(config: Cmt, count: int, cost: float) -> None:
    state = on_meta(config, 1000).state_dict()
    assert [(name, tuple(tensor.shape)) for name, tensor in state.items()] == list(layout(config, 1000))


def test_every_parameter_that_decays_is_a_matrix_or_a_kernel() -> None:
    model = built()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    decayed = {f"{name}.weight" for name, _ in layers}
    assert model.undecayed() == {name for name, _ in model.named_parameters()} - decayed
    assert {
        "relative_pos_a",
        "relative_pos_d",
        "head.bias",
        "blocks_a.0.norm1.weight",
        "_bn.weight",
    } <= model.undecayed()


# --- units ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_local_perception_is_the_map_and_its_depthwise_convolution_as_if_nothing_followed() -> None:
    stage = SMALL.stages[1]
    block = shaken(Block(stage, 0.0)).eval()
    last = block.mlp.conv2[1]
    assert isinstance(last, nn.BatchNorm2d) and block.proj.bias is not None
    for silent in (block.attn.proj, last):
        silent.weight.zero_()
        silent.bias.zero_()
    x, bias = drawn(2, stage.width, 8, 8), drawn(stage.heads, 64, 4)
    convolution = nn.functional.conv2d(x, block.proj.weight, block.proj.bias, padding=1, groups=stage.width)
    torch.testing.assert_close(block(x, bias), x + convolution)
    block.proj.weight.zero_()
    block.proj.bias.zero_()
    assert torch.equal(block(x, bias), x)


@torch.no_grad()
def test_attention_where_every_place_has_its_key_is_as_if_multi_head_attention_with_a_mask() -> None:
    stage = SMALL.stages[3]
    attention = shaken(Attention(stage))
    reference = nn.MultiheadAttention(stage.width, stage.heads, batch_first=True, dtype=torch.float64)
    reference.in_proj_weight.copy_(torch.cat([part.weight for part in (attention.q, attention.k, attention.v)]))
    assert reference.in_proj_bias is not None
    reference.in_proj_bias.copy_(torch.cat([part.bias for part in (attention.q, attention.k, attention.v)]))
    reference.out_proj.load_state_dict(attention.proj.state_dict())
    x, bias = drawn(2, stage.width, 3, 5), drawn(stage.heads, 15, 15, word=3)
    tokens = x.flatten(2).mT
    expected, weights = reference(tokens, tokens, tokens, attn_mask=bias.repeat(2, 1, 1), average_attn_weights=False)
    maps: list[Tensor] = []
    torch.testing.assert_close(attention(x, bias, maps).flatten(2).mT, expected)
    torch.testing.assert_close(maps[0], weights)


@torch.no_grad()
def test_the_shortcut_of_the_feed_forward_network_is_as_if_its_kernel_had_a_one_in_the_middle() -> None:
    stage = SMALL.stages[0]
    network = shaken(FeedForward(stage)).eval()
    x = drawn(2, stage.width, 4, 4)
    assert network.proj.bias is not None
    network.proj.weight.zero_()
    network.proj.bias.zero_()
    layers = [*network.conv1, nn.GELU(), network.proj_bn, *network.conv2]
    torch.testing.assert_close(network(x), nn.Sequential(*layers)(x))  # without a kernel, a plain network
    network.proj.weight[:, 0, 1, 1] = -1
    alike = network(x)
    torch.testing.assert_close(alike, alike[:1, :, :1, :1].expand_as(alike))  # what is taken away is missing


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3))
def test_every_grid_of_the_pyramid_is_half_as_fine_whatever_the_picture(rows: int, columns: int) -> None:
    height, width = 32 * rows, 32 * columns
    model = built().eval().float()
    pictures = images(2, height, width).float()
    features = model.forward_features(pictures)
    assert features.grid == (rows, columns) and features.prefix == 0
    assert features.tokens.shape == features.patches.shape == (2, rows * columns, SMALL.widths[-1])
    shapes = [tuple(weights.shape) for weights in model.attention(pictures)]
    assert shapes == [
        (2, stage.heads, height * width // stage.stride**2, rows * columns)
        for stage in SMALL.stages
        for _ in range(stage.depth)
    ]


@every_mode
def test_every_attention_map_is_the_softmax_written_out_and_leaves_the_model_as_it_was(training: bool) -> None:
    model, again = built().train(training), built().train(training)
    reference = Plain(SMALL, leaves(model), training=training)
    reference.logits(images(2))
    maps = model.attention(images(2))
    again.forward_features(images(2))
    assert len(maps) == len(model.blocks) == len(reference.maps)
    for ours, theirs in zip(maps, reference.maps, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), again.buffers(), strict=True))


# --- the bias for other sizes -----------------------------------------------------------------------------------------

grids = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(grids, grids, st.sampled_from([1, 2, 4]))
def test_every_resized_bias_is_as_if_interpolated_along_four_axes(
    keys: tuple[int, int], wanted_keys: tuple[int, int], reduction: int
) -> None:
    grid, wanted = ((rows * reduction, columns * reduction) for rows, columns in (keys, wanted_keys))
    table = drawn(2, math.prod(grid), math.prod(keys))
    ours = resized_bias(table, grid, wanted, reduction)
    torch.testing.assert_close(ours, interpolated(table, grid, wanted, reduction))
    level = torch.full_like(table, 2.5)
    torch.testing.assert_close(resized_bias(level, grid, wanted, reduction), torch.full_like(ours, 2.5))


def test_a_table_of_the_pictures_size_is_as_if_there_were_no_interpolation() -> None:
    table = drawn(2, 64, 4)
    assert resized_bias(table, (8, 8), (8, 8), 4) is table
    # As many places in another shape are other places.
    assert not torch.allclose(resized_bias(table, (8, 8), (4, 16), 4), table)


def test_every_table_gets_a_gradient_whatever_the_size() -> None:
    for size in ((64, 64), (96, 32)):
        model = built()
        model(images(2, *size)).square().sum().backward()
        for letter in "abcd":
            assert gradient(model.get_parameter(f"relative_pos_{letter}")).abs().sum() > 0, (size, letter)


# --- sizes and values that are refused --------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(0, 200))
def test_every_size_is_taken_or_refused_by_the_nearest_that_would_do(height: int, width: int) -> None:
    fits = all(side and side % 32 == 0 for side in (height, width))
    if fits:
        return SMALL.check_size(height, width)
    with pytest.raises(ValueError, match=f"^a picture of {height} x {width} pixels: its (height|width)") as caught:
        SMALL.check_size(height, width)
    numbers = [int(word) for word in str(caught.value).split("such as ")[1].split(" or ")]
    side = height if "its height" in str(caught.value) else width
    assert all(number % 32 == 0 and number > 0 and abs(number - side) <= 32 for number in numbers)


def test_every_picture_that_does_not_fit_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(ValueError, match=r"64 x 80 pixels: its width has to be a multiple of 32, such as 64 or 96"):
        on_meta(SMALL, 2)(torch.empty(1, 3, 64, 80, device="meta"))
    with pytest.raises(ValueError, match=r"225 x 225 pixels: its height .* such as 224 or 256"):
        on_meta(replace(cmt_s, image_size=225), 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": (1, 3, 2, 4)}, "width 8 does not divide over 3 heads"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"stochastic_depth": -0.1}, "stochastic_depth is -0.1"),
    ],
)
def test_every_value_without_a_model_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ConvolutionalTransformer(replace(SMALL, **change), 2)


# --- batches and chance -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_picture_of_a_batch_is_as_if_alone_but_in_training() -> None:
    model, many = built().eval(), images(4)
    before = [buffer.clone() for buffer in model.buffers()]
    together = model(many)
    for row, picture in zip(together, many, strict=True):
        torch.testing.assert_close(model(picture[None])[0], row)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    model.train()
    assert not torch.allclose(model(many)[0], model(many[:2])[0], rtol=1e-3)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True)]
    assert all(moved)


@torch.no_grad()
def test_every_branch_is_skipped_for_whole_pictures_and_the_more_the_deeper_it_is() -> None:
    model = ConvolutionalTransformer(replace(SMALL, stochastic_depth=0.5), CLASSES)
    branches = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    assert [branch.rate for branch in branches] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    branch = branches[3]
    ones = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    out = branch(ones)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    values = out[:, 0, 0]
    torch.testing.assert_close(values.unique(), torch.tensor([0, 1 / 0.7]))
    assert abs(float((values == 0).double().mean()) - 0.3) < 6 * math.sqrt(0.3 * 0.7 / 4000)
    assert torch.equal(branch.eval()(ones), ones)


@torch.no_grad()
def test_every_chance_is_off_in_evaluation_and_dropout_is_before_the_classifier_alone() -> None:
    plain, chancy = built().eval(), built(replace(SMALL, dropout=0.5, stochastic_depth=0.5)).eval()
    assert torch.equal(plain(images(2)), chancy(images(2)))
    plain, dropping = (built(replace(SMALL, dropout=share), 0).train() for share in (0.0, 0.5))
    pooled = plain(images(8))
    torch.manual_seed(0)
    shares = dropping(images(8)) / pooled
    torch.testing.assert_close(shares.round(decimals=9).unique(), torch.tensor([0.0, 2.0], dtype=torch.float64))


def test_every_recomputed_block_leaves_the_gradient_as_if_it_were_kept() -> None:
    kept, recomputed = built(), built()
    for block in recomputed.blocks:
        inner = block.forward
        block.forward = lambda *inputs, inner=inner: checkpoint(inner, *inputs, use_reentrant=False)
    for model in (kept, recomputed):
        model(images(2)).square().sum().backward()
    for ours, theirs in zip(recomputed.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@torch.no_grad()
def test_every_precision_and_memory_format_gives_about_the_same() -> None:
    model = ConvolutionalTransformer(SMALL, CLASSES)
    initialise(model, chance())
    model.eval()
    pictures = images(2, 96, 64).float()
    expected = model(pictures)
    torch.testing.assert_close(model(pictures.contiguous(memory_format=torch.channels_last)), expected)
    scale = float(expected.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(pictures).float(), expected, rtol=0, atol=0.05 * scale)
    torch.testing.assert_close(model.bfloat16()(pictures.bfloat16()).float(), expected, rtol=0, atol=0.05 * scale)


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_and_as_if_eager_whatever_the_size() -> None:
    model = built(replace(SMALL, depths=(1, 1, 1, 1))).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for size in ((64, 64), (32, 96)):
        torch.testing.assert_close(compiled(images(2, *size)), model(images(2, *size)))


# --- initialisation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_weight_begins_as_in_the_authors_code() -> None:
    config = replace(SMALL, widths=(32, 48, 64, 64), stem=24, features=96, expansion=4)
    model = ConvolutionalTransformer(config, 50).to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    initialise(model, chance(), head_bias=-10.0)
    assert model.head is not None and (model.head.bias == -10).all()
    for name, module in model.named_modules():
        match module:
            case nn.Linear():
                expected = 0.02
            case nn.Conv2d():
                expected = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            case nn.BatchNorm2d() | nn.LayerNorm():
                assert (module.weight == 1).all() and not module.bias.any()
                continue
            case _:
                continue
        spread = 6 / math.sqrt(2 * module.weight.numel())
        assert float(module.weight.std()) == pytest.approx(expected, rel=spread), name
        assert module is model.head or (module.bias is not None and not module.bias.any()), name
    for name, buffer in model.named_buffers():
        assert (buffer == name.endswith("running_var")).all(), name
    for letter in "abcd":
        table = model.get_parameter(f"relative_pos_{letter}")
        assert float(table.std()) == pytest.approx(1, rel=6 / math.sqrt(2 * table.numel()))


def test_every_weight_follows_from_the_generator_alone() -> None:
    def state(word: int, around: int) -> dict[str, Tensor]:
        torch.manual_seed(around)
        model = ConvolutionalTransformer(SMALL, CLASSES)
        initialise(model, chance(word))
        return model.state_dict()

    first, again, other = state(1, 1), state(1, 2), state(2, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = {name for name, tensor in first.items() if tensor.ndim > 1}
    assert {name for name in first if not torch.equal(first[name], other[name])} == matrices


@torch.no_grad()
def test_a_model_without_classes_is_as_if_its_head_were_left_out() -> None:
    whole, headless = built(), ConvolutionalTransformer(SMALL, 0).double()
    headless.load_state_dict({name: v for name, v in whole.state_dict().items() if not name.startswith("head.")})
    assert whole.head is not None
    pooled = headless.eval()(images(2))
    assert pooled.shape == (2, SMALL.features)
    torch.testing.assert_close(whole.head(pooled), whole.eval()(images(2)))
