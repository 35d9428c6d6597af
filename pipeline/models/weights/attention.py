"""Query, key and value: apart in most of the world's layouts, one matrix in ours and timm's.

Apart they are `<module>.query.weight` and so on here, together `<module>.qkv.weight`, and `q` with `kv` where one
learned query pools.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

PARTS = ("query", "key", "value")
_TOGETHER = {"qkv": PARTS, "q": PARTS[:1], "kv": PARTS[1:]}
_POOLING = "attn_pool"


def joined(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with what is apart together; ValueError names an attention that lacks a part."""
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        module, part, leaf = _split(name)
        if part not in PARTS:
            made[name] = weight
            continue
        for together in ("q", "kv") if module.endswith(_POOLING) else ("qkv",):
            names = [f"{module}.{one}.{leaf}" for one in _TOGETHER[together]]
            if lacking := [one for one in names if one not in weights]:
                raise ValueError(f"the file has {name} but lacks {', '.join(lacking)}")
            if names[0] == name:
                made[f"{module}.{together}.{leaf}"] = torch.cat([weights[one] for one in names])
    return made


def parted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `joined` joined, apart again."""
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        module, together, leaf = _split(name)
        parts = _TOGETHER.get(together, ()) if module.rpartition(".")[2] in ("attn", _POOLING) else ()
        if not parts:
            made[name] = weight
        for part, one in zip(parts, weight.chunk(len(parts)) if parts else (), strict=True):
            made[f"{module}.{part}.{leaf}"] = one
    return made


def _split(name: str) -> tuple[str, str, str]:
    """`blocks.0.attn`, `qkv` and `weight` of `blocks.0.attn.qkv.weight`."""
    module, _, leaf = name.rpartition(".")
    parent, _, part = module.rpartition(".")
    return parent, part, leaf
