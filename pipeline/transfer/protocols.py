"""How a fine-tuning is done: frozen values with a name, a version and a source.

A protocol is what a paper says about all its tasks; a recipe is what follows from it for one task and one model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

from pipeline.architectures import Architecture, Bit, Vit
from pipeline.architectures.bit import bit_r152x4
from pipeline.config import Augment, Optim
from pipeline.optim.schedule import learning_rate
from pipeline.transfer.tasks import Task


@dataclass(frozen=True)
class Recipe:
    """All that decides a training and its evaluation, but for the learning rate and the seed."""

    method: Literal["all", "linear", "fewshot"] = "all"
    """Train all weights; a linear head on frozen features; or solve for one in closed form, with the trial's rate for
    the penalty."""
    steps: int = 0
    batch: int = 512
    warmup: int = 0
    """Steps over which the rate rises from 0."""
    decay: Literal["cosine", "steps"] = "cosine"
    boundaries: tuple[int, ...] = ()
    """Of the decay by steps: after each of these, the rate is a tenth."""
    end: float = 0.0
    """Where the cosine ends, as a share of the rate; 1 keeps it constant."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    decayed: Literal["all", "matrices"] = "all"
    clip: float = 1.0
    """Largest global norm of the gradient; 0 clips nothing."""
    average: float = 0.0
    """Share of the moving average of the weights that a step keeps; 0 for none. Where there is one, it is judged."""
    size: int = 0
    """Side of a picture in pixels; 0 for the checkpoint's own."""
    training: Literal["inception", "crop", "resmall", "resize"] = "inception"
    """What is cut out for training and scaled to a square: a share of the area of any shape (Szegedy et al. 2015); a
    share of both sides (BiT, appendix F); a square of a share of the shorter side (big_vision's `resize_small`); or
    everything."""
    area: float = 0.05
    """Least share of the area that an inception crop keeps."""
    share: float = 6 / 7
    """Of the side that "crop" and "resmall" keep: 384 of 448 pixels."""
    evaluation: Literal["square", "central"] = "square"
    """What is judged, from the middle: a box of the picture's shape, scaled to a square; or a square."""
    judged: float = 1.0
    """Share of the side, of "central" the shorter one, that is judged."""
    flip: bool = True
    layers: int = 0
    """Operations of DeiT's RandAugment."""
    magnitude: float = 9.0
    mixup: float = 0.0
    cutmix: float = 0.0
    erase: float = 0.0
    repeats: int = 1
    """How many times in a row each picture comes, changed anew each time."""
    smoothing: float = 0.0
    dropout: float | None = None
    """None for the checkpoint's own; a model that has none stays without."""
    stochastic_depth: float | None = None
    """None for the checkpoint's own."""
    shots: int = 0
    """Of few-shot learning: training pictures of each class."""

    @property
    def crop(self) -> bool:
        """Whether training ever looks at a part of a picture only."""
        return self.training != "resize"

    @property
    def augment(self) -> Augment:
        """What is done to training pictures beside crop and flip."""
        return Augment(self.layers, self.magnitude, "deit", self.mixup, self.cutmix, self.erase, self.repeats)

    def rate_at(self, rate: float, step: int) -> float:
        """The learning rate of a step (from 0), of which `rate` is the highest."""
        optim = Optim(lr=rate, warmup=self.warmup, decay=self.decay, end_lr=self.end * rate, boundaries=self.boundaries)
        return learning_rate(optim, step, self.steps)


class Case(NamedTuple):
    """What a recipe may depend on."""

    task: Task
    samples: int
    architecture: Architecture
    area: float


@dataclass(frozen=True)
class Protocol:
    """What a source says of every task; whatever changes a result changes the version."""

    name: str
    version: int
    source: str
    """Paper and table."""
    make: Callable[[Case], Recipe]
    """The recipe, before what the task forbids."""
    grid: Callable[[Task], tuple[float, ...]]
    chosen_by: Literal["task", "others"] = "task"
    """Whether a rate is the one that is best on the task's own pictures to choose by, or the one whose rank is best on
    those of all other tasks (`pipeline.objectives.fewshot.leave_self_out`)."""

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{self.name}-{self.version}"

    def recipe(self, task: Task, samples: int, architecture: Architecture, area: float) -> Recipe:
        """The recipe for a task of so many training pictures, all that are trained on before the test.

        `area` is the pixels of a usual picture. What the task forbids is left out, whatever the protocol: mirroring,
        and all that would show, or judge, a part of a picture.
        """
        made = self.make(Case(task, samples, architecture, area))
        made = replace(made, flip=made.flip and task.flip)
        if not task.crop:
            made = replace(made, training="resize", evaluation="square", judged=1.0, cutmix=0.0, erase=0.0)
        if not (task.crop and task.flip):  # some of its operations turn and move a picture
            made = replace(made, layers=0)
        return made

    def rates(self, task: Task) -> tuple[float, ...]:
        """The learning rates to choose from; of few-shot learning, the penalties."""
        return self.grid(task)


