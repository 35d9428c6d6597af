"""The vision transformer of Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), section 3.1.

Wiring and initialisation are those of the paper's code. Parameters bear the names that timm gives them, since those
are what the world exchanges.

Legend: b batch, n patches, t tokens (n + 1), d width, h heads, e width of a head, c classes, s side of a picture.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from pipeline.config import Vit

EPSILON = 1e-6


class PatchEmbed(nn.Module):
    """Each patch of the picture, as a vector."""

    def __init__(self, config: Vit) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, config.patch)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) to (b, n, d), row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention (appendix A)."""

    def __init__(self, config: Vit) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) to (b, t, d)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # b h t e, three times
        x = scaled_dot_product_attention(q, k, v)  # b h t e
        return self.proj(x.transpose(1, 2).flatten(2))  # b t d


class Mlp(nn.Module):
    """Two layers with a GELU between, in its tanh form as in the paper's code; dropout after both."""

    def __init__(self, config: Vit) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) to (b, t, d)."""
        return self.drop(self.fc2(self.drop(gelu(self.fc1(x), approximate="tanh"))))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a shortcut (equations 2 and 3)."""

    def __init__(self, config: Vit) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=EPSILON)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=EPSILON)
        self.mlp = Mlp(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) to (b, t, d)."""
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Pictures to logits; `classes` may be 0 for none.

    The class token is read off after the last LayerNorm. With `config.representation` a tanh layer stands before the
    head (`pre_logits`), as in pretraining.
    """

    def __init__(self, config: Vit, classes: int) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.width))
        self.pos_drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)
        self.pre_logits = nn.Linear(config.width, config.width) if config.representation else None
        self.head = nn.Linear(config.width, classes) if classes else None

    def tokens(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) to (b, t, d), after the last LayerNorm; the class token comes first."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        x = self.pos_drop(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) to (b, c); without a head, to (b, d)."""
        x = self.tokens(images)[:, 0]
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        return x if self.head is None else self.head(x)


@torch.no_grad()
def initialise(model: VisionTransformer, generator: torch.Generator, *, head_bias: float = 0.0) -> None:
    """The initialisation of the paper's code, drawn from `generator`.

    Xavier-uniform for attention and MLP, a normal of 1e-6 for the MLP's biases, 0.02 for positions, a truncated
    normal of variance 1/fan-in for patches and `pre_logits`, zeros for the head with `head_bias` as its bias (-10
    for the sigmoid objective on ImageNet-21k).
    """
    width = model.config.width
    _lecun(model.patch_embed.proj, generator)
    nn.init.normal_(model.pos_embed, std=0.02, generator=generator)
    for module in model.blocks:
        assert isinstance(module, Block)
        # Query, key and value are one matrix here and three in the paper: the bound is that of one of them.
        nn.init.uniform_(module.attn.qkv.weight, -math.sqrt(3 / width), math.sqrt(3 / width), generator=generator)
        nn.init.zeros_(module.attn.qkv.bias)
        nn.init.xavier_uniform_(module.attn.proj.weight, generator=generator)
        nn.init.zeros_(module.attn.proj.bias)
        for layer in (module.mlp.fc1, module.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.normal_(layer.bias, std=1e-6, generator=generator)
    if model.pre_logits is not None:
        _lecun(model.pre_logits, generator)
    if model.head is not None:
        nn.init.zeros_(model.head.weight)
        nn.init.constant_(model.head.bias, head_bias)


def _lecun(layer: nn.Conv2d | nn.Linear, generator: torch.Generator) -> None:
    fan_in = layer.weight[0].numel()
    # A normal cut off at two deviations has 0.8796 of the deviation it was drawn with.
    std = 1 / 0.87962566 / math.sqrt(fan_in)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
