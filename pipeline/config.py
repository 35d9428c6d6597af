"""What a run is: one frozen value. What follows from it is computed, never written back into it.

Imports nothing heavier than the standard library, so that a dry run and `--help` answer at once.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline.architectures import FAMILIES, Architecture, Cmt, Maxvit, Vit, family


@dataclass(frozen=True)
class Data:
    """Where the pictures are and how they are fed."""

    shards: str = ""
    """Folder or URL of the shard set to train on; several, with the same classes, with commas between them."""
    weights: tuple[float, ...] = ()
    """Share of each of several sets in every step, in any unit; without them each picture comes once an epoch."""
    validation: str = ""
    """Folder or URL of the shard set to validate on after each epoch; none if empty."""
    part: tuple[int, int] = (0, 100)
    """Which hundredths of each set to train on, from the first to below the last: 0 99 leaves out the last one."""
    validation_part: tuple[int, int] = (0, 100)
    """Which hundredths of the validation set to look at: with 99 100 of the same set, those that 0 99 leaves out."""
    samples: int = 0
    """Pictures expected in the set, to plan with before it is there; what counts is its manifest."""
    lanes: int = 64
    """Streams of pictures; a number of the run, not of the cluster: it decides the order."""
    window: int = 16384
    """Pictures of a lane that are shuffled together."""
    crop_area: float = 0.05
    """Smallest share of a picture's area that a crop keeps; 1 keeps the whole picture."""
    crop_side: float = 0.0
    """Share of each side that every crop keeps, at a random place (BiT, appendix F); 0 for crops by area."""
    scaling: Literal["antialiased", "bilinear"] = "antialiased"
    """How crops are scaled: by a triangle as wide as the scale, or by two neighbours along each axis (the paper's)."""
    flip: bool = True
    """Mirror half of the pictures left to right."""
    eval_crop: float = 0.875
    """Share of the shorter side that evaluation looks at, in the middle; 7/8 is the paper's 224 of 256. 0 looks at the
    whole picture, whatever its shape."""
    threads: int = 4
    """Threads of each process that decode; they do not change what comes out."""
    cache: str = ""
    """Local folder for copies of remote shards; ~/.cache/vitscale/shards if empty."""
    cache_gigabytes: float = 200.0
    """What all processes of a machine keep there; 0 keeps nothing and fetches picture by picture."""
    fetches: int = 4
    """Shards that a process fetches or verifies at a time, ahead of need."""
    refused_limit: int = 100
    """Pictures that cannot be decoded are left out and named; with one more than this the run fails."""
    wait_seconds: float = 1800.0
    """After so long without a batch, or for another process's fetching of a shard, the run fails."""
    patience_seconds: float = 120.0
    """For so long a store whose faults may pass is tried again."""


@dataclass(frozen=True)
class Augment:
    """What is done to training pictures beside crop and flip; nothing unless asked for."""

    layers: int = 0
    """Operations of RandAugment on each picture, one after another (Cubuk et al. 2020); 0 for none."""
    magnitude: float = 10.0
    """How strong they are: 10 is the end of the scale, which AugReg goes beyond; DeiT takes 9."""
    space: Literal["augreg", "deit"] = "augreg"
    """Which operations there are and what a magnitude means to them: AugReg's, or DeiT's (rand-m9-mstd0.5-inc1)."""
    mixup: float = 0.0
    """Both parameters of the beta distribution that a pair's share is drawn from (Zhang et al. 2018); 0 for none."""
    cutmix: float = 0.0
    """The same for CutMix (Yun et al. 2019); where both are given, each pair gets one of them, equally often."""
    erase: float = 0.0
    """Share of pictures in which a rectangle is replaced by noise (random erasing, Zhong et al. 2020)."""
    repeats: int = 1
    """How many times in a row each picture comes, cropped and changed anew each time (repeated augmentation, Hoffer et
    al. 2020; DeiT has 3); an epoch stays as long, and has so many times fewer pictures."""