def named(name: str) -> Protocol:
    """The protocol of this name; ValueError names those there are."""
    known = {protocol.name: protocol for protocol in ALL}
    if name not in known:
        raise ValueError(f"no protocol {name!r}; there are: {', '.join(known)}")
    return known[name]


# Vision transformers


def _vit(case: Case) -> Recipe:
    """Table 4, with the crop of the authors' configurations; warm-up as in their code, which the paper leaves out."""
    if case.task.group:
        return _vit_vtab(case)
    steps = 20_000 if case.task.name == "imagenet" else 10_000 if case.samples >= SMALL else 500
    return Recipe(steps=steps, warmup=500 if steps > 500 else 100, size=384)


def _vit_vtab(case: Case) -> Recipe:
    """Appendix B.1.1: one setting for all tasks, and BiT's crops."""
    return Recipe(steps=2_500, warmup=500, size=384, training="crop")


def _vit_512(case: Case) -> Recipe:
    """Table 2: ImageNet on larger pictures, by a moving average; all else as in table 4."""
    made = _vit(case)
    if case.task.name != "imagenet":
        return made
    patches_of_14 = isinstance(case.architecture, Vit) and case.architecture.patch == 14
    return replace(made, size=518 if patches_of_14 else 512, average=0.9999)


def _vit_rates(task: Task) -> tuple[float, ...]:
    if task.group:
        return (0.01,)
    return (0.003, 0.01, 0.03, 0.06) if task.name == "imagenet" else (0.001, 0.003, 0.01, 0.03)


def _augreg(case: Case) -> Recipe:
    """The longer schedule of each row of table 4; never a dropout. Of VTAB, pictures as large as VTAB's own."""
    made = Recipe(size=384, dropout=0.0, stochastic_depth=0.0)
    if case.task.name == "imagenet":
        return replace(made, steps=20_000, warmup=500)
    if case.task.group:
        return replace(made, steps=2_500, warmup=200, size=224, training="crop")
    longer = case.samples >= SMALL
    return replace(made, steps=10_000 if longer else 2_500, warmup=500 if longer else 200)


def _augreg_short(case: Case) -> Recipe:
    """The shorter schedule; ImageNet has but one."""
    made = _augreg(case)
    if case.task.name == "imagenet":
        return made
    longer = case.samples >= SMALL and not case.task.group
    return replace(made, steps=2_500 if longer else 500, warmup=200 if longer else 100)


def _augreg_rates(task: Task) -> tuple[float, ...]:
    if task.name == "imagenet":
        return (0.01, 0.03)
    return (0.001, 0.003, 0.01, 0.03) if task.group else (0.001, 0.003, 0.01)


def _big_vision(case: Case) -> Recipe:
    """As in table 4, but CIFAR's crops are squares of a share of the shorter side, and so is what is judged."""
    training = "resmall" if case.task.name.startswith("cifar") or case.task.group else "inception"
    return replace(_vit(case), training=training, evaluation="central", judged=6 / 7)


# Convolutions, and what comes between


