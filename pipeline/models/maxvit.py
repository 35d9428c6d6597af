"""MaxViT, the multi-axis vision transformer of Tu et al. (ECCV 2022), section 3.

Wiring and initialisation are those of the authors' code (google-research/maxvit at 70a4707, `maxvit/models/maxvit.py`).
Parameters bear the names that timm gives them. Pictures are kept channels last in memory from the stem on, so that a
convolution's output is read as tokens, and tokens as a convolution's input, without being copied.

Legend: b batch, c channels, y x rows and columns of a map, d width, w side of a window, n windows (or grids) of a
picture, t tokens of one (w w), h heads, e width of a head, k classes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, gelu, interpolate, pad, scaled_dot_product_attention, silu

from pipeline.architectures.maxvit import EXPANSION, HEAD_WIDTH, SQUEEZE, Maxvit
from pipeline.models.depth import StochasticDepth
from pipeline.models.features import Features

_activation = partial(gelu, approximate="tanh")
_BatchNorm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)  # TensorFlow's momentum of 0.99 is what is kept
_LayerNorm = partial(nn.LayerNorm, eps=1e-5)
_TABLE = "relative_position_bias_table"


# --- partitions -----------------------------------------------------------------------------------------------------


def windows(x: Tensor, side: int) -> Tensor:
    """(b, y, x, ...) to (b, n, t, ...): tokens that are neighbours, `side` by `side` (section 3.2, block attention)."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # b y/w w x/w w ...
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(b, n, t, ...) to (b, y, x, ...), where `windows` took the tokens from."""
    side = isqrt(x.shape[2])
    x = x.unflatten(2, (side, side)).unflatten(1, (size[0] // side, size[1] // side))  # b y/w x/w w w ...
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def grids(x: Tensor, side: int) -> Tensor:
    """(b, y, x, ...) to (b, n, t, ...): tokens spread evenly over the map, `side` by `side` (section 3.2)."""
    x = x.unflatten(2, (side, -1)).unflatten(1, (side, -1))  # b w y/w w x/w ...
    return x.transpose(1, 2).movedim(4, 2).flatten(3, 4).flatten(1, 2)


def from_grids(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(b, n, t, ...) to (b, y, x, ...), where `grids` took the tokens from."""
    side = isqrt(x.shape[2])
    x = x.unflatten(2, (side, side)).unflatten(1, (size[0] // side, size[1] // side))  # b y/w x/w w w ...
    return x.movedim(2, 4).transpose(1, 2).flatten(3, 4).flatten(1, 2)


# --- layers ---------------------------------------------------------------------------------------------------------


def _halve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of 3 x 3 and stride 2 padded as TensorFlow does for even sides: to the right and below alone."""
    return convolution(pad(x, (0, 1, 0, 1)))


class Stem(nn.Module):
    """Two convolutions of 3 x 3, the first of which halves the sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2)
        self.norm1 = _BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, y, x) to (b, d, y/2, x/2), channels last in memory."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.conv2(_activation(self.norm1(_halve(self.conv1, images))))


