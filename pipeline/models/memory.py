"""What a run needs of a GPU's memory, from its configuration alone: an estimate to choose machines by.

States follow Rajbhandari et al. 2020 (ZeRO, section 3 and figure 1) for what DeepSpeed keeps: weights that compute,
fp32 master weights, AdamW's two moments, fp32 gradients. Activations are what a block keeps for its backward pass
with a fused attention; the framework's own needs and fragmentation are not in it.
"""

from dataclasses import dataclass

from pipeline.architectures import Vit
from pipeline.config import Config
from pipeline.models.flops import parameters


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(config: Config, processes: int) -> Memory:
    """The estimate for one of so many processes."""
    count = parameters(config.model, config.classes)
    share = count / processes
    width = 2 if config.precision == "bf16" else 4
    master = 0 if config.zero == 0 and config.precision == "fp32" else 4
    return Memory(
        weights=count * width,
        gradients=4 * (share if config.zero == 2 else count),
        optimizer=(master + 8) * (share if config.zero else count),
        activations=width * config.micro(processes) * activation_numbers(config),
    )


def activation_numbers(config: Config) -> float:
    """Numbers that a picture's forward pass keeps for the backward pass.

    Of each token and block of a vision transformer: the input and output of both LayerNorms, query, key, value, the
    attention's output, and the MLP's inner layer before and after its GELU; a dropout keeps a mask of one byte a
    number. Other families are counted by torch (`kept.py`).
    """
    model = config.model
    if type(model) is not Vit:
        from pipeline.models.kept import kept_bytes  # imports torch, which a dry run of a transformer does without

        return kept_bytes(model) / 4
    block = 8 * model.width + 2 * model.hidden
    masks = (3 * model.width + model.hidden) / 2 if model.dropout else 0
    return model.tokens * (model.depth * (block + masks) + 4 * model.width)
