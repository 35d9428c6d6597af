"""What a vision transformer costs (Dosovitskiy et al. 2021, section 3.1).

Legend: d width, m hidden width, n patches, e tokens before them, t tokens (e + n).
"""

from pipeline.architectures.vit import Vit


def parameters(config: Vit, classes: int) -> int:
    """Parameters of the model with a head of so many classes, or two heads where there is a distillation token."""
    return (3 * config.patch**2 + 1) * config.width + behind_patches(config, classes)


def macs(config: Vit, classes: int) -> int:
    """Multiply-accumulates of one picture's forward pass."""
    return config.grid**2 * 3 * config.patch**2 * config.width + macs_behind_patches(config, classes)


def behind_patches(config: Vit, classes: int) -> int:
    """Parameters but those that make vectors of patches."""
    d, e, n = config.width, config.prefix, config.grid**2
    learned = n + (e if config.prefix_positions else 0) if config.positions == "learned" else 0
    attention = 4 * d * d + d + (3 * d if config.qkv_bias else 0)
    mlp = _mlp(config)
    pool = d + attention + mlp + 2 * d if config.pooling == "map" else 0
    heads = (1 + config.distillation) * classes * (d + 1) + (d * (d + 1) if config.representation else 0)
    return (e + learned) * d + config.depth * (attention + mlp + 4 * d) + 2 * d + pool + heads


def macs_behind_patches(config: Vit, classes: int) -> int:
    """Multiply-accumulates but those that make vectors of patches."""
    d, m, t, n = config.width, config.hidden, config.tokens, config.grid**2
    block = 4 * t * d * d + 2 * t * t * d + 2 * t * d * m
    pool = 2 * d * d + 2 * n * d * d + 2 * n * d + 2 * d * m if config.pooling == "map" else 0
    heads = (1 + config.distillation) * classes * d + (d * d if config.representation else 0)
    return config.depth * block + pool + heads


def _mlp(config: Vit) -> int:
    return 2 * config.width * config.hidden + config.hidden + config.width
