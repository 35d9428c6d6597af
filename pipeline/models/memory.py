"""What a run needs of a GPU's memory, from its configuration alone: an estimate to choose machines by.

States are what DeepSpeed 0.19 allocates, which is more than ZeRO's paper counts (Rajbhandari et al. 2020, section 3 and
figure 1): it adds up gradients in fp32 beside the bf16 ones, keeps a bucket to reduce them in, and stage 3 lets go of
no gathered weight before `LIVE` of them are there. Activations are what the forward pass keeps for the backward pass,
with a fused attention; compiled blocks keep less. The framework's own needs and fragmentation are not in it.
"""

from dataclasses import dataclass

from pipeline.architectures import Vit
from pipeline.config import Config
from pipeline.models.flops import parameters

BUCKET = 50_000_000
"""Numbers that ZeRO reduces at a time (DeepSpeed's reduce_bucket_size): a buffer of so many is allocated at once. That
is a gradient of 100 MB in bf16, enough for a network to be busy; DeepSpeed's own is ten times as much."""
LIVE = 1_000_000_000
"""Weights that stage 3 keeps gathered (DeepSpeed's stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU, and beside it for offloaded states in the memory of its machine."""

    weights: float
    """Those that compute."""
    gradients: float
    """Those that are added up over the passes of a step."""
    optimizer: float
    """Master weights, the optimizer's state, the moving average."""
    activations: float
    buffers: float = 0.0
    """What gradients are reduced in."""
    update: float = 0.0
    """What is allocated, when the activations are gone, to reduce and clip the gradients and take the step."""
    host: float = 0.0
    """Offloaded states, for each GPU in the memory of its machine."""

    @property
    def total(self) -> float:
        """The most at a time: at the end of a forward pass or, with few pictures, of the step."""
        return self.weights + self.optimizer + self.gradients + self.buffers + max(self.activations, self.update)


def memory(config: Config, processes: int, *, bucket: int = BUCKET) -> Memory:
    """The estimate for one of so many processes, for steps of several passes; in one pass they need somewhat less.

    It follows what was measured of DeepSpeed (tests/test_memory.py), whose reduce_bucket_size is `bucket`.
    """
    count = parameters(config.model, config.classes)
    share, width = count / processes, width_of(config)
    part = share if config.zero else count
    master = 0 if config.zero == 0 else 4  # in fp32 without ZeRO the weights that compute are updated themselves
    optimizer = part * (master + 4 * numbers_of_optimizer(config) + (4 if config.optim.average else 0))
    gathered = min(count, LIVE) if config.zero == 3 and processes > 1 else 0
    weights = width * ((share + gathered) if config.zero == 3 else count)
    gradients = 4 * (share if config.zero >= 2 else count) + (2 * count if _half_of_stage_1(config) else 0)
    host = 0.0
    if config.offload and config.zero:
        on_their_way = {1: 4 + width, 2: 8 + width, 3: 8}[config.zero]  # gradients, and weights where they are whole
        host = optimizer + on_their_way * share
        optimizer, gradients = 0.0, gradients if config.zero == 1 else 0.0
    micro = config.micro(processes)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=micro * (activation_bytes(config, micro) + _picture_bytes(config)),
        buffers=bucket * _bucket_width(config),
        update=_update(config, count, processes, bucket),
        host=host,
    )


def width_of(config: Config) -> int:
    """Bytes of a number that computes."""
    return 2 if config.precision == "bf16" else 4


def numbers_of_optimizer(config: Config) -> int:
    """Numbers that the optimizer keeps of each weight, beside the weight; Adafactor's rows and columns are few."""
    match config.optim.optimizer:
        case "adamw":
            return 2
        case "sgd":
            return 1 if config.optim.momentum else 0
        case "adafactor":
            return 0


def checkpoint_bytes(config: Config) -> float:
    """Bytes of a checkpoint, whatever number of processes writes it: the fp32 state, each number once."""
    count = parameters(config.model, config.classes)
    return 4.0 * count * (1 + numbers_of_optimizer(config) + (1 if config.optim.average else 0))


def activation_numbers(config: Config) -> float:
    """Numbers that a picture's forward pass keeps for the backward pass."""
    return activation_bytes(config) / width_of(config)


def activation_bytes(config: Config, pictures: int = 2) -> float:
    """Bytes for each of so many pictures that a forward pass keeps for the backward pass, and one gradient beside them.

    Of each token and block of a vision transformer: the input and output of both LayerNorms, query, key, value, the
    attention's output, and the MLP's inner layer before and after its GELU; a dropout keeps a mask of one byte a
    number. With recompute only what enters a block is kept, and all of one block at a time. The largest gradient is
    that of the MLP's inner layer. Other families are counted by torch (`kept.py`).
    """
    model, width = config.model, width_of(config)
    if type(model) is not Vit:
        from pipeline.models.kept import kept_bytes  # imports torch, which a dry run of a transformer does without

        return kept_bytes(model, pictures, half=config.precision == "bf16", recompute=config.recompute)
    block = width * (8 * model.width + 2 * model.hidden)
    block += 3 * model.width + model.hidden if model.dropout else 0
    outside = width * (4 * model.width + model.hidden)
    if not config.recompute:
        return model.tokens * (model.depth * block + outside)
    entering = width * model.width
    return model.tokens * (model.depth * entering + block - entering + outside)


def _half_of_stage_1(config: Config) -> bool:
    """Whether DeepSpeed takes its optimizer for bf16 weights, which other stages have not."""
    return config.zero == 1 and config.precision == "bf16" and not config.offload


def _bucket_width(config: Config) -> int:
    """Bytes of a number in the bucket; 0 where there is none."""
    if config.zero == 0 or _half_of_stage_1(config):
        return 0
    return 4 if config.zero == 1 else width_of(config)


def _picture_bytes(config: Config) -> int:
    """A picture in fp32, as it is normalised, and as the model takes it."""
    return 3 * config.model.image_size**2 * (6 if config.precision == "bf16" else 4)


def _update(config: Config, count: int, processes: int, bucket: int) -> float:
    """Bytes beside the states at the end of the last backward pass, or after it."""
    half, share = config.precision == "bf16", count / processes
    match config.zero:
        case 0:
            return 4.0 * count  # laid flat to be reduced
        case 1:
            return 2.0 * count if half else 4 * share
        case 2:
            return (2 if half else 8) * share
        case 3:
            return max(4 * share, 2 * min(bucket, count) * width_of(config))
