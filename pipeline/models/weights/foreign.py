"""A foreign file of weights under our names, and the architecture that shows in it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from math import isqrt
from typing import Any, Literal

from torch import Tensor

from pipeline.architectures import Architecture, Bit, Cmt, Efficientnet, Hybrid, Maxvit, Vit, cmt, efficientnet
from pipeline.models.weights import bit, files, huggingface, npz, timm
from pipeline.models.weights.fit import is_square

Layout = Literal["vision_transformer", "BiT", "Hugging Face", "timm"]


@dataclass(frozen=True)
class Foreign:
    """What a file holds."""

    layout: Layout
    """Whose names it had; "timm" stands also for DeiT's, CMT's and our own."""
    weights: dict[str, Tensor]
    """Under our names."""
    left: tuple[str, ...]
    """Names in the file of what is none of the model."""
    heads: int = 0
    """Of a vision transformer, where the file or what is beside it tells."""
    gelu: Literal["tanh", "erf"] = "erf"
    """Of a vision transformer: as what is beside the file says, else as whoever has this layout computes."""
    described: Vit | None = None
    """By the `config.json` beside it, where there is one."""


def read(name: str, data: bytes, beside: Mapping[str, Any] | None = None) -> Foreign:
    """The weights in the file `name`; `beside` is the `config.json` in its folder, if there is one.

    ValueError says why a file cannot be read, or that its names are nobody's.
    """
    found = files.tensors(name, data)
    tensors, left = found
    if npz.is_vit(tensors):
        weights, heads, strange = npz.read(tensors)
        return Foreign("vision_transformer", weights, left + strange, heads, "tanh")
    if bit.is_bit(tensors):
        weights, strange = bit.read(tensors)
        return Foreign("BiT", weights, left + strange)
    if huggingface.is_vit(tensors):
        weights, strange = huggingface.read(tensors)
        described = huggingface.architecture(beside) if beside else None
        return Foreign("Hugging Face", weights, left + strange, described=described)
    settings = (beside or {}).get("model_args") or {}
    gelu = "tanh" if settings.get("act_layer") == "gelu_tanh" else "erf"
    return Foreign("timm", timm.read(tensors), left, settings.get("num_heads", 0), gelu)


def architecture(foreign: Foreign) -> Architecture:
    """The architecture that the names and shapes of the weights show; ValueError where they show none that we have.

    What does not show is as whoever publishes that layout computes: the tanh form of GELU in vision_transformer's,
    erf in timm's, and likewise the trunk of hybrids. Heads that the file does not tell are 64 wide, or as many as the
    paper's model of that width has.
    """
    weights = foreign.weights
    if foreign.layout == "Hugging Face" and not foreign.described:
        raise ValueError("Hugging Face's weights are told what they compute by a config.json, which is not beside them")
    if "patch_embed.proj.weight" in weights and "blocks.0.attn.qkv.weight" in weights:
        return _transformer(foreign)
    if "stem.conv.weight" in weights and "stages.0.blocks.0.conv1.weight" in weights:
        units = [_counted(weights, f"stages.{i}.blocks.{{}}.conv1.weight") for i in range(4)]
        return Bit((units[0], units[1], units[2], units[3]), len(weights["stem.conv.weight"]) // 64)
    if "relative_pos_a" in weights and "stem_conv1.weight" in weights:
        return _cmt(weights)
    if "stages.0.blocks.0.attn_block.attn.qkv.weight" in weights:
        return _maxvit(weights)
    if "conv_stem.weight" in weights and "classifier.weight" in weights:
        return _efficientnet(weights)
    some = ", ".join(list(weights)[:4])
    raise ValueError(f"the names in the file ({some}, ...) are of none of the layouts and models that there are")


_HEADS = {1280: 16, 1408: 16, 1664: 16}


def _transformer(foreign: Foreign) -> Vit:
    weights = foreign.weights
    kernel = weights["patch_embed.proj.weight"]
    width, patch = len(kernel), kernel.shape[-1]
    if (
        not (heads := foreign.heads or _HEADS.get(width, width // 64 if width % 64 == 0 else 0))
        and not foreign.described
    ):
        raise ValueError(f"the file does not tell how many heads a width of {width} has: name the model")
    root = any(name.startswith("patch_embed.backbone.") for name in weights)
    tokens = sum(weights[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in weights)
    table = weights.get("pos_embed")
    own = tokens if table is not None and is_square(table.shape[1] - tokens) else 0
    side = isqrt(table.shape[1] - own) if table is not None else 0
    shown: dict[str, Any] = {
        "width": width,
        "depth": _counted(weights, "blocks.{}.norm1.weight"),
        "hidden": len(weights["blocks.0.mlp.fc1.weight"]),
        "patch": patch,
        "representation": "pre_logits.weight" in weights,
        "pooling": "map" if "attn_pool.latent" in weights else "token" if "cls_token" in weights else "gap",
        "positions": "sincos2d" if table is None else "learned",
        "prefix_positions": own == tokens or table is None,
        "registers": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        "distillation": "dist_token" in weights,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
    }
    if foreign.described:
        return replace(foreign.described, **shown)
    ours = foreign.layout == "vision_transformer"
    shown |= {"heads": heads, "gelu": foreign.gelu}
    if not root:
        return Vit(**shown, image_size=side * patch or Vit.image_size)
    trunk = _trunk(weights)
    computed = {} if ours else {"standardisation": "variance", "trunk_epsilon": 1e-5}
    made = Hybrid(**shown, trunk=trunk, **computed)
    return replace(made, image_size=side * made.stride or Vit.image_size)


def _trunk(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    start = "patch_embed.backbone.stages"
    stages = _counted(weights, f"{start}.{{}}.blocks.0.conv1.weight")
    return tuple(_counted(weights, f"{start}.{i}.blocks.{{}}.conv1.weight") for i in range(stages))


def _cmt(weights: Mapping[str, Tensor]) -> Cmt:
    widths = tuple(len(weights[f"patch_embed_{letter}.proj.weight"]) for letter in "abcd")
    depths = tuple(_counted(weights, f"blocks_{letter}.{{}}.norm1.weight") for letter in "abcd")
    for preset in (cmt.cmt_ti, cmt.cmt_xs, cmt.cmt_s, cmt.cmt_b):
        if (preset.widths, preset.depths) == (widths, depths):
            return replace(preset, image_size=4 * isqrt(weights["relative_pos_a"].shape[1]))
    raise ValueError(f"widths {widths} and depths {depths} are of no CMT that was published: name the model")


def _maxvit(weights: Mapping[str, Tensor]) -> Maxvit:
    stages = _counted(weights, "stages.{}.blocks.0.attn_block.attn.qkv.weight")
    table = weights["stages.0.blocks.0.attn_block.attn.rel_pos.relative_position_bias_table"]
    window = (table.shape[-1] + 1) // 2
    form = "stages.{}.blocks.{}.attn_block.attn.proj.weight"
    made = Maxvit(
        stem=len(weights["stem.conv1.weight"]),
        widths=tuple(len(weights[form.format(i, 0)]) for i in range(stages)),
        depths=tuple(_counted(weights, form.format(i, "{}")) for i in range(stages)),
        window=window,
    )
    return replace(made, image_size=made.unit)


def _efficientnet(weights: Mapping[str, Tensor]) -> Efficientnet:
    head, stem = len(weights["bn2.weight"]), len(weights["conv_stem.weight"])
    blocks = tuple(_counted(weights, f"blocks.{i}.{{}}.bn1.weight") for i in range(7))
    for number in range(8):
        preset: Efficientnet = getattr(efficientnet, f"efficientnet_b{number}")
        if (preset.stem, preset.head, tuple(stage.blocks for stage in preset.stages)) == (stem, head, blocks):
            return preset
    raise ValueError(f"blocks {blocks} behind a stem of {stem} channels are of none of EfficientNet-B0 to B7")


def _counted(names: Mapping[str, Tensor], form: str) -> int:
    return next(i for i in count() if form.format(i) not in names)
