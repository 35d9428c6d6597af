"""What the papers report of transfer: their tables, as printed, to stand beside our own numbers.

Accuracies are in %. A column is named as the task here that asks the same: `imagenet` with its further test sets
`real` and `v2`, `cifar10`, `cifar100`, `pets`, `flowers`, `vtab` for the mean of the 19 tasks of VTAB-1k, `vtab_…` for
one of them, and `natural`, `specialized`, `structured` for the means of its groups.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

NATURAL = ("caltech101", "cifar100", "dtd", "flowers", "pets", "sun397", "svhn")
SPECIALIZED = ("camelyon", "eurosat", "resisc45", "retinopathy")
STRUCTURED = (
    "clevr_count",
    "clevr_distance",
    "dmlab",
    "dsprites_location",
    "dsprites_orientation",
    "kitti",
    "smallnorb_azimuth",
    "smallnorb_elevation",
)
GROUPS = {
    group: tuple(f"vtab_{task}" for task in tasks)
    for group, tasks in (("natural", NATURAL), ("specialized", SPECIALIZED), ("structured", STRUCTURED))
}
"""The groups of VTAB-1k (Zhai et al. 2019, table 1)."""
VTAB = tuple(task for tasks in GROUPS.values() for task in tasks)


@dataclass(frozen=True)
class Number:
    """An accuracy in %, and how exactly it is known."""

    mean: float
    deviation: float | None = None
    """Sample standard deviation over the runs; None where it is not said, or of a single run."""
    decimals: int = 2

    def __str__(self) -> str:
        around = "" if self.deviation is None else f" ± {self.deviation:.{self.decimals}f}"
        return f"{self.mean:.{self.decimals}f}{around}"


@dataclass(frozen=True)
class Line:
    """What one model was reported to reach."""

    model: str
    source: str
    values: Mapping[str, Number]
    exaflops: float | None = None
    """Of its pretraining."""
    core_days: float | None = None
    """Of its pretraining, on TPUv3 cores."""


VIT = "ViT (Dosovitskiy et al. 2021)"
BIT = "BiT (Kolesnikov et al. 2020)"
MAXVIT = "MaxViT (Tu et al. 2022; the authors' code)"
CMT = "CMT (Guo et al. 2022)"
DEIT = "DeiT (Touvron et al. 2021; the authors' code)"
AUGREG = "AugReg (Steiner et al. 2022; README of vision_transformer)"


def number(text: str) -> Number | None:
    """A printed number: `88.55±.04`, `76.29`, and None for a dash."""
    if text == "-":
        return None
    mean, _, deviation = text.partition("±")
    return Number(float(mean), float(deviation) if deviation else None, len(mean.partition(".")[2]))


def _printed(text: str) -> list[list[str]]:
    """The cells of a table, a line each, with bars between them."""
    return [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.strip()]


def _across(source: str, columns: str, text: str) -> tuple[Line, ...]:
    """A table with a row for each model."""
    return tuple(_line(model, source, zip(columns.split(), cells, strict=True)) for model, *cells in _printed(text))


def _down(source: str, text: str) -> tuple[Line, ...]:
    """A table with a column for each model."""
    (_, *models), *rows = _printed(text)
    return tuple(_line(model, source, ((row[0], row[i]) for row in rows)) for i, model in enumerate(models, 1))


def _line(model: str, source: str, cells: Iterable[tuple[str, str]]) -> Line:
    values = {name: one for name, cell in cells if (one := number(cell)) is not None}
    compute = {name: values.pop(name).mean for name in ("exaflops", "core_days") if name in values}
    return Line(model, source, values, **compute)


TABLE_2 = (
    *_down(
        f"{VIT}, table 2",
        """
                  | ViT-H/14, JFT | ViT-L/16, JFT | ViT-L/16, 21k | BiT-L R152x4, JFT | Noisy Student L2
        imagenet  | 88.55±.04     | 87.76±.03     | 85.30±.02     | 87.54±.02         | 88.4
        real      | 90.72±.05     | 90.54±.03     | 88.62±.05     | 90.54             | 90.55
        cifar10   | 99.50±.06     | 99.42±.03     | 99.15±.03     | 99.37±.06         | -
        cifar100  | 94.55±.04     | 93.90±.05     | 93.25±.05     | 93.51±.08         | -
        pets      | 97.56±.03     | 97.32±.11     | 94.67±.15     | 96.62±.23         | -
        flowers   | 99.68±.02     | 99.74±.00     | 99.61±.02     | 99.63±.03         | -
        vtab      | 77.63±.23     | 76.28±.46     | 72.72±.21     | 76.29±1.70        | -
        core_days | 2500          | 680           | 230           | 9900              | 12300
        """,
    ),
    # Its second figure in the table, from Touvron et al. 2020.
    Line("Noisy Student L2, FixRes", f"{VIT}, table 2", {"imagenet": Number(88.5, decimals=1)}),
)
"""The state of the art of then; ImageNet at 512 pixels (H/14: 518) with averaged weights."""

TABLE_5 = (
    *_down(
        f"{VIT}, table 5",
        """
                 | ViT-B/16, ImageNet | ViT-B/32, ImageNet | ViT-L/16, ImageNet | ViT-L/32, ImageNet
        cifar10  | 98.13              | 97.77              | 97.86              | 97.94
        cifar100 | 87.13              | 86.31              | 86.35              | 87.07
        imagenet | 77.91              | 73.38              | 76.53              | 71.16
        real     | 83.57              | 79.56              | 82.19              | 77.83
        flowers  | 89.49              | 85.43              | 89.66              | 86.36
        pets     | 93.81              | 92.04              | 93.64              | 91.35
        """,
    ),
    *_down(
        f"{VIT}, table 5",
        """
                 | ViT-B/16, 21k | ViT-B/32, 21k | ViT-L/16, 21k | ViT-L/32, 21k | ViT-H/14, 21k
        cifar10  | 98.95         | 98.79         | 99.16         | 99.13         | 99.27
        cifar100 | 91.67         | 91.97         | 93.44         | 93.04         | 93.82
        imagenet | 83.97         | 81.28         | 85.15         | 80.99         | 85.13
        real     | 88.35         | 86.63         | 88.40         | 85.65         | 88.70
        flowers  | 99.38         | 99.11         | 99.61         | 99.19         | 99.51
        pets     | 94.43         | 93.02         | 94.73         | 93.09         | 94.82
        """,
    ),
    *_down(
        f"{VIT}, table 5",
        """
                 | ViT-B/16, JFT | ViT-B/32, JFT | ViT-L/16, JFT | ViT-L/32, JFT | ViT-H/14, JFT
        cifar10  | 99.00         | 98.61         | 99.38         | 99.19         | 99.50
        cifar100 | 91.87         | 90.49         | 94.04         | 92.52         | 94.55
        imagenet | 84.15         | 80.73         | 87.12         | 84.37         | 88.04
        real     | 88.85         | 86.27         | 89.99         | 88.28         | 90.33
        flowers  | 99.56         | 99.27         | 99.56         | 99.45         | 99.68
        pets     | 95.80         | 93.40         | 97.11         | 95.83         | 97.56
        """,
    ),
)
"""By size and pretraining set; 384 pixels, no averaged weights."""

_TABLE_6 = """
    ViT-B/32, 7 epochs        | 80.73 | 86.27 | 98.61 | 90.49 | 93.40 | 99.27 | 55
    ViT-B/16, 7 epochs        | 84.15 | 88.85 | 99.00 | 91.87 | 95.80 | 99.56 | 224
    ViT-L/32, 7 epochs        | 84.37 | 88.28 | 99.19 | 92.52 | 95.83 | 99.45 | 196
    ViT-L/16, 7 epochs        | 86.30 | 89.43 | 99.38 | 93.46 | 96.81 | 99.66 | 783
    ViT-L/16, 14 epochs       | 87.12 | 89.99 | 99.38 | 94.04 | 97.11 | 99.56 | 1567
    ViT-H/14, 14 epochs       | 88.08 | 90.36 | 99.50 | 94.71 | 97.11 | 99.71 | 4262
    R50x1, 7 epochs           | 77.54 | 84.56 | 97.67 | 86.07 | 91.11 | 94.26 | 50
    R50x2, 7 epochs           | 82.12 | 87.94 | 98.29 | 89.20 | 93.43 | 97.02 | 199
    R101x1, 7 epochs          | 80.67 | 87.07 | 98.48 | 89.17 | 94.08 | 95.95 | 96
    R152x1, 7 epochs          | 81.88 | 87.96 | 98.82 | 90.22 | 94.17 | 96.94 | 141
    R152x2, 7 epochs          | 84.97 | 89.69 | 99.06 | 92.05 | 95.37 | 98.62 | 563
    R152x2, 14 epochs         | 85.56 | 89.89 | 99.24 | 91.92 | 95.75 | 98.75 | 1126
    R200x3, 14 epochs         | 87.22 | 90.15 | 99.34 | 93.53 | 96.32 | 99.04 | 3306
    R50x1+ViT-B/32, 7 epochs  | 84.90 | 89.15 | 99.01 | 92.24 | 95.75 | 99.46 | 106
    R50x1+ViT-B/16, 7 epochs  | 85.58 | 89.65 | 99.14 | 92.63 | 96.65 | 99.40 | 274
    R50x1+ViT-L/32, 7 epochs  | 85.68 | 89.04 | 99.24 | 92.93 | 96.97 | 99.43 | 246
    R50x1+ViT-L/16, 7 epochs  | 86.60 | 89.72 | 99.18 | 93.64 | 97.03 | 99.40 | 859
    R50x1+ViT-L/16, 14 epochs | 87.12 | 89.76 | 99.31 | 93.89 | 97.36 | 99.11 | 1668
