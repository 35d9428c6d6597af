"""CMT of Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers" (CVPR 2022).

Wiring and initialisation are those of the authors' code, which gave the published weights; where it departs from the
paper, the unit's docstring says so. Parameters bear the names of that code. The state between the blocks is a map whose
channels lie next to each other in memory, so that places are tokens without a copy.

Batch normalisation couples the pictures of a pass in training, and only there: the size of a micro-batch decides what
is learnt, and a block that is computed again for its backward pass moves its running statistics twice. In evaluation
a picture's result is its own.

Legend: b batch, d width, y x rows and columns of a map, n places (y x), m places that have a key, h heads, e width of a
head, r hidden width, c classes, f channels that are pooled.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, linear, scaled_dot_product_attention, silu

from pipeline.architectures.cmt import Cmt, Stage
from pipeline.models.depth import StochasticDepth
from pipeline.models.features import Features

EPSILON = 1e-6
Grid = tuple[int, int]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm of each place of a map over its channels."""

    def forward(self, input: Tensor) -> Tensor:
        """(b, d, y, x) to (b, d, y, x), with channels next to each other in memory."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pointwise(nn.Conv2d):
    """A convolution of one by one, done as the linear layer that it is: on tokens, which need no copy here."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__(before, width, 1)

    def forward(self, input: Tensor) -> Tensor:
        """(b, width before, y, x) to (b, d, y, x)."""
        return linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Squares of two by two places as one: the patch aggregation before each stage."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(before, width, 2, 2)
        self.norm = ChannelNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, width before, 2 y, 2 x) to (b, d, y, x)."""
        return self.norm(self.proj(x))


class Attention(nn.Module):
    """Lightweight multi-head self-attention, LMHSA: keys and values of a coarser map, and a bias for each pair.

    As in the authors' code the map is made coarser before keys and values are projected, once for both and with a
    batch normalisation; the paper does it after the projections, for each.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        d, k = stage.width, stage.reduction
        self.heads = stage.heads
        self.q = nn.Linear(d, d)
        self.k = nn.Linear(d, d)
        self.v = nn.Linear(d, d)
        self.proj = nn.Linear(d, d)
        self.sr = nn.Sequential(nn.Conv2d(d, d, k, k, groups=d), nn.BatchNorm2d(d)) if k > 1 else None

    def forward(self, x: Tensor, bias: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(b, d, y, x) and (h, n, m) to (b, d, y, x); the softmax's weights (b, h, n, m) are put into `maps`."""
        tokens = _tokens(x)
        coarse = tokens if self.sr is None else _tokens(self.sr(x))  # b m d
        q, k, v = (
            layer(inputs).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # b h n e, b h m e
            for layer, inputs in ((self.q, tokens), (self.k, coarse), (self.v, coarse))
        )
        bias = bias.unsqueeze(0)  # 1 h n m, which the fused kernels ask for
        if maps is not None:
            maps.append(torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, dim=-1))
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias)  # b h n e
        return _map(self.proj(out.transpose(1, 2).flatten(2)), x.shape[2:])


class FeedForward(nn.Module):
    """Inverted residual feed-forward network, IRFFN: the shortcut is around its depthwise convolution.

    It joins at the hidden width, before the activation; in the authors' code batch normalisations follow activations.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        d, r = stage.width, stage.hidden
        self.conv1 = nn.Sequential(Pointwise(d, r), nn.GELU(), nn.BatchNorm2d(r))
        self.proj = nn.Conv2d(r, r, 3, padding=1, groups=r)
        self.proj_bn = nn.BatchNorm2d(r)
        self.conv2 = nn.Sequential(Pointwise(r, d), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, y, x) to (b, d, y, x)."""
        x = self.conv1(x)  # b r y x
        x = self.proj_bn(gelu(x + self.proj(x)))
        return self.conv2(x)


