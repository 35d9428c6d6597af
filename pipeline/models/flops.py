"""What a model costs, from its configuration alone: needs no torch.

A multiply-accumulate counts once here; a floating-point operation is half of one. Only matrix products count.
"""

from pipeline.config import Vit


def parameters(model: Vit, classes: int) -> int:
    """Parameters of the model with a head of so many classes."""
    d, m, tokens = model.width, model.hidden, model.grid**2 + 1
    block = 4 * d * d + 4 * d + 2 * d * m + m + d + 4 * d
    head = classes * (d + 1) + (d * (d + 1) if model.representation else 0)
    return (3 * model.patch**2 + 1) * d + d + tokens * d + model.depth * block + 2 * d + head


def macs(model: Vit, classes: int) -> int:
    """Multiply-accumulates of one picture's forward pass."""
    d, n = model.width, model.grid**2
    t = n + 1
    block = 4 * t * d * d + 2 * t * t * d + 2 * t * d * model.hidden
    head = classes * d + (d * d if model.representation else 0)
    return n * 3 * model.patch**2 * d + model.depth * block + head


def training_exaflops(model: Vit, classes: int, pictures: int) -> float:
    """Floating-point operations, in units of 10^18, of training on so many pictures.

    Forward and backward pass cost three forward passes; this is how the paper's figure 5 and table 6 count.
    """
    return 3 * 2 * macs(model, classes) * pictures / 1e18
