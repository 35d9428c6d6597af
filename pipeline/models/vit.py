"""The vision transformer of Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), section 3.1, and DeiT of
Touvron et al. (ICML 2021), which differs from it in its initialisation and in a second token with a head of its own.

Wiring and initialisation are those of the papers' code. Parameters bear the names that timm gives them, since those
are what the world exchanges.

Legend: b batch, n patches, e tokens before the patches, t tokens (e + n), d width, h heads, w width of a head,
c classes, y x rows and columns of the grid, p q rows and columns of pixels.
"""

import math
import warnings
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

from pipeline.architectures.vit import Vit
from pipeline.models.depth import StochasticDepth
from pipeline.models.features import Features

Grid = tuple[int, int]


class TwoLogits(NamedTuple):
    """What the two heads of a model with a distillation token say in training, (b, c) each."""

    labels: Tensor
    """Of the head on the class token, which learns from the labels."""
    teacher: Tensor
    """Of the head on the distillation token, which learns from the teacher."""


class PatchEmbed(nn.Module):
    """Each patch of the picture, or of the map that a hybrid's trunk makes of it, as a vector."""

    def __init__(self, config: Vit, channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, config.width, config.patch, config.patch)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, p, q) to (b, n, d), row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention (appendix A)."""

    def __init__(self, config: Vit) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) to (b, t, d)."""
        x = scaled_dot_product_attention(*self._split(x))  # b h t w
        return self.proj(x.transpose(1, 2).flatten(2))  # b t d

    def weights(self, x: Tensor) -> Tensor:
        """(b, t, d) to (b, h, t, t): how much of each token (last axis) goes into each."""
        q, k, _ = self._split(x)
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # b h t w, three times
        return q, k, v


