"""The arrays that vision_transformer, AugReg and big_vision publish: into our names, and out again.

Kernels of convolutions are (height, width, in, out) there and (out, in, height, width) here; dense ones (in, out) and
(out, in). Query, key and value have a kernel each, (d, h, e), and the way out has one of (h, e, d).

Legend: d width, h heads, e width of a head, k kernel's side.
"""

import io
import re
from collections.abc import Iterable, Mapping
from itertools import count

import numpy as np
from torch import Tensor

from pipeline.architectures.vit import Vit
from pipeline.models.weights.attention import PARTS, joined, parted

_KERNEL = "embedding/kernel"
_PREFIXES = ("", "params/", "params/img/", "opt/target/", "opt/target/img/")
_POSITIONS = "Transformer/posembed_input/pos_embedding"
_DEEP = re.compile(r"Transformer/encoderblock(?:_(\d+))?/(.+)")
# The layers of a block by the numbers of the first Flax; linen counts each kind for itself.
_FIRST = (
    (re.compile(r"MultiHeadDotProductAttention_\d+/"), "MultiHeadDotProductAttention_1/"),
    (re.compile(r"MlpBlock_\d+/"), "MlpBlock_3/"),
    (re.compile(r"LayerNorm_[12]/"), "LayerNorm_2/"),
)
_LINEN = {
    _POSITIONS: "pos_embedding",
    "Attention_1/": "Attention_0/",
    "LayerNorm_2/": "LayerNorm_1/",
    "MlpBlock_3/": "MlpBlock_0/",
}
_BLOCK = {
    "norm1": "LayerNorm_0",
    "attn": "MultiHeadDotProductAttention_1",
    "attn.proj": "MultiHeadDotProductAttention_1/out",
    **{f"attn.{part}": f"MultiHeadDotProductAttention_1/{part}" for part in PARTS},
    "norm2": "LayerNorm_2",
    "mlp.fc1": "MlpBlock_3/Dense_0",
    "mlp.fc2": "MlpBlock_3/Dense_1",
}
_POOL = {
    "attn_pool.proj": "MAPHead_0/MultiHeadDotProductAttention_0/out",
    **{f"attn_pool.{part}": f"MAPHead_0/MultiHeadDotProductAttention_0/{part}" for part in PARTS},
    "attn_pool.norm": "MAPHead_0/LayerNorm_0",
    "attn_pool.mlp.fc1": "MAPHead_0/MlpBlock_0/Dense_0",
    "attn_pool.mlp.fc2": "MAPHead_0/MlpBlock_0/Dense_1",
}
_ONCE = {
    "patch_embed.proj": "embedding",
    "norm": "Transformer/encoder_norm",
    "pre_logits": "pre_logits",
    "head": "head",
}
# What is no layer's kernel, scale or bias: taken as it is.
_WHOLE = {"cls_token": "cls", "pos_embed": _POSITIONS, "attn_pool.latent": "MAPHead_0/probe"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def is_vit(names: Iterable[str]) -> bool:
    """Whether arrays of these names are a vision transformer's, in any of the layouts."""
    there = set(names)
    return any(prefix + _KERNEL in there for prefix in _PREFIXES)


def read(arrays: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int, tuple[str, ...]]:
    """A vision transformer or hybrid under our names, its heads, and the names of arrays that are none of it.

    Every public layout is taken: under `params/`, `params/img/` or `opt/target/`; layers numbered as in the first Flax
    or as in linen; blocks one by one or stacked along a first axis; positions in the encoder or on top; MAP heads; the
    norms of hybrids as vectors or as (1, 1, 1, c).
    """
    prefix = next(prefix for prefix in _PREFIXES if prefix + _KERNEL in arrays)
    left = [name for name in arrays if not name.startswith(prefix)]
    first = _numbered_first({name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)})
    units = _units(first, "block{}/unit{}/conv1/kernel", 1)
    ours = {
        theirs: ours for ours, theirs in _layers(_blocks(first), units, "block1/unit1/conv1/kernel" in first).items()
    }
    whole = {theirs: ours for ours, theirs in _WHOLE.items()}
    weights: dict[str, Tensor] = {}
    for name, array in first.items():
        layer, _, leaf = name.rpartition("/")
        if name in whole:
            weights[whole[name]] = array
        elif layer in ours and leaf in _LEAVES:
            weights[f"{ours[layer]}.{_LEAVES[leaf]}"] = _ours(ours[layer], array)
        else:
            left.append(prefix + name)
    heads = next((array.shape[1] for name, array in first.items() if name.endswith("/query/kernel")), 0)
    return joined(weights), heads, tuple(left)