class SqueezeExcite(nn.Module):
    """Each channel times a share that all channels' means decide (Hu et al. 2018)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, inner, 1)
        self.fc2 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, y, x) to (b, c, y, x)."""
        return x * torch.sigmoid(self.fc2(silu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Shortcut(nn.Module):
    """What goes past an MBConv that halves the sides: means of 2 x 2, brought to another width where it changes."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(before, width, 1) if before != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, y, x) to (b, d, y/2, x/2)."""
        return self.expand(avg_pool2d(x, 2))


class MbConv(nn.Module):
    """An inverted bottleneck with squeeze-and-excitation, behind a batch norm (section 3.3 and appendix A)."""

    def __init__(self, before: int, width: int, *, halve: bool, rate: float) -> None:
        super().__init__()
        inner = EXPANSION * width
        self.halve = halve
        self.shortcut = Shortcut(before, width) if halve else nn.Identity()
        self.pre_norm = _BatchNorm(before)
        self.conv1_1x1 = nn.Conv2d(before, inner, 1, bias=False)
        self.norm1 = _BatchNorm(inner)
        stride, padding = (2, 0) if halve else (1, 1)
        self.conv2_kxk = nn.Conv2d(inner, inner, 3, stride, padding, groups=inner, bias=False)
        self.norm2 = _BatchNorm(inner)
        self.se = SqueezeExcite(inner, width // SQUEEZE)
        self.conv3_1x1 = nn.Conv2d(inner, width, 1)
        self.skip = StochasticDepth(rate)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, y, x) to (b, d, y, x), or to half the sides."""
        inside = _activation(self.norm1(self.conv1_1x1(self.pre_norm(x))))
        inside = _halve(self.conv2_kxk, inside) if self.halve else self.conv2_kxk(inside)
        inside = self.conv3_1x1(self.se(_activation(self.norm2(inside))))
        return self.shortcut(x) + self.skip(inside)


def resize_bias(table: Tensor, window: int) -> Tensor:
    """A table of relative biases (h, 2v-1, 2v-1) for windows of another side: (h, 2w-1, 2w-1).

    Bilinear between the centres of its cells, as the authors' code does for larger pictures (`tf.image.resize`).
    """
    side = 2 * window - 1
    if table.shape[-1] == side:
        return table
    return interpolate(table[None], (side, side), mode="bilinear", align_corners=False)[0]


class RelativeBias(nn.Module):
    """What is added to a query's product with a key, by head and by where the key stands from the query."""

    def __init__(self, config: Maxvit, heads: int) -> None:
        super().__init__()
        self.window = config.window
        self.relative_position_bias_table = nn.Parameter(torch.zeros(heads, config.table, config.table))

    def forward(self) -> Tensor:
        """(h, t, t): entry (i, j) is the table's at the offset of token j from token i."""
        table = resize_bias(self.relative_position_bias_table, self.window)
        # A window over the table that begins w-1-i rows down holds the rows that query i sees: as views and one copy,
        # in the forward pass, so that the table gets its gradient and no index has to be kept.
        seen = table.unfold(1, self.window, 1).unfold(2, self.window, 1)  # h, w w of queries from the end, w w of keys
        return seen.flip(1, 2).flatten(3, 4).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with a relative bias, among the tokens of each window or grid (section 3.1)."""

    def __init__(self, config: Maxvit, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.rel_pos = RelativeBias(config, width // HEAD_WIDTH)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, t, d) to (b, n, t, d)."""
        q, k, v = self._heads(x)
        x = scaled_dot_product_attention(q, k, v, attn_mask=self.rel_pos()[None]).unflatten(0, x.shape[:2])  # b n h t e
        return self.proj(x.transpose(2, 3).flatten(3))

    def weights(self, x: Tensor) -> Tensor:
        """(b, n, t, d) to (b, n, h, t, t): how much each token takes of each; each row's sum is 1."""
        q, k, _ = self._heads(x)
        products = HEAD_WIDTH**-0.5 * q @ k.mT + self.rel_pos()
        return products.softmax(-1).unflatten(0, x.shape[:2])

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).flatten(0, 1).unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)  # each bn h t e
        return q, k, v


