"""What a CMT costs: Guo et al. 2022, equation 16, with the convolution before keys and values as their code has it.

Legend: d width of a stage, p of the one before, r hidden width, n places, m keys, k reduction, c channels of the stem.
"""

from pipeline.architectures.cmt import Cmt, Stage


def parameters(config: Cmt, classes: int) -> int:
    """Parameters of the model with a classifier of so many classes; running statistics are none."""
    c, features, widths = config.stem, config.features, config.widths
    stem = 9 * c * (3 + 2 * c) + 3 * (c + 2 * c)
    stages = sum(
        4 * p * d + d + 2 * d + _table(config, stage) + stage.depth * _block_parameters(stage)
        for p, d, stage in zip((c, *widths[:-1]), widths, config.stages, strict=True)
    )
    return stem + stages + features * (widths[-1] + 1) + 2 * features + classes * (features + 1)


def macs(config: Cmt, classes: int) -> int:
    """Multiply-accumulates of one picture's forward pass."""
    c, features, widths, side = config.stem, config.features, config.widths, config.image_size
    stem = (side // 2) ** 2 * 9 * c * (3 + 2 * c)
    stages = sum(
        4 * p * d * (side // stage.stride) ** 2 + stage.depth * _block_macs(stage, side)
        for p, d, stage in zip((c, *widths[:-1]), widths, config.stages, strict=True)
    )
    last = (side // config.stages[-1].stride) ** 2
    return stem + stages + last * widths[-1] * features + features * classes


def _table(config: Cmt, stage: Stage) -> int:
    """Numbers in a stage's table of relative biases."""
    n = (config.image_size // stage.stride) ** 2
    return stage.heads * n * (n // stage.reduction**2)


def _block_parameters(stage: Stage) -> int:
    d, r, k = stage.width, stage.hidden, stage.reduction
    perception = 10 * d
    attention = 4 * d * (d + 1) + (d * k * k + 3 * d if k > 1 else 0)
    feed_forward = (d + 1) * r + 10 * r + (r + 1) * d + 2 * (r + r + d)
    return perception + attention + feed_forward + 4 * d


def _block_macs(stage: Stage, side: int) -> int:
    d, r, k = stage.width, stage.hidden, stage.reduction
    n = (side // stage.stride) ** 2
    m = n // k**2
    perception = 9 * n * d
    reduction = n * d if k > 1 else 0
    attention = 2 * n * d * d + 2 * m * d * d + 2 * n * m * d
    return perception + reduction + attention + 2 * n * d * r + 9 * n * r
