"""What a multi-axis vision transformer (Tu et al. 2022) costs, from its configuration alone: needs no torch.

Letters as the code has them: c width before a block, d its own, m the width inside its MBConv, r inside its
squeeze-and-excitation, h heads, t tokens of a window.
"""

from collections.abc import Iterator

from pipeline.architectures.maxvit import EXPANSION, HEAD_WIDTH, SQUEEZE, Maxvit


def parameters(config: Maxvit, classes: int) -> int:
    """Parameters of the model with a head of so many classes; with 0, without its last layer."""
    s, last = config.stem, config.widths[-1]
    stem = (9 * 3 + 1) * s + 2 * s + (9 * s + 1) * s
    blocks = sum(_block_parameters(config, c, d, first) for c, d, first, _ in _blocks(config))
    return stem + blocks + 2 * last + last * (last + 1) + classes * (last + 1)


def macs(config: Maxvit, classes: int) -> int:
    """Multiply-accumulates of one picture's forward pass; only matrix products and convolutions count."""
    s, last, pixels = config.stem, config.widths[-1], (config.image_size // 2) ** 2
    stem = 9 * (3 + s) * s * pixels
    blocks = sum(_block_macs(config, c, d, first, side) for c, d, first, side in _blocks(config))
    return stem + blocks + last * last + classes * last


def _blocks(config: Maxvit) -> Iterator[tuple[int, int, bool, int]]:
    """Of each block: the width before it, its own, whether it is its stage's first, the side of its output."""
    before, side = config.stem, config.image_size // 2
    for width, depth in zip(config.widths, config.depths, strict=True):
        side //= 2
        for number in range(depth):
            yield before, width, number == 0, side
            before = width


def _block_parameters(config: Maxvit, c: int, d: int, first: bool) -> int:
    m, r, h = EXPANSION * d, d // SQUEEZE, d // HEAD_WIDTH
    shortcut = (c + 1) * d if first and c != d else 0
    squeeze = (m + 1) * r + (r + 1) * m
    convolution = 2 * c + c * m + 2 * m + 9 * m + 2 * m + squeeze + (m + 1) * d
    attention = 2 * d + 4 * d * (d + 1) + h * config.table**2
    mlp = 2 * d + (d + 1) * m + (m + 1) * d
    return shortcut + convolution + 2 * (attention + mlp)


def _block_macs(config: Maxvit, c: int, d: int, first: bool, side: int) -> int:
    m, r, t, n = EXPANSION * d, d // SQUEEZE, config.window**2, side**2
    shortcut = c * d * n if first and c != d else 0
    expanded = 4 * n if first else n  # the stride comes after the expansion
    convolution = c * m * expanded + 9 * m * n + 2 * m * r + m * d * n
    attention = 4 * n * d * d + 2 * n * t * d
    return shortcut + convolution + 2 * (attention + 2 * n * d * m)
