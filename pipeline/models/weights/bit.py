"""The arrays that big_transfer publishes of BiT's ResNets: into our names, and out again.

Kernels are (height, width, in, out) there and (out, in, height, width) here.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from pipeline.models.weights.npz import plain

_ONCE = {
    "resnet/root_block/standardized_conv2d/kernel": "stem.conv.weight",
    "resnet/group_norm/gamma": "norm.weight",
    "resnet/group_norm/beta": "norm.bias",
    "resnet/head/conv2d/kernel": "head.fc.weight",
    "resnet/head/conv2d/bias": "head.fc.bias",
}
_ONCE_BACK = {ours: theirs for theirs, ours in _ONCE.items()}
_LEAVES = {
    "proj/standardized_conv2d/kernel": "downsample.conv.weight",
    "standardized_conv2d/kernel": "conv{}.weight",
    "group_norm/gamma": "norm{}.weight",
    "group_norm/beta": "norm{}.bias",
}
_LEAVES_BACK = {ours: theirs for theirs, ours in _LEAVES.items()}
_THEIRS = re.compile(r"resnet/block(\d+)/unit(\d+)/([abc])/(.+)")
_OURS = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.(downsample|conv|norm)([123]?)(\..+)")


def is_bit(names: Iterable[str]) -> bool:
    """Whether arrays of these names are a BiT ResNet's."""
    return "resnet/root_block/standardized_conv2d/kernel" in set(names)


def read(arrays: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A BiT ResNet under our names, and the names of arrays that are none of it."""
    weights: dict[str, Tensor] = {}
    for theirs, array in arrays.items():
        if ours := _our_name(theirs):
            kernel = theirs.endswith("/kernel")
            weights[ours] = array.permute(3, 2, 0, 1).contiguous() if kernel else array.flatten()
    return weights, tuple(theirs for theirs in arrays if not _our_name(theirs))


def write(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A BiT ResNet under big_transfer's names, in fp32; ValueError names what has no place."""
    if strange := [ours for ours in weights if not _their_name(ours)]:
        raise ValueError(f"BiT's .npz has no place for {', '.join(strange)}")
    turned = {ours: weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight for ours, weight in weights.items()}
    return {_their_name(ours): plain(weight) for ours, weight in turned.items()}


def _our_name(name: str) -> str:
    """Our name, empty for none."""
    unit = _THEIRS.fullmatch(name)
    if not unit or unit[4] not in _LEAVES:
        return _ONCE.get(name, "")
    leaf = _LEAVES[unit[4]].format(1 + "abc".index(unit[3]))
    return f"stages.{int(unit[1]) - 1}.blocks.{int(unit[2]) - 1}.{leaf}"


def _their_name(name: str) -> str:
    """Their name, empty for none."""
    unit = _OURS.fullmatch(name)
    if not unit:
        return _ONCE_BACK.get(name, "")
    stage, block, kind, number, rest = unit.groups()
    leaf = _LEAVES_BACK.get(f"{kind}{'{}' if number else ''}{rest}", "")
    letter = "abc"[int(number or 1) - 1]
    return leaf and f"resnet/block{int(stage) + 1}/unit{int(block) + 1:02}/{letter}/{leaf}"
