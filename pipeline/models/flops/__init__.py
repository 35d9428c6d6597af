"""What a model costs, from its configuration alone: needs no torch. One file a family.

A multiply-accumulate counts once here; a floating-point operation is half of one. Only matrix products and convolutions
count.
"""

from pipeline.architectures import Architecture, Bit, Cmt, Efficientnet, Hybrid, Maxvit, Vit
from pipeline.models.flops import bit, cmt, efficientnet, hybrid, maxvit, vit


def parameters(model: Architecture, classes: int) -> int:
    """Parameters of the model with a head of so many classes; 0 for none."""
    match model:
        case Hybrid():
            return hybrid.parameters(model, classes)
        case Vit():
            return vit.parameters(model, classes)
        case Bit():
            return bit.parameters(model, classes)
        case Cmt():
            return cmt.parameters(model, classes)
        case Maxvit():
            return maxvit.parameters(model, classes)
        case Efficientnet():
            return efficientnet.parameters(model, classes)


def macs(model: Architecture, classes: int) -> int:
    """Multiply-accumulates of one picture's forward pass, at the configured size."""
    match model:
        case Hybrid():
            return hybrid.macs(model, classes)
        case Vit():
            return vit.macs(model, classes)
        case Bit():
            return bit.macs(model, classes)
        case Cmt():
            return cmt.macs(model, classes)
        case Maxvit():
            return maxvit.macs(model, classes)
        case Efficientnet():
            return efficientnet.macs(model, classes)


def training_exaflops(model: Architecture, classes: int, pictures: int) -> float:
    """Floating-point operations, in units of 10^18, of training on so many pictures.

    Forward and backward pass cost three forward passes; this is how the paper's figure 5 and table 6 count.
    """
    return 3 * 2 * macs(model, classes) * pictures / 1e18