class Mlp(nn.Module):
    """Two layers with a GELU between; dropout after both."""

    def __init__(self, config: Vit) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) to (b, t, d)."""
        return self.drop(self.fc2(self.drop(gelu(self.fc1(x), approximate=self.approximate))))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a shortcut (equations 2 and 3)."""

    def __init__(self, config: Vit, stochastic_depth: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.epsilon)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.epsilon)
        self.mlp = Mlp(config)
        self.drop = nn.Dropout(config.dropout)
        self.skip = StochasticDepth(stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) to (b, t, d)."""
        x = x + self.skip(self.drop(self.attn(self.norm1(x))))
        return x + self.skip(self.mlp(self.norm2(x)))


class AttentionPool(nn.Module):
    """What one learned query attends to, and an MLP on it (Zhai et al., "Scaling Vision Transformers", 2022)."""

    def __init__(self, config: Vit) -> None:
        super().__init__()
        self.heads = config.heads
        self.latent = nn.Parameter(torch.zeros(1, 1, config.width))
        self.q = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.kv = nn.Linear(config.width, 2 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.epsilon)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) to (b, d)."""
        q = self.q(self.latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # 1 h 1 w
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # b h n w, twice
        x = scaled_dot_product_attention(q.expand(len(x), -1, -1, -1), k, v)  # b h 1 w
        x = self.proj(x.transpose(1, 2).flatten(1))  # b d
        return x + self.mlp(self.norm(x))


class VisionTransformer(nn.Module):
    """Pictures of any size to logits; `classes` may be 0 for none.

    What `config.pooling` says is read off after the last LayerNorm. With `config.representation` a tanh layer stands
    before the head (`pre_logits`), as in pretraining. Pixels beyond the last whole patch of a row or column are left
    out, as in the paper's code; a warning says so once for each size. `patch_embed` takes the place of the patches'
    linear layer; a hybrid's has its trunk in it.
    """

    def __init__(self, config: Vit, classes: int, patch_embed: PatchEmbed | None = None) -> None:
        super().__init__()
        config.check()
        self.config = config
        width, depth = config.width, config.depth
        self.cls_token = _token(1, width) if config.pooling == "token" else None
        self.dist_token = _token(1, width) if config.distillation else None
        self.reg_token = _token(config.registers, width) if config.registers else None
        positions = config.grid**2 + (config.prefix if config.prefix_positions else 0)
        self.pos_embed = _token(positions, width) if config.positions == "learned" else None
        self.patch_embed = patch_embed or PatchEmbed(config)
        self.pos_drop = nn.Dropout(config.dropout)
        rates = (config.stochastic_depth * i / max(1, depth - 1) for i in range(depth))
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=config.epsilon)
        self.attn_pool = AttentionPool(config) if config.pooling == "map" else None
        self.pre_logits = nn.Linear(width, width) if config.representation else None
        self.head = nn.Linear(width, classes) if classes else None
        self.head_dist = nn.Linear(width, classes) if classes and config.distillation else None

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """(b, 3, p, q) to what the first block sees, (b, t, d), and the grid; ValueError where no patch fits."""
        height, width = images.shape[-2:]
        grid = self.config.grid_of(height, width)
        left_out = self.config.left_out(height), self.config.left_out(width)
        if any(left_out) and not torch.compiler.is_compiling():
            _warn_of_pixels(height, width, *left_out)
        x = self.patch_embed(images)  # b n d
        prefix = [
            tokens.expand(len(x), -1, -1)  # b 1 d, registers b r d
            for tokens in (self.cls_token, self.dist_token, self.reg_token)
            if tokens is not None
        ]
        if self.config.prefix_positions and self.pos_embed is not None:
            x = torch.cat([*prefix, x], dim=1) + self.position_table(grid)
        else:
            x = torch.cat([*prefix, x + self.position_table(grid)], dim=1)
        return self.pos_drop(x), grid  # b t d

    def position_table(self, grid: Grid) -> Tensor:
        """What is added to the tokens of such a grid: (1, t, d), or (1, n, d) where only patches have positions."""
        if self.pos_embed is None:
            weight = self.patch_embed.proj.weight
            return sines_and_cosines(grid, self.config.width, weight.device).to(weight.dtype)
        side = self.config.grid
        return resized_positions(self.pos_embed, (side, side), grid, self.config.interpolation)

    def forward_features(self, images: Tensor) -> Features:
        """(b, 3, p, q) to the tokens after the last LayerNorm."""
        x, grid = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return Features(self.norm(x), grid, self.config.prefix)

    def logits(self, features: Features) -> Tensor | TwoLogits:
        """What `forward` makes of these features."""
        x = self._pooled(features)
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        labels = x if self.head is None else self.head(x)
        if not self.config.distillation:
            return labels
        y = features.tokens[:, 1]
        teacher = y if self.head_dist is None else self.head_dist(y)
        return TwoLogits(labels, teacher) if self.training else (labels + teacher) / 2

    def forward(self, images: Tensor) -> Tensor | TwoLogits:
        """(b, 3, p, q) to (b, c); without a head, to (b, d).

        A model with a distillation token answers in training by both its heads, in evaluation by their mean.
        """
        return self.logits(self.forward_features(images))

    def attention(self, images: Tensor) -> list[Tensor]:
        """The weights (b, h, t, t) of each block's attention; the blocks before it drop out in training as ever."""
        x, _ = self.embed(images)
        maps: list[Tensor] = []
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(block.attn.weights(block.norm1(x)))
            x = block(x)
        return maps

    def undecayed(self) -> set[str]:
        """Names of the parameters that weight decay should spare: biases, norms, tokens, positions, learned query."""
        spared = {"cls_token", "dist_token", "reg_token", "pos_embed", "attn_pool.latent"}
        return {name for name, parameter in self.named_parameters() if parameter.ndim == 1 or name in spared}

    def _pooled(self, features: Features) -> Tensor:
        if self.attn_pool is not None:
            return self.attn_pool(features.patches)
        return features.tokens[:, 0] if self.config.pooling == "token" else features.patches.mean(1)  # b d


def resized_positions(
    table: Tensor, was: Grid, grid: Grid, interpolation: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    """The positions (1, e + y x, d) learned on the grid `was`, for another; the first e belong to no patch and stay.

    "bilinear" leaves the corners where they are, as in the paper's code (section 3.2); "bicubic" is as in timm, with
    pixels as squares and antialiased. ValueError where the table has fewer rows than `was` has places.
    """
    prefix = table.shape[1] - was[0] * was[1]
    if prefix < 0:
        raise ValueError(f"a table of {table.shape[1]} positions does not fill a grid of {was[0]} x {was[1]}")
    if was == grid:
        return table
    places = table[:, prefix:].unflatten(1, was).permute(0, 3, 1, 2)  # 1 d y x
    places = places.to(torch.promote_types(table.dtype, torch.float32))
    if interpolation == "bilinear":
        places = interpolate(places, grid, mode="bilinear", align_corners=True)
    else:
        places = interpolate(places, grid, mode="bicubic", antialias=True)
    places = places.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :prefix], places], dim=1)


