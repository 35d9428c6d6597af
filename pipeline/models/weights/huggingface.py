"""Hugging Face's ViT: its names and its `config.json`, into ours and out again.

Written are the names under which the hub's checkpoints lie, which every release of transformers takes; read are also
those that its fifth release has inside.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any, Literal

from torch import Tensor

from pipeline.architectures.vit import Vit
from pipeline.models.weights.attention import PARTS, joined, parted

_BLOCK = {
    "norm1": "layernorm_before",
    **{f"attn.{part}": f"attention.attention.{part}" for part in PARTS},
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_ONCE = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "pre_logits": "pooler.dense",
}
_WHOLE = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
_FIFTH = (
    (re.compile(r"^layers\."), "encoder.layer."),
    (re.compile(r"attention\.q_proj"), "attention.attention.query"),
    (re.compile(r"attention\.k_proj"), "attention.attention.key"),
    (re.compile(r"attention\.v_proj"), "attention.attention.value"),
    (re.compile(r"attention\.o_proj"), "attention.output.dense"),
    (re.compile(r"mlp\.fc1"), "intermediate.dense"),
    (re.compile(r"mlp\.fc2"), "output.dense"),
)
_GELU: dict[str, Literal["tanh", "erf"]] = {
    "gelu": "erf",
    "gelu_pytorch_tanh": "tanh",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
}


def is_vit(names: Iterable[str]) -> bool:
    """Whether tensors of these names are Hugging Face's ViT."""
    return any(name.removeprefix("vit.") == "embeddings.patch_embeddings.projection.weight" for name in names)


def read(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A ViT under our names, and the names of tensors that are none of it."""
    named = {_fourth(name): name for name in weights}
    depth = next(i for i in count() if f"encoder.layer.{i}.layernorm_before.weight" not in named)
    ours = {theirs: ours for ours, theirs in _layers(depth).items()}
    whole = {theirs: ours for ours, theirs in _WHOLE.items()}
    made: dict[str, Tensor] = {}
    left: list[str] = []
    for fourth, name in named.items():
        layer, _, leaf = fourth.rpartition(".")
        if fourth in whole:
            made[whole[fourth]] = weights[name]
        elif layer in ours:
            made[f"{ours[layer]}.{leaf}"] = weights[name]
        else:
            left.append(name)
    return joined(made), tuple(left)


def write(weights: Mapping[str, Tensor], config: Vit) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A ViT under their names, and the names that are left out; ValueError where theirs cannot compute the same.

    With a tanh layer before its head it becomes their ViTModel, whose pooler that layer is; it has no head.
    """
    refuse_strange(config)
    theirs = _layers(config.depth)
    inside = "" if config.representation or "head.weight" not in weights else "vit."
    made: dict[str, Tensor] = {}
    left: list[str] = []
    for name, weight in parted(weights).items():
        layer, _, leaf = name.rpartition(".")
        if name in _WHOLE:
            made[inside + _WHOLE[name]] = weight.contiguous()
        elif layer == "head" and inside:
            made[f"classifier.{leaf}"] = weight.contiguous()
        elif layer in theirs and layer != "head":
            made[f"{inside}{theirs[layer]}.{leaf}"] = weight.contiguous()
        else:
            left.append(name)
    return made, tuple(left)


def refuse_strange(config: Vit) -> None:
    """Raise ValueError, naming the settings, where Hugging Face's ViT does not compute what the model does."""
    wanted = {
        "pooling": "token",
        "positions": "learned",
        "prefix_positions": True,
        "registers": 0,
        "distillation": False,
    }
    strange = [f"{name} {getattr(config, name)}" for name, value in wanted.items() if getattr(config, name) != value]
    if type(config) is not Vit:
        strange.append("trunk of convolutions")
    if strange:
        raise ValueError(f"Hugging Face's ViT has no {', no '.join(strange)}")


def description(config: Vit, classes: int) -> dict[str, Any]:
    """The `config.json` that makes transformers build the model."""
    headed = bool(classes) and not config.representation
    labels = {str(i): f"LABEL_{i}" for i in range(classes)}
    return {
        "architectures": ["ViTForImageClassification" if headed else "ViTModel"],
        "model_type": "vit",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": "gelu" if config.gelu == "erf" else "gelu_pytorch_tanh",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": config.epsilon,
        # Theirs refuses a size that patches do not fill.
        "image_size": config.image_size,
        "patch_size": config.patch,
        "num_channels": 3,
        "qkv_bias": config.qkv_bias,
        **({"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}} if headed else {}),
    }


def preprocessing(config: Vit, mean: list[float], std: list[float]) -> dict[str, Any]:
    """The `preprocessor_config.json`: how their ViTImageProcessor makes an input of a picture."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 2,  # bilinear, by Pillow's number
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def architecture(described: Mapping[str, Any]) -> Vit:
    """The model that a `config.json` describes; ValueError where it describes none that we have."""
    kind, act = described.get("model_type"), described.get("hidden_act", "gelu")
    if kind != "vit":
        raise ValueError(f"config.json describes a model of type {kind!r}; only 'vit' is read")
    if act not in _GELU:
        raise ValueError(f"config.json has hidden_act {act!r}; there are: {', '.join(_GELU)}")
    sizes = {name: described.get(name, 16 if name == "patch_size" else 224) for name in ("image_size", "patch_size")}
    for name, value in sizes.items():
        if isinstance(value, list) and len(set(value)) > 1:
            raise ValueError(f"config.json has {name} {value}; only squares are read")
    image, patch = (value[0] if isinstance(value, list) else value for value in sizes.values())
    return Vit(
        width=described.get("hidden_size", 768),
        depth=described.get("num_hidden_layers", 12),
        heads=described.get("num_attention_heads", 12),
        hidden=described.get("intermediate_size", 3072),
        patch=patch,
        image_size=image,
        gelu=_GELU[act],
        epsilon=described.get("layer_norm_eps", 1e-12),
        qkv_bias=described.get("qkv_bias", True),
    )


def _layers(depth: int) -> dict[str, str]:
    """Their name of each of our layers."""
    made = {**_ONCE, "head": "classifier"}
    for i in range(depth):
        made |= {f"blocks.{i}.{ours}": f"encoder.layer.{i}.{theirs}" for ours, theirs in _BLOCK.items()}
    return made


def _fourth(name: str) -> str:
    """A name as the fourth release had it, and without what stands before all of a ViTModel's."""
    name = name.removeprefix("vit.")
    for pattern, fourth in _FIFTH:
        name = pattern.sub(fourth, name)
    return name