class Block(nn.Module):
    """Local perception unit (LPU: a depthwise convolution beside a shortcut), attention, feed-forward network."""

    def __init__(self, stage: Stage, drop: float) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(stage.width, eps=EPSILON)
        self.attn = Attention(stage)
        self.drop = StochasticDepth(drop)
        self.norm2 = ChannelNorm(stage.width, eps=EPSILON)
        self.mlp = FeedForward(stage)
        self.proj = nn.Conv2d(stage.width, stage.width, 3, padding=1, groups=stage.width)

    def forward(self, x: Tensor, bias: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(b, d, y, x) and (h, n, m) to (b, d, y, x); the attention's weights (b, h, n, m) are put into `maps`."""
        x = x + self.proj(x)
        x = x + self.drop(self.attn(self.norm1(x), bias, maps))
        return x + self.drop(self.mlp(self.norm2(x)))


class ConvolutionalTransformer(nn.Module):
    """Pictures to logits; `classes` may be 0 for none.

    Both sides of a picture have to be multiples of `config.multiple`; others are a ValueError that names the nearest.
    One table of biases serves all blocks of a stage: it belongs to no block, but is handed to each. For pictures of
    another size than `config.image_size` it is interpolated in every pass (`resized_bias`).
    """

    def __init__(self, config: Cmt, classes: int) -> None:
        super().__init__()
        config.check()
        self.config = config
        before = (config.stem, *config.widths[:-1])
        drops = iter(_rising(config.stochastic_depth, sum(config.depths)))
        self.stem_conv1 = nn.Conv2d(3, config.stem, 3, 2, padding=1)
        self.stem_norm1 = nn.BatchNorm2d(config.stem)
        self.stem_conv2 = nn.Conv2d(config.stem, config.stem, 3, padding=1)
        self.stem_norm2 = nn.BatchNorm2d(config.stem)
        self.stem_conv3 = nn.Conv2d(config.stem, config.stem, 3, padding=1)
        self.stem_norm3 = nn.BatchNorm2d(config.stem)
        for letter, width, stage in zip("abcd", before, config.stages, strict=True):
            places = (config.image_size // stage.stride) ** 2
            table = torch.zeros(stage.heads, places, places // stage.reduction**2)
            self.register_parameter(f"relative_pos_{letter}", nn.Parameter(table))
            self.add_module(f"patch_embed_{letter}", PatchEmbed(width, stage.width))
        for letter, stage in zip("abcd", config.stages, strict=True):
            blocks = nn.ModuleList(Block(stage, next(drops)) for _ in range(stage.depth))
            self.add_module(f"blocks_{letter}", blocks)
        self._fc = Pointwise(config.widths[-1], config.features)
        self._bn = nn.BatchNorm2d(config.features)
        self.drop = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.features, classes) if classes else None

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in order."""
        return [block for letter in "abcd" for block in getattr(self, f"blocks_{letter}")]

    def undecayed(self) -> set[str]:
        """Names of the parameters that must not decay: biases, normalisations, and the tables of relative biases.

        The authors' code lets the tables decay, and nothing else of these.
        """
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim == 1 or name.startswith("relative_pos")
        }

    def forward_features(self, images: Tensor) -> Features:
        """(b, 3, s, s'), both sides multiples of `config.multiple`, to the last stage's places as tokens (b, n, d)."""
        x = self._trunk(images)
        return Features(_tokens(x), (x.shape[2], x.shape[3]), prefix=0)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, s, s') to (b, c); without a head, to (b, f)."""
        x = silu(self._bn(self._fc(self._trunk(images))))  # b f y x
        x = self.drop(x.mean((2, 3)))  # b f
        return x if self.head is None else self.head(x)

    def attention(self, images: Tensor) -> list[Tensor]:
        """The softmax's weights of every block, in order, each (b, h, n, m) with its stage's h, n and m.

        Places are counted row by row; key j stands for a square of places, `reductions` of its stage wide.
        """
        maps: list[Tensor] = []
        self._trunk(images, maps)
        return maps

    def _trunk(self, images: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(b, 3, s, s') to (b, d, s/32, s'/32)."""
        height, width = images.shape[2:]
        self.config.check_size(height, width)
        x = self.stem_norm1(gelu(self.stem_conv1(images)))
        x = self.stem_norm2(gelu(self.stem_conv2(x)))
        x = self.stem_norm3(gelu(self.stem_conv3(x)))
        native = self.config.image_size
        for letter, stage in zip("abcd", self.config.stages, strict=True):
            x = getattr(self, f"patch_embed_{letter}")(x)  # b d y x
            table: Tensor = getattr(self, f"relative_pos_{letter}")
            built = (native // stage.stride, native // stage.stride)
            bias = resized_bias(table, built, (height // stage.stride, width // stage.stride), stage.reduction)
            for block in getattr(self, f"blocks_{letter}"):
                x = block(x, bias, maps)
        return x


def resized_bias(table: Tensor, grid: Grid, wanted: Grid, reduction: int) -> Tensor:
    """A stage's table of biases (h, n, m) for a map of y by x places, as one (h, n', m') for a map of another size.

    Bicubic interpolation, as the paper has it, over the places that ask and then over those that are asked.
    """
    if grid == wanted:
        return table
    asked, wanted_asked = ((rows // reduction, columns // reduction) for rows, columns in (grid, wanted))
    table = interpolate(table.mT.unflatten(2, grid), wanted, mode="bicubic").flatten(2)  # h m n'
    return interpolate(table.mT.unflatten(2, asked), wanted_asked, mode="bicubic").flatten(2)  # h n' m'


@torch.no_grad()
def initialise(model: ConvolutionalTransformer, generator: torch.Generator, *, head_bias: float = 0.0) -> None:
    """The initialisation of the authors' code, drawn from `generator`; running statistics begin anew.

    Normals of 0.02 for linear layers, He et al.'s by fan-out for convolutions (a depthwise one counts the outputs of
    all groups), standard normals for the tables of biases, zeros for all other biases; `head_bias` for the head's.
    """
    for module in model.modules():
        match module:
            case nn.Linear():
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
            case nn.Conv2d():
                nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            case nn.BatchNorm2d() | nn.LayerNorm():
                module.reset_parameters()
    for letter in "abcd":
        nn.init.normal_(getattr(model, f"relative_pos_{letter}"), generator=generator)
    if model.head is not None:
        nn.init.constant_(model.head.bias, head_bias)


def _rising(rate: float, count: int) -> list[float]:
    """As many numbers from 0 to `rate`, evenly spaced."""
    return [rate * number / max(1, count - 1) for number in range(count)]


def _tokens(x: Tensor) -> Tensor:
    """(b, d, y, x) to (b, n, d), row by row."""
    return x.flatten(2).transpose(1, 2)


def _map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(b, n, d) to (b, d, y, x)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))