def write(weights: Mapping[str, Tensor], config: Vit) -> dict[str, np.ndarray]:
    """A vision transformer or hybrid in fp32, under vision_transformer's names; ValueError names what has no place.

    Where the class token has no position of its own, or there is none, the names are big_vision's, whose code alone
    computes that: under `params/`, in linen's numbers, with positions on top.
    """
    units = _units(weights, "patch_embed.backbone.stages.{}.blocks.{}.conv1.weight", 0)
    depth = next(i for i in count() if f"blocks.{i}.norm1.weight" not in weights)
    theirs = _layers(depth, units, "patch_embed.backbone.conv.weight" not in weights)
    arrays: dict[str, np.ndarray] = {}
    strange: list[str] = []
    for name, weight in parted(weights).items():
        layer, _, leaf = name.rpartition(".")
        if name in _WHOLE:
            arrays[_WHOLE[name]] = plain(weight)
        elif layer in theirs:
            kind = "bias" if leaf == "bias" else "scale" if weight.ndim == 1 else "kernel"
            arrays[f"{theirs[layer]}/{kind}"] = plain(_theirs(layer, weight, config.heads))
        else:
            strange.append(name)
    if strange:
        raise ValueError(f"vision_transformer's .npz has no place for {', '.join(strange)}")
    classic = config.pooling == "token" and config.prefix_positions and config.positions == "learned"
    return arrays if classic else {f"params/{_linen(name)}": array for name, array in arrays.items()}


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The arrays as an `.npz`."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def plain(weight: Tensor) -> np.ndarray:
    """A tensor as an array in fp32."""
    return np.ascontiguousarray(weight.detach().cpu().float().numpy())


def _numbered_first(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One array a block, by the numbers of the first Flax, and positions where they were then."""
    made: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if deep := _DEEP.fullmatch(name):
            number, inside = deep.groups()
            for pattern, classic in _FIRST:
                inside = pattern.sub(classic, inside)
            layers = {number: array} if number else dict(enumerate(array))
            made |= {f"Transformer/encoderblock_{i}/{inside}": layer for i, layer in layers.items()}
        else:
            made[_POSITIONS if name == "pos_embedding" else name] = array
    return made


def _linen(name: str) -> str:
    """The name of an array in big_vision."""
    for first, linen in _LINEN.items():
        name = name.replace(first, linen)
    return name


def _layers(depth: int, units: list[int], staged: bool) -> dict[str, str]:
    """Their name of each of our layers; of hybrids whether the trunk has more than a root."""
    made = {**_ONCE, **_POOL}
    for i in range(depth):
        made |= {f"blocks.{i}.{ours}": f"Transformer/encoderblock_{i}/{theirs}" for ours, theirs in _BLOCK.items()}
    root = "patch_embed.backbone.stem" if staged else "patch_embed.backbone"
    made |= {f"{root}.conv": "conv_root", f"{root}.norm": "gn_root"}
    for i, many in enumerate(units):
        for j in range(many):
            ours, theirs = f"patch_embed.backbone.stages.{i}.blocks.{j}", f"block{i + 1}/unit{j + 1}"
            made |= {f"{ours}.{kind}{r}": f"{theirs}/{short}{r}" for kind, short in _TRUNK.items() for r in (1, 2, 3)}
            made |= {f"{ours}.downsample.{kind}": f"{theirs}/{short}_proj" for kind, short in _TRUNK.items()}
    return made


_TRUNK = {"conv": "conv", "norm": "gn"}


def _blocks(first: Mapping[str, Tensor]) -> int:
    return next(i for i in count() if f"Transformer/encoderblock_{i}/LayerNorm_0/scale" not in first)


def _units(names: Mapping[str, Tensor], form: str, start: int) -> list[int]:
    """Units of each stage of the trunk."""
    stages = next(i for i in count() if form.format(start + i, start) not in names)
    return [next(j for j in count() if form.format(start + i, start + j) not in names) for i in range(stages)]


def _part(layer: str) -> str:
    """`query`, `key`, `value` or `proj` of an attention; empty for other layers."""
    module, _, part = layer.rpartition(".")
    within = module.rpartition(".")[2] in ("attn", "attn_pool")
    return part if within and part in (*PARTS, "proj") else ""


def _ours(layer: str, array: Tensor) -> Tensor:
    part = _part(layer)
    if part == "proj" and array.ndim == 3:  # h e d
        array = array.flatten(0, 1)
    elif part in PARTS:  # d h e, or h e of a bias
        array = array.flatten(array.ndim - 2)
    match array.ndim:
        case 4 if array.shape[:3] == (1, 1, 1) and "norm" in layer.rpartition(".")[2]:
            return array.flatten()
        case 4:
            return array.permute(3, 2, 0, 1).contiguous()  # from k k in out
        case 2:
            return array.T.contiguous()
        case _:
            return array


def _theirs(layer: str, weight: Tensor, heads: int) -> Tensor:
    part = _part(layer)
    turned = weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.T if weight.ndim == 2 else weight
    if part == "proj" and weight.ndim == 2:
        return turned.unflatten(0, (heads, -1))  # h e d
    return turned.unflatten(-1, (heads, -1)) if part in PARTS else turned