def _bit_hyperrule(case: Case) -> Recipe:
    """Section 3.3 and appendix F; the boundaries are those of the authors' code, of 500 steps too."""
    few, many = case.samples < SMALL, case.samples >= LARGE
    steps = 500 if few else 20_000 if many else 10_000
    boundaries = (200, 300, 400) if few else tuple(steps * tenths // 10 for tenths in (3, 6, 9))
    made = Recipe(steps=steps, warmup=100 if few else 500, decay="steps", boundaries=boundaries, clip=0.0)
    made = replace(made, training="crop", mixup=0.0 if few else 0.1)
    if case.area < 96**2:
        return replace(made, size=128, share=128 / 160)
    largest = isinstance(case.architecture, Bit) and _as_large(case.architecture)
    return replace(made, size=480, share=480 / 512) if largest else replace(made, size=384)


def _as_large(model: Bit) -> bool:
    return (model.units, model.factor) == (bit_r152x4.units, bit_r152x4.factor)


def _deit(case: Case) -> Recipe:
    """ImageNet at 384 pixels as the authors' README has it; other tasks as they say in their issue 45."""
    made = Recipe(
        training="inception",
        area=0.08,
        evaluation="central",
        judged=7 / 8,
        clip=0.0,
        decayed="matrices",
        layers=2,
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        dropout=0.0,
        stochastic_depth=0.0,
    )
    if case.task.name == "imagenet":
        made = replace(made, optimizer="adamw", batch=512, weight_decay=1e-8, size=384, end=1.0)
        return _epochs(replace(made, erase=0.25, repeats=3, stochastic_depth=0.1), 30, case.samples)
    return _epochs(replace(made, batch=768, weight_decay=1e-4, size=224, end=1e-3), 1_000, case.samples)


def _cmt(case: Case) -> Recipe:
    """DeiT's strategy, which the authors follow, with the dropout and stochastic depth that each of their models has.

    They publish no fine-tuning of their own beside its results.
    """
    return replace(_deit(case), dropout=None, stochastic_depth=None)


def _epochs(recipe: Recipe, epochs: int, samples: int) -> Recipe:
    """The recipe for so many epochs, five of them to warm up."""
    steps = max(1, epochs * samples // recipe.batch)
    return replace(recipe, steps=steps, warmup=min(steps, 5 * samples // recipe.batch))


def _deit_rates(task: Task) -> tuple[float, ...]:
    return (5e-6,) if task.name == "imagenet" else (0.01,)


# Frozen features


def _linear(case: Case) -> Recipe:
    steps = 10_000 if case.samples >= SMALL else 2_500
    return Recipe("linear", steps=steps, warmup=steps // 20, clip=0.0, training="resize", flip=False)


def _fewshot(shots: int, case: Case) -> Recipe:
    """Of a picture scaled to 256 pixels, the 224 in the middle, in proportion to the checkpoint's size."""
    return Recipe("fewshot", training="resize", flip=False, judged=7 / 8, shots=shots, clip=0.0)


def _demo(steps: int, case: Case) -> Recipe:
    return Recipe(steps=steps, batch=64, warmup=steps // 10, training="crop")


def _same(rates: tuple[float, ...], task: Task) -> tuple[float, ...]:
    return rates


def _grid(*rates: float) -> Callable[[Task], tuple[float, ...]]:
    """The same rates for every task."""
    return partial(_same, rates)


SMALL, LARGE = 20_000, 500_000
"""Training pictures below which a task is small, and from which on it is large (BiT, section 3.3)."""

_DOSOVITSKIY = "Dosovitskiy et al. 2021, An Image is Worth 16x16 Words"
_STEINER = "Steiner et al. 2022, How to train your ViT?, table 4"
_BEYER = "Beyer et al. 2022, big_vision, evaluators/fewshot_lsr.py"
_FIGURE = "Dosovitskiy et al. 2021, section 4.1 and figure 4"

PENALTIES = tuple(2.0**power for power in range(-10, 20))

demo = Protocol("demo", 1, "this project", partial(_demo, 300), _grid(0.03, 0.1, 0.3))
demo_short = Protocol("demo-short", 1, "this project", partial(_demo, 100), _grid(0.03, 0.1))
vit = Protocol("vit", 1, f"{_DOSOVITSKIY}, table 4", _vit, _vit_rates)
vit_512 = Protocol("vit-512", 1, f"{_DOSOVITSKIY}, table 2", _vit_512, _vit_rates)
vit_vtab = Protocol("vit-vtab", 1, f"{_DOSOVITSKIY}, table 4 and appendix B.1.1", _vit_vtab, _grid(0.01))
augreg = Protocol("augreg", 1, _STEINER, _augreg, _augreg_rates)
augreg_short = Protocol("augreg-short", 1, _STEINER, _augreg_short, _augreg_rates)
big_vision = Protocol("big-vision", 1, "Beyer et al. 2022, big_vision, configs/transfer.py", _big_vision, _vit_rates)
bit_hyperrule = Protocol(
    "bit-hyperrule", 1, "Kolesnikov et al. 2020, Big Transfer, section 3.3", _bit_hyperrule, _grid(0.003)
)
deit = Protocol("deit", 2, "Touvron et al. 2021, DeiT, section 5.2 and table 9, README, issue 45", _deit, _deit_rates)
cmt = Protocol("cmt", 2, "Guo et al. 2022, CMT, section 4.1, after DeiT", _cmt, _deit_rates)
linear = Protocol(
    "linear",
    1,
    "Zhai et al. 2019, VTAB, linear evaluation",
    _linear,
    _grid(3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0),
)
fewshot = Protocol("fewshot", 1, f"{_FIGURE}; {_BEYER}", partial(_fewshot, 5), _grid(1024.0))
fewshot_1 = Protocol("fewshot-1", 1, _BEYER, partial(_fewshot, 1), _grid(1024.0))
fewshot_10 = Protocol("fewshot-10", 1, _BEYER, partial(_fewshot, 10), _grid(1024.0))
fewshot_25 = Protocol("fewshot-25", 1, _BEYER, partial(_fewshot, 25), _grid(1024.0))
fewshot_ranked = Protocol(
    "fewshot-ranked",
    1,
    f"{_FIGURE}; uncertainty-baselines, jft/common_fewshot.py",
    partial(_fewshot, 5),
    _grid(*PENALTIES),
    "others",
)

ALL = (
    demo,
    vit,
    vit_512,
    vit_vtab,
    augreg,
    augreg_short,
    big_vision,
    bit_hyperrule,
    deit,
    cmt,
    linear,
    fewshot,
    fewshot_1,
    fewshot_10,
    fewshot_25,
    fewshot_ranked,
    demo_short,
)