def sines_and_cosines(grid: Grid, width: int, device: torch.device | None = None) -> Tensor:
    """(1, y x, d): sine and cosine of column, then of row, in d/4 frequencies from 1 down to 1/10,000.

    As in MoCo v3 (Chen et al. 2021) and the code of Beyer et al., "Better plain ViT baselines" (2022).
    """
    frequencies = 10_000 ** -torch.linspace(0, 1, width // 4, dtype=torch.float64, device=device)
    rows, columns = (torch.arange(side, dtype=torch.float64, device=device) for side in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")  # y x
    y, x = (places.flatten()[:, None] * frequencies for places in (y, x))  # n d/4
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]


@torch.no_grad()
def initialise(model: VisionTransformer, generator: torch.Generator, *, head_bias: float = 0.0) -> None:
    """The initialisation that `config.initialisation` names, drawn from `generator`; every parameter is set.

    "paper": Xavier-uniform for attention and MLP, a normal of 1e-6 for the MLP's biases, 0.02 for positions, a
    truncated normal of variance 1/fan-in for patches and `pre_logits`, zeros for the class token and for the head.
    "deit": a truncated normal of 0.02 for all matrices, tokens and positions, also for the head, zeros for biases, and
    torch's own uniform for the patches. In both the head's bias is `head_bias` (-10 for the sigmoid objective on
    ImageNet-21k), registers are a normal of 1e-6 (Darcet et al. 2024), the distillation token is DeiT's, and attention
    pooling is as in the code of Zhai et al. 2022.
    """
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    (_as_in_the_paper if model.config.initialisation == "paper" else _as_deit)(model, generator)
    if model.dist_token is not None:
        nn.init.trunc_normal_(model.dist_token, std=0.02, generator=generator)
    if model.reg_token is not None:
        nn.init.normal_(model.reg_token, std=1e-6, generator=generator)
    if model.attn_pool is not None:
        nn.init.xavier_uniform_(model.attn_pool.latent[0], generator=generator)
        for layer in (model.attn_pool.q, model.attn_pool.kv, model.attn_pool.proj):
            _square_xavier(layer, generator)
        _xavier(model.attn_pool.mlp, generator)
    for head in (model.head, model.head_dist):
        if head is not None:
            nn.init.constant_(head.bias, head_bias)


def lecun(layer: nn.Conv2d | nn.Linear, generator: torch.Generator) -> None:
    """A truncated normal of variance 1/fan-in, without bias: what flax draws where nothing else is asked for."""
    # A normal cut off at two deviations has 0.8796 of the deviation it was drawn with.
    std = 1 / 0.87962566 / math.sqrt(layer.weight[0].numel())
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _as_in_the_paper(model: VisionTransformer, generator: torch.Generator) -> None:
    lecun(model.patch_embed.proj, generator)
    if model.cls_token is not None:
        nn.init.zeros_(model.cls_token)
    if model.pos_embed is not None:
        nn.init.normal_(model.pos_embed, std=0.02, generator=generator)
    for block in model.blocks:
        assert isinstance(block, Block)
        _square_xavier(block.attn.qkv, generator)
        _square_xavier(block.attn.proj, generator)
        _xavier(block.mlp, generator)
    if model.pre_logits is not None:
        lecun(model.pre_logits, generator)
    for head in (model.head, model.head_dist):
        if head is not None:
            nn.init.zeros_(head.weight)


def _as_deit(model: VisionTransformer, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(model.patch_embed.proj.weight[0].numel())
    for parameter in model.patch_embed.proj.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    for table in (model.cls_token, model.pos_embed):
        if table is not None:
            nn.init.trunc_normal_(table, std=0.02, generator=generator)
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _square_xavier(layer: nn.Linear, generator: torch.Generator) -> None:
    # Query, key and value are one matrix here and three in the papers: the bound is that of one of them.
    bound = math.sqrt(3 / layer.in_features)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _xavier(mlp: Mlp, generator: torch.Generator) -> None:
    for layer in (mlp.fc1, mlp.fc2):
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.normal_(layer.bias, std=1e-6, generator=generator)


def _token(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, count, width))


@lru_cache(maxsize=1024)
def _warn_of_pixels(height: int, width: int, rows: int, columns: int) -> None:
    """Once for each size: the cache remembers which ones were warned of."""
    warnings.warn(
        f"pictures of {height} x {width} pixels do not divide into patches: "
        f"the last {rows} rows and {columns} columns of pixels are left out",
        stacklevel=2,
    )
