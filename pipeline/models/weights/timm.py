"""timm's layout: our names are its own, so that what differs is which of its models has which settings.

A folder in timm's layout holds `model.safetensors` and a `config.json`, which `timm.create_model("local-dir:FOLDER",
pretrained=True)` reads; the weights alone load by `create_model(name, checkpoint_path=..., **settings)`.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from pipeline.architectures import Architecture, Bit, Cmt, Efficientnet, Hybrid, Maxvit, Vit, efficientnet, maxvit
from pipeline.models.maxvit import resized
from pipeline.models.vit import sines_and_cosines

# What decides nothing of a trained model's answers.
_OF_TRAINING = ("dropout", "stochastic_depth", "drop_path", "drop_connect", "initialisation", "interpolation")
_TRUNKS = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
_BITS = {
    ((3, 4, 6, 3), 1): "resnetv2_50x1_bit",
    ((3, 4, 6, 3), 3): "resnetv2_50x3_bit",
    ((3, 4, 23, 3), 1): "resnetv2_101x1_bit",
    ((3, 4, 23, 3), 3): "resnetv2_101x3_bit",
    ((3, 8, 36, 3), 2): "resnetv2_152x2_bit",
    ((3, 8, 36, 3), 4): "resnetv2_152x4_bit",
}
_MAXVITS = {
    maxvit.maxvit_t: "tiny",
    maxvit.maxvit_s: "small",
    maxvit.maxvit_b: "base",
    maxvit.maxvit_l: "large",
    maxvit.maxvit_xl: "xlarge",
}
_EFFICIENTNETS = [getattr(efficientnet, f"efficientnet_b{i}") for i in range(8)]
# timm's older models wrapped the tanh layer.
_OLDER = {"pre_logits.fc.weight": "pre_logits.weight", "pre_logits.fc.bias": "pre_logits.bias"}


def read(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights, or those of DeiT's and CMT's authors, under our names."""
    return {_OLDER.get(name, name): tensor for name, tensor in weights.items()}


def write(weights: Mapping[str, Tensor], config: Architecture) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights as timm's model of these settings has them, and the names of those that it has no place for.

    timm's vision transformers have no tanh layer before the head: of a model with one, that layer and its head are
    left out, and `num_classes=0` is among the settings. Fixed positions become the weights that they are there.
    """
    made, left = dict(weights), ()
    if isinstance(config, Vit) and config.representation:
        left = tuple(name for name in made if name.startswith(("pre_logits.", "head.")))
        made = {name: tensor for name, tensor in made.items() if name not in left}
    if isinstance(config, Vit) and config.positions == "sincos2d":
        made["pos_embed"] = sines_and_cosines((config.grid, config.grid), config.width).float()
    if isinstance(config, Maxvit):
        made = resized(made, replace(config, bias_window=None))
    return {name: tensor.contiguous() for name, tensor in made.items()}, left


def model(config: Architecture, classes: int) -> tuple[str, dict[str, Any]]:
    """The name and the settings by which `timm.create_model` makes this model; ValueError where timm has none."""
    match config:
        case Hybrid():
            name, settings = _named(_TRUNKS, config.trunk, "trunk"), _transformer(config)
        case Vit():
            name = "deit_base_distilled_patch16_224" if config.distillation else "vit_base_patch16_224"
            settings = _transformer(config)
        case Bit():
            name, settings = _named(_BITS, (config.units, config.factor), "units and factor"), {}
        case Maxvit():
            size = replace(_plain(config), window=7, bias_window=None, image_size=224)
            name = f"maxvit_{_named(_MAXVITS, size, 'widths and depths')}_tf_224"
            settings = {"img_size": config.image_size}
            if config.image_size != 32 * config.window:
                raise ValueError(
                    f"timm's MaxViT takes pictures of {config.image_size} by windows of {config.image_size / 32:g}, "
                    f"not of {config.window}"
                )
        case Efficientnet():
            name, settings = _efficientnet(config), {}
        case Cmt():
            raise ValueError("timm has no CMT; .safetensors in the names of CMT's authors is what an export holds")
    headless = isinstance(config, Vit) and config.representation
    return name, {**settings, "num_classes": 0 if headless else classes}


def description(config: Architecture, classes: int, mean: list[float], std: list[float]) -> dict[str, Any]:
    """The `config.json` of a folder in timm's layout."""
    name, settings = model(config, classes)
    size = [3, config.image_size, config.image_size]
    return {
        "architecture": name,
        "num_classes": settings["num_classes"],
        "model_args": {key: value for key, value in settings.items() if key != "num_classes"},
        "pretrained_cfg": {
            "input_size": size,
            "fixed_input_size": isinstance(config, Vit | Maxvit),
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "mean": mean,
            "std": std,
            "num_classes": settings["num_classes"],
            "classifier": {Bit: "head.fc", Maxvit: "head.fc", Efficientnet: "classifier"}.get(type(config), "head"),
        },
    }


def _transformer(config: Vit) -> dict[str, Any]:
    """What timm's VisionTransformer is made of."""
    if config.epsilon != 1e-6:
        raise ValueError(f"timm's vision transformers have LayerNorms with 1e-6, this one with {config.epsilon:g}")
    if config.distillation and (config.registers or not config.prefix_positions):
        raise ValueError("timm's distilled vision transformer has no registers, and positions for both its tokens")
    ratio = config.hidden / config.width
    if int(config.width * ratio) != config.hidden:  # timm rounds down, and a quotient may lie just below
        ratio = (config.hidden + 0.5) / config.width
    settings = {
        "img_size": config.image_size,
        "patch_size": config.patch,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "act_layer": "gelu" if config.gelu == "erf" else "gelu_tanh",
        "reg_tokens": config.registers,
        "class_token": config.pooling == "token",
        "global_pool": {"token": "token", "gap": "avg", "map": "map"}[config.pooling],
        "no_embed_class": not config.prefix_positions or config.positions == "sincos2d",
    }
    # Its mean is taken before the last norm unless told otherwise.
    return settings | ({"fc_norm": False} if config.pooling == "gap" else {})


def _efficientnet(config: Efficientnet) -> str:
    for number, preset in enumerate(_EFFICIENTNETS):
        if (preset.width, preset.depth) == (config.width, config.depth):
            return f"{'tf_' if config.padding == 'same' else ''}efficientnet_b{number}"
    raise ValueError("timm has EfficientNet-B0 to B7; none of them has this width and depth")


def _plain(config: Any) -> Any:
    """The same architecture without what matters in training alone."""
    defaults = {field.name: field.default for field in fields(config) if field.name in _OF_TRAINING}
    return replace(config, **defaults)


def _named(names: Mapping[Any, str], wanted: Any, what: str) -> str:
    if wanted not in names:
        raise ValueError(f"timm has no such model by its {what}; there are: {', '.join(names.values())}")
    return names[wanted]