"""
TABLE_6 = _across(f"{VIT}, table 6", "imagenet real cifar10 cifar100 pets flowers exaflops", _TABLE_6)
"""All pretrained on JFT, fine-tuned at 384 pixels, with the compute of the pretraining."""

_TABLE_9 = """
                              | ViT-H/14, JFT | ViT-L/16, JFT | ViT-L/16, 21k
    vtab_caltech101           | 95.3 | 95.4 | 90.8
    vtab_cifar100             | 85.5 | 81.9 | 84.1
    vtab_dtd                  | 75.2 | 74.3 | 74.1
    vtab_flowers              | 99.7 | 99.7 | 99.3
    vtab_pets                 | 97.2 | 96.7 | 92.7
    vtab_sun397               | 65.0 | 63.5 | 61.0
    vtab_svhn                 | 88.9 | 87.4 | 80.9
    vtab_camelyon             | 83.3 | 83.6 | 82.5
    vtab_eurosat              | 96.7 | 96.5 | 95.6
    vtab_resisc45             | 91.4 | 89.7 | 85.2
    vtab_retinopathy          | 76.6 | 77.1 | 75.3
    vtab_clevr_count          | 91.7 | 86.4 | 70.3
    vtab_clevr_distance       | 63.8 | 63.1 | 56.1
    vtab_dmlab                | 53.1 | 49.7 | 41.9
    vtab_dsprites_location    | 79.4 | 74.5 | 74.7
    vtab_dsprites_orientation | 63.3 | 60.5 | 64.9
    vtab_kitti                | 84.5 | 82.2 | 79.9
    vtab_smallnorb_azimuth    | 33.2 | 36.2 | 30.5
    vtab_smallnorb_elevation  | 51.2 | 51.1 | 41.7
    vtab                      | 77.6 | 76.3 | 72.7