class Mlp(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, EXPANSION * width)
        self.fc2 = nn.Linear(EXPANSION * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        return self.fc2(_activation(self.fc1(x)))


class PartitionAttention(nn.Module):
    """Attention and MLP over partitioned tokens, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, config: Maxvit, width: int, rate: float) -> None:
        super().__init__()
        self.norm1 = _LayerNorm(width)
        self.attn = Attention(config, width)
        self.norm2 = _LayerNorm(width)
        self.mlp = Mlp(width)
        self.skip = StochasticDepth(rate)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, t, d) to (b, n, t, d)."""
        x = x + self.skip(self.attn(self.norm1(x)))
        return x + self.skip(self.mlp(self.norm2(x)))


class Block(nn.Module):
    """MBConv, attention within windows, attention within grids (figure 2)."""

    def __init__(self, config: Maxvit, before: int, width: int, *, halve: bool, rate: float) -> None:
        super().__init__()
        self.window = config.window
        self.conv = MbConv(before, width, halve=halve, rate=rate)
        self.attn_block = PartitionAttention(config, width, rate)
        self.attn_grid = PartitionAttention(config, width, rate)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, y, x) to (b, d, y, x), or to half the sides."""
        x = self.conv(x).permute(0, 2, 3, 1)  # b y x d
        size = (x.shape[1], x.shape[2])
        x = from_windows(self.attn_block(windows(x, self.window)), size)
        x = from_grids(self.attn_grid(grids(x, self.window)), size)
        return x.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks of one width; the first of them halves the sides."""

    def __init__(self, config: Maxvit, before: int, width: int, rates: list[float]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                Block(config, width if number else before, width, halve=not number, rate=rate)
                for number, rate in enumerate(rates)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, y, x) to (b, d, y/2, x/2)."""
        return self.blocks(x)


class Head(nn.Module):
    """From the last map's mean to logits, over a tanh layer; without classes, to what that layer gives."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = _LayerNorm(width)
        self.pre_logits = nn.ModuleDict({"fc": nn.Linear(width, width)})
        self.fc = nn.Linear(width, classes) if classes else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, d) to (b, k), or to (b, d)."""
        x = torch.tanh(self.pre_logits["fc"](self.norm(x)))
        return x if self.fc is None else self.fc(x)


# --- model ----------------------------------------------------------------------------------------------------------


class MultiAxisVisionTransformer(nn.Module):
    """Pictures to logits; `classes` may be 0 for none.

    Takes pictures of any height and width that are multiples of `config.unit`, and raises ValueError, with the nearest
    sizes that would do, for others.
    """

    def __init__(self, config: Maxvit, classes: int) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.stem = Stem(config.stem)
        count, done = sum(config.depths), 0
        self.stages = nn.Sequential()
        for before, width, depth in zip((config.stem, *config.widths), config.widths, config.depths, strict=False):
            rates = [config.stochastic_depth * number / count for number in range(done, done + depth)]
            self.stages.append(Stage(config, before, width, rates))
            done += depth
        self.head = Head(config.widths[-1], classes)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in order."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def forward_features(self, images: Tensor) -> Features:
        """The last block's output for (b, 3, y, x); the LayerNorm comes after the mean over it, in the head."""
        x = self._map(images)
        return Features(x.flatten(2).mT, (x.shape[2], x.shape[3]), prefix=0)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, y, x) to (b, k); without classes, to (b, d)."""
        return self.head(self._map(images).mean((2, 3)))

    def _map(self, images: Tensor) -> Tensor:
        self.config.check_size(images.shape[2], images.shape[3])
        return self.stages(self.stem(images))  # b d y/32 x/32

    @torch.no_grad()
    def attention(self, images: Tensor) -> list[Tensor]:
        """The maps (b, n, h, t, t) of every block, two each: that within windows, then that within grids.

        Row by row the shares that a token takes of the tokens of its window or grid; `windows` and `grids`, called with
        the pixels' places instead of features, say where those are. The batch norms go by the model's mode.
        """
        maps: list[Tensor] = []

        def keep(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            assert isinstance(layer, Attention)
            maps.append(layer.weights(*inputs))

        layers = [module for module in self.modules() if isinstance(module, Attention)]
        hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
        try:
            self._map(images)
        finally:
            for hook in hooks:
                hook.remove()
        return maps

    def undecayed(self) -> set[str]:
        """Names of biases, of the norms' weights and of the tables of relative biases.

        Those are what the authors' code leaves out (`weight_decay_exclude` of `hp/vision_i1k.py`).
        """
        return {name for name, value in self.named_parameters() if value.ndim == 1 or name.endswith(_TABLE)}


def resized(state: Mapping[str, Tensor], config: Maxvit) -> dict[str, Tensor]:
    """A model's state with its tables of relative biases as large as `config` has them; all else is as it was."""
    window = config.bias_window or config.window
    return {name: resize_bias(value, window) if name.endswith(_TABLE) else value for name, value in state.items()}


@torch.no_grad()
def initialise(model: MultiAxisVisionTransformer, generator: torch.Generator, *, head_bias: float = 0.0) -> None:
    """The initialisation of the authors' code, drawn from `generator`.

    A normal of deviation 0.02 for every matrix, kernel and table of relative biases, the head's among them; zeros for
    biases, with `head_bias` for the head's (`cls_bias_init`); norms that change nothing.
    """
    draw: Callable[[Tensor], Tensor] = partial(nn.init.normal_, std=0.02, generator=generator)
    for module in model.modules():
        match module:
            case nn.Conv2d() | nn.Linear():
                draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            case RelativeBias():
                draw(module.relative_position_bias_table)
            case nn.BatchNorm2d() | nn.LayerNorm():
                module.reset_parameters()
    if model.head.fc is not None:
        nn.init.constant_(model.head.fc.bias, head_bias)