@dataclass(frozen=True)
class Distillation:
    """Learning from another model (Touvron et al. 2021, section 4), whose best is hard, with half the weight."""

    teacher: str = ""
    """Folder or URL of a finished run or an export with the same classes; none if empty."""
    kind: Literal["hard", "soft"] = "hard"
    """Learn the teacher's likeliest class (equation 3), or all that it says (equation 2)."""
    alpha: float = 0.5
    """The teacher's share of the loss; the paper has 0.1 for soft distillation."""
    temperature: float = 3.0
    """What both logits are divided by in soft distillation; hard distillation has none."""
    divisor: Literal["pictures", "numbers"] = "pictures"
    """What the sum of a soft loss is divided by: pictures as in the paper, or also classes as in its code."""


@dataclass(frozen=True)
class Suppression:
    """Losses against over-smoothing (Gong et al. 2021, in two versions), and how they are read; a coefficient of 0
    leaves one out, as a run does with all three unless it is told otherwise."""

    cosine: float = 1.0
    """Coefficient of the patches' similarity to each other in the last layer."""
    contrastive: float = 1.0
    """Coefficient of telling a patch of the first layer its own place in the last."""
    mixing: float = 1.0
    """Coefficient of classifying each patch as the picture it came from."""
    signed: bool = False
    """Opposite patches count as less alike than orthogonal ones, rather than as alike."""
    diagonal: bool = False
    """A patch's similarity to itself, always 1, counts too."""
    first: Literal["block", "embedding"] = "block"
    """The first layer: what the first block gives, or the patch embeddings before positions are added."""
    detached: bool = True
    """No gradient flows into the first layer."""
    normalised: bool = False
    """Vectors of both layers have length 1 before they are contrasted."""
    negative: Literal["others", "all", "neighbourhood"] = "others"
    """What a patch is told from: the others' mean, that of all with itself, or the others' and the neighbours'."""
    head: Literal["own", "shared"] = "own"
    """What classifies patches: a linear layer of its own, one for all places, or the head of the class token."""
    dropout: float = 0.0
    """Before a head of its own."""
    unit: Literal["patches", "regions"] = "patches"
    """What is classified: each patch, or the mean patch of each of the two pictures' regions, weighed by area."""
    averaged: bool = False
    """The class token counts as one patch among the others, in place of a sum of its loss and the patches' mean."""

    def __post_init__(self) -> None:
        for name in ("cosine", "contrastive", "mixing"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a coefficient is at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it is a share, at least 0 and below 1")
        if self.averaged and self.unit == "regions":
            raise ValueError("averaged makes the class token one of the patches: it needs unit 'patches'")

    @property
    def wanted(self) -> bool:
        """Whether there is any."""
        return max(self.cosine, self.contrastive, self.mixing) > 0


@dataclass(frozen=True)
class Optim:
    """The optimizer, its schedule and what it spares (paper, table 3 and appendix B.1)."""

    optimizer: Literal["adamw", "sgd", "adafactor"] = "adamw"
    """AdamW; SGD with momentum; or Adafactor, whose second moments are rows and columns (Shazeer and Stern 2018)."""
    lr: float = 1e-3
    warmup: int = 10_000
    """Steps over which the learning rate rises from 0."""
    decay: Literal["linear", "cosine", "constant", "rsqrt", "steps"] = "linear"
    """Down to `end_lr`; for a length that may change, by one over the root of the step (Zhai et al. 2022); or to a
    tenth after each of the `boundaries` (Kolesnikov et al. 2020)."""
    end_lr: float = 1e-5
    """Where the linear and the cosine decay end."""
    boundaries: tuple[int, ...] = ()
    """Of steps: after each of these, the rate is a tenth."""
    timescale: int = 10_000
    """Of rsqrt: three times so many steps after the warm-up, the rate is the half."""
    cooldown: int = 0
    """Steps at the end over which a factor of the rate goes from 1 to 0 in a line, whatever the decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.03
    """Per unit of learning rate; of SGD, a part of the gradient (L2)."""
    decayed: Literal["all", "matrices"] = "all"
    """What decays: every parameter, as in the paper's code, or not what the model names: biases, norms, positions."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 clips nothing."""
    average: float = 0.0
    """Share of the moving average of the weights that a step keeps, 0.9999 in the paper's table 2; 0 for none. Where
    there is one, it is validated and exported."""


@dataclass(frozen=True)
class Health:
    """What a run does when it is sick."""

    skips: int = 10
    """Steps in a row whose loss or gradient is not finite, each left out; with one more the run fails."""
    sigmas: float = 8.0
    """A loss above its mean by so many standard deviations of the last `window` is a spike; 0 looks for none."""
    window: int = 128
    """Steps that a spike is measured against."""
    spike: Literal["log", "skip", "rollback"] = "log"
    """Name a spike's pictures; or also leave its update out; or also go back to the checkpoint before it, and leave
    the batch out there."""
    hang_seconds: float = 1800.0
    """After so long without a step, all stacks are written down and the run starts again; 0 waits for ever."""


@dataclass(frozen=True)
class Config:
    """All that a run depends on."""

    name: str
    """The experiment."""
    classes: int
    model: Architecture = field(default_factory=Vit)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    distillation: Distillation = field(default_factory=Distillation)
    suppression: Suppression = field(default_factory=lambda: Suppression(cosine=0.0, contrastive=0.0, mixing=0.0))
    optim: Optim = field(default_factory=Optim)
    health: Health = field(default_factory=Health)
    start: str = ""
    """Folder or URL of a run, a milestone or an export whose weights the run starts from, with a new head and at the
    size of its own pictures; chance if empty."""
    objective: Literal["sigmoid", "softmax", "masked"] = "sigmoid"
    """Cross-entropy of each class for itself (ImageNet-21k), or of one class among all; or, without labels, masked
    patch prediction (Dosovitskiy et al. 2021, B.1.2)."""
    smoothing: float = 1e-4
    """Target of a wrong class (sigmoid), or the share given to all classes (softmax)."""
    duration: float = 90.0
    """How long the run is."""
    unit: Literal["epochs", "samples", "steps"] = "epochs"
    """What the duration is counted in: passes over the corpus, pictures, or steps of the optimizer."""
    batch: int = 4096
    """Pictures for one step of the optimizer, on all processes together."""
    micro_batch: int = 64
    """The most pictures for one forward pass of one process; how many there are decides no more than rounding."""
    zero: Literal[0, 1, 2, 3] = 2
    """Stage of DeepSpeed's ZeRO."""
    offload: bool = False
    """Keep the optimizer's state in the memory of the CPU."""
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: bool = False
    """Keep no activations inside a block, but compute them a second time in the backward pass."""
    compiled: bool = False
    """Compile the blocks of the model (torch.compile)."""
    batch_norm: Literal["process", "global"] = "process"
    """Whose pictures a batch norm normalises by: each process's own, or all processes'."""
    seed: int = 0
    save_every: int = 1000
    """Steps from one checkpoint to the next."""
    save_beside: bool = True
    """Write checkpoints while training goes on, from a copy of the state in the CPU's memory; else training waits."""
    keep: int = 2
    """Checkpoints kept."""
    milestone_every: int = 0
    """Steps from one milestone to the next: weights that are kept for ever, to fine-tune from; 0 for none."""
    probe: bool = True
    """At each milestone, where there is a validation set: how well a linear model on its features tells a few classes
    apart, from five pictures of each."""
    log_every: int = 10
    """Steps from one line in MLflow to the next; each is the mean over them."""

    def steps(self, samples: int) -> int:
        """Steps of the optimizer in the whole run over a corpus of `samples` pictures."""
        pictures = {"epochs": samples, "samples": 1, "steps": self.batch}[self.unit]
        return int(self.duration * pictures / self.batch)

    def micro(self, processes: int) -> int:
        """Pictures of one forward pass of one of the processes: as many as divide its share of the batch.

        Where pairs of pictures are mixed, an even number.
        """
        share, least = self.batch // processes, 2 if self.pairs else 1
        sizes = range(min(self.micro_batch, share), 0, -1)
        return next(size for size in sizes if share % size == 0 and size % least == 0)

    @property
    def pairs(self) -> bool:
        """Whether pictures of a batch are mixed two by two."""
        return self.augment.mixup > 0 or self.augment.cutmix > 0

    def passes(self, processes: int) -> int:
        """Forward passes that each process makes for one step."""
        return self.batch // (processes * self.micro(processes))

    def is_milestone(self, done: int) -> bool:
        """Whether a milestone is kept after so many steps."""
        return bool(done and self.milestone_every) and done % self.milestone_every == 0

    def problem(self, processes: int) -> str:
        """Why the run does not fit on so many processes, empty where it does."""
        try:
            self.check(processes)
        except ValueError as error:
            return str(error)
        return ""

    def check(self, processes: int) -> None:
        """Raise ValueError, with numbers that would do, where the run does not fit on so many processes."""
        lanes, batch = self.data.lanes, self.batch
        if processes < 1:
            raise ValueError(f"processes is {processes}; at least 1 is needed")
        for what, value in (("batch", batch), ("micro_batch", self.micro_batch), ("data.lanes", lanes)):
            if value < 1:
                raise ValueError(f"{what} is {value}; at least 1 is needed")
        if batch % lanes:
            near = sorted({lanes * max(1, batch // lanes), lanes * (batch // lanes + 1)})
            raise ValueError(
                f"batch {batch} does not divide over {lanes} lanes: a batch of {_either(near)} would, or "
                f"data.lanes of {_either(_divisors_near(batch, lanes))}"
            )
        if lanes % processes:
            raise ValueError(
                f"{lanes} lanes do not divide over {processes} processes: {_either(_divisors_near(lanes, processes))} "
                f"processes would do, or data.lanes of {_either([processes * (lanes // processes + 1)])}"
            )
        if self.pairs and (batch // processes % 2 or self.micro_batch < 2):
            raise ValueError(
                f"mixup and cutmix take pictures two by two, and {processes} processes share a batch of {batch} in "
                f"micro-batches of {self.micro_batch}: each needs an even share, and micro_batch at least 2"
            )
        self._check_engine()
        self._check_optim()
        self._check_boundaries()
        self.model.check()
        self._check_distillation()
        self._check_suppression()
        self._check_masked()
        self._check_feed()
        self._check_health()

    def _check_engine(self) -> None:
        if self.zero == 0 and self.precision == "bf16":
            raise ValueError("zero 0 keeps no fp32 gradients beside bf16 weights: use zero 1 or 2, or precision fp32")
        if self.zero == 0 and self.offload:
            raise ValueError("offload moves what ZeRO has divided: it needs zero 1, 2 or 3")
        if self.zero == 3 and self.compiled:
            raise ValueError(
                "zero 3 fetches weights inside the blocks, which takes them apart: compiled needs zero 0 to 2"
            )
        if self.zero == 3 and self.objective == "masked":
            raise ValueError(
                "zero 3 fetches the weights of what the loss comes out of, and objective masked looks inside the "
                "model: use zero 1 or 2"
            )
        if self.zero and self.optim.optimizer == "adafactor":
            raise ValueError(
                "adafactor keeps a number for each row and column of a matrix, and ZeRO lays matrices flat: use zero 0 "
                "with precision fp32, or adamw or sgd"
            )

    def _check_optim(self) -> None:
        chosen = self.optim
        least = {
            "lr": (chosen.lr, 0), "end_lr": (chosen.end_lr, 0), "warmup": (chosen.warmup, 0),
            "cooldown": (chosen.cooldown, 0), "timescale": (chosen.timescale, 1),
            "weight_decay": (chosen.weight_decay, 0), "clip": (chosen.clip, 0),
        }  # fmt: skip
        for what, (value, lowest) in least.items():
            if not value >= lowest:
                raise ValueError(f"optim.{what} is {value}; at least {lowest} is needed")
        for what, share in (
            ("momentum", chosen.momentum),
            ("average", chosen.average),
            ("betas", min(chosen.betas)),
            ("betas", max(chosen.betas)),
        ):
            if not 0 <= share < 1:
                raise ValueError(f"optim.{what} is {share}; it is a share that is kept, at least 0 and below 1")

    def _check_boundaries(self) -> None:
        found = self.optim.boundaries
        if bool(found) != (self.optim.decay == "steps") or list(found) != sorted({max(1, each) for each in found}):
            raise ValueError(f"optim.boundaries are {list(found)}: decay steps has some, rising, and others have none")

    def _check_distillation(self) -> None:
        chosen = self.distillation
        if not 0 <= chosen.alpha <= 1:
            raise ValueError(f"distillation.alpha is {chosen.alpha}; it is the teacher's share of the loss, 0 to 1")
        if not chosen.temperature > 0:
            raise ValueError(f"distillation.temperature is {chosen.temperature}; it is above 0")
        if getattr(self.model, "distillation", False) and not (chosen.teacher or self.start):
            raise ValueError(
                "a model with a distillation token needs distillation.teacher, a start, after which both heads learn "
                "the same, or model.distillation off"
            )

    def _check_suppression(self) -> None:
        chosen = self.suppression
        if chosen.wanted and not isinstance(self.model, Vit | Cmt | Maxvit):
            raise ValueError("suppression moves tokens apart: it is there for transformers, not for convolutions alone")
        if chosen.wanted and not isinstance(self.model, Vit) and (chosen.contrastive or chosen.head == "shared"):
            raise ValueError(
                "a pyramid's first layer and its head know other tokens than its last stage has: "
                "suppression.contrastive has to be 0, and suppression.head own"
            )
        if self.suppression.mixing and not self.augment.cutmix:
            raise ValueError("suppression.mixing classifies the patches of mixed pictures: it needs augment.cutmix")

    def _check_masked(self) -> None:
        if self.objective != "masked":
            return
        if type(self.model) is not Vit or self.model.representation or self.model.distillation:
            raise ValueError(
                "objective masked predicts the patches of a vision transformer without representation or distillation"
            )
        if self.pairs or self.augment.erase or self.distillation.teacher or self.suppression.wanted:
            raise ValueError("objective masked goes without mixup, cutmix, erasing, a teacher and suppression")

    def _check_health(self) -> None:
        chosen, least = self.health, {"skips": 0, "sigmas": 0, "window": 2, "hang_seconds": 0}
        for name, lowest in least.items():
            if not getattr(chosen, name) >= lowest:
                raise ValueError(f"health.{name} is {getattr(chosen, name)}; at least {lowest} is needed")
        if chosen.spike != "log" and not chosen.sigmas:
            raise ValueError(f"health.spike {chosen.spike} needs to know what a spike is: give health.sigmas above 0")

    def _check_feed(self) -> None:
        least = {
            "duration": (self.duration, 0), "data.window": (self.data.window, 1),
            "data.threads": (self.data.threads, 1), "data.fetches": (self.data.fetches, 1),
            "data.cache_gigabytes": (self.data.cache_gigabytes, 0),
            "data.refused_limit": (self.data.refused_limit, 0), "augment.layers": (self.augment.layers, 0),
            "augment.magnitude": (self.augment.magnitude, 0), "augment.mixup": (self.augment.mixup, 0),
            "augment.cutmix": (self.augment.cutmix, 0), "augment.repeats": (self.augment.repeats, 1),
        }  # fmt: skip
        for what, (value, lowest) in least.items():
            if not value >= lowest:
                raise ValueError(f"{what} is {value}; at least {lowest} is needed")
        for what, value in (("wait_seconds", self.data.wait_seconds), ("patience_seconds", self.data.patience_seconds)):
            if not value > 0:
                raise ValueError(f"data.{what} is {value}; it is a time above 0")
        most = {"augreg": 22.0, "deit": 10.0}[self.augment.space]  # where the operations still have a meaning
        if self.augment.magnitude > most:
            raise ValueError(f"augment.magnitude is {self.augment.magnitude}; {self.augment.space} goes up to {most:g}")
        repeats, lanes = self.augment.repeats, self.data.lanes
        if repeats > 1 and self.pairs and (self.batch < 2 * lanes or lanes < repeats):
            raise ValueError(
                f"augment.repeats {repeats} with mixup or cutmix would mix pictures with themselves: it needs at least "
                f"{repeats} lanes, of which there are {lanes}, and then a batch of {2 * max(lanes, repeats)} or more"
            )
        if not 0 <= self.augment.erase <= 1:
            raise ValueError(f"augment.erase is {self.augment.erase}; it is a share of the pictures, from 0 to 1")
        for what, (first, last) in (("part", self.data.part), ("validation_part", self.data.validation_part)):
            if not 0 <= first < last <= 100:
                raise ValueError(f"data.{what} is {first} {last}; hundredths go from 0 to 100, the smaller first")
        for what, share in (("crop_side", self.data.crop_side), ("eval_crop", self.data.eval_crop)):
            if not 0 <= share <= 1:
                raise ValueError(f"data.{what} is {share}; it is a share of a side, from 0 to 1")
        if not 0 < self.data.crop_area <= 1:
            raise ValueError(
                f"data.crop_area is {self.data.crop_area}; it is a share of the area, above 0 and at most 1"
            )


def _divisors_near(number: int, wanted: int) -> list[int]:
    """The nearest divisors of `number` at or below and at or above `wanted`."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d <= wanted][-1:]
    above = [d for d in divisors if d >= wanted][:1]
    return sorted({*below, *above})


def _either(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)


def to_dict(config: Config) -> dict[str, Any]:
    """The run as nested plain values, as they stand in `config.json`."""
    return {**asdict(config), "model": {"family": family(config.model), **asdict(config.model)}}


def from_dict(values: dict[str, Any]) -> Config:
    """The run that `to_dict` wrote down; ValueError names a field that is unknown or of a wrong type."""
    return _build(Config, values, "")


def _build(kind: Any, values: dict[str, Any], path: str) -> Any:
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise ValueError(f"no field {path + name!r} in {kind.__name__}; it has: {', '.join(hints)}")
    made: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if hint == Architecture:
            kind_of_model = _family(value.get("family", "vit"))
            made[name] = _build(kind_of_model, {k: v for k, v in value.items() if k != "family"}, f"{path}{name}.")
        elif is_dataclass(hint):
            made[name] = _build(hint, value, f"{path}{name}.")
        else:
            made[name] = _typed(hint, value, path + name)
    return kind(**made)


def _family(name: str) -> type[Architecture]:
    if name not in FAMILIES:
        raise ValueError(f"no family of models {name!r}; there are: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _typed(hint: Any, value: Any, path: str) -> Any:
    origin = get_origin(hint)
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise ValueError(f"{path} is {value!r}; it can be {', '.join(map(str, get_args(hint)))}")
    if origin is UnionType:
        return None if value is None and NoneType in get_args(hint) else _typed(get_args(hint)[0], value, path)
    if origin is tuple:
        parts = get_args(hint)
        if parts[-1] is Ellipsis:
            return tuple(_typed(parts[0], item, path) for item in value)
        return tuple(_typed(part, item, path) for part, item in zip(parts, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{path} is {value!r}, a {type(value).__name__}; it has to be a {hint.__name__}")
    return value


def differences(ours: Config, theirs: Config) -> list[str]:
    """One line, `field: ours != theirs`, for each field in which two runs differ."""

    def compare(a: Any, b: Any, path: str) -> list[str]:
        if not is_dataclass(a) or type(a) is not type(b):
            return [] if a == b else [f"{path}: {a!r} != {b!r}"]
        names = [f.name for f in fields(a)]
        return [line for n in names for line in compare(getattr(a, n), getattr(b, n), f"{path}.{n}" if path else n)]

    return compare(ours, theirs, "")