"""


def _with_groups(line: Line) -> Line:
    """With the means of the groups, which the paper's table leaves to its reader."""
    means = {group: fmean(line.values[task].mean for task in tasks) for group, tasks in GROUPS.items()}
    return replace(line, values={**line.values, **{group: Number(mean, decimals=1) for group, mean in means.items()}})


TABLE_9 = tuple(_with_groups(line) for line in _down(f"{VIT}, table 9", _TABLE_9))
"""VTAB-1k by task; the means of the groups are computed from it."""

BIT_M = (
    *_across(
        BIT,
        "imagenet cifar10 cifar100 pets flowers vtab",
        "BiT-M R152x4, 21k | 85.39 | 98.91 | 92.17 | 94.46 | 99.30 | 70.64",
    ),
    *_across(
        f"{BIT}; README of big_transfer",
        "vtab natural specialized structured",
        """
        BiT-M R152x4, 21k, rerun | 73.51 | 80.77 | 85.67 | 61.08
        BiT-M R101x3, 21k, rerun | 72.65 | -     | -     | -
        """,
    ),
)
"""BiT by its HyperRule."""

_MAXVIT = """
    MaxViT-T                | 83.62 | 85.24 | 85.72
    MaxViT-S                | 84.45 | 85.74 | 86.19
    MaxViT-B                | 84.95 | 86.34 | 86.66
    MaxViT-L                | 85.17 | 86.40 | 86.70
    MaxViT-B, 21k  | -     | 88.24 | 88.38
    MaxViT-L, 21k  | -     | 88.32 | 88.46
    MaxViT-XL, 21k | -     | 88.51 | 88.70
    MaxViT-B, JFT           | -     | 88.69 | 88.82
    MaxViT-L, JFT           | -     | 89.12 | 89.41
    MaxViT-XL, JFT          | -     | 89.36 | 89.53
"""
MAXVITS = tuple(
    Line(f"{model}, {size} px", MAXVIT, {"imagenet": one})
    for model, *cells in _printed(_MAXVIT)
    for size, cell in zip((224, 384, 512), cells, strict=True)
    if (one := number(cell)) is not None
)
"""ImageNet at three sizes."""

CMTS = (
    *_across(CMT, "imagenet", "CMT-Ti | 79.2\nCMT-XS | 81.8"),
    *_across(CMT, "imagenet cifar10 cifar100 flowers pets", "CMT-S, ImageNet | 83.5 | 99.2 | 91.7 | 98.7 | 95.2"),
    *_across(CMT, "imagenet", "CMT-B | 84.5"),
)
"""ImageNet, and transfer of S."""

DEITS = _across(
    DEIT,
    "imagenet",
    """
    DeiT-Ti                              | 72.2
    DeiT-S                               | 79.9
    DeiT-B                               | 81.8
    DeiT-B, 384 px                       | 82.9
    DeiT-Ti, distilled                   | 74.5
    DeiT-S, distilled                    | 81.2
    DeiT-B, distilled                    | 83.4
    DeiT-B, distilled, 384 px            | 85.2
    """,
)
"""ImageNet, without pretraining on anything else; the last was trained for 1,000 epochs, the others for 300."""

AUGREGS = _across(
    AUGREG,
    "imagenet",
    """
    ViT-L/16, 21k     | 85.59
    R50+ViT-L/32, 21k | 85.99
    ViT-B/16, 21k     | 85.49
    R26+ViT-S/32, 21k | 83.85
    ViT-S/16, 21k     | 83.73
    ViT-B/32, 21k     | 83.59
    ViT-S/32, 21k     | 79.58
    ViT-Ti/16, 21k    | 78.22
    R+ViT-Ti/16, 21k  | 75.40
    """,
)
"""ImageNet at 384 pixels."""
