"""The papers' numbers are the papers': typed a second time here, in another order, and added up."""

from collections.abc import Sequence
from statistics import fmean

import pytest

from pipeline.insight import published
from pipeline.insight.published import Line, Number
from pipeline.transfer import tasks

pytestmark = pytest.mark.timeout(60)


def of(lines: Sequence[Line], model: str) -> Line:
    (found,) = [line for line in lines if line.model == model]
    return found


def means(lines: Sequence[Line], column: str) -> list[float | None]:
    """A column, from top to bottom."""
    return [line.values[column].mean if column in line.values else None for line in lines]


# By model, in the order ImageNet, ReaL, CIFAR-10, CIFAR-100, Pets, Flowers, VTAB: as printed, mean and deviation.
TABLE_2 = {
    "ViT-H/14, JFT": "88.55 0.04 90.72 0.05 99.50 0.06 94.55 0.04 97.56 0.03 99.68 0.02 77.63 0.23",
    "ViT-L/16, JFT": "87.76 0.03 90.54 0.03 99.42 0.03 93.90 0.05 97.32 0.11 99.74 0.00 76.28 0.46",
    "ViT-L/16, 21k": "85.30 0.02 88.62 0.05 99.15 0.03 93.25 0.05 94.67 0.15 99.61 0.02 72.72 0.21",
}
COLUMNS = ("imagenet", "real", "cifar10", "cifar100", "pets", "flowers", "vtab")


@pytest.mark.parametrize("model", TABLE_2)
def test_every_number_and_deviation_of_table_2_is_the_papers(model: str) -> None:
    printed = [float(word) for word in TABLE_2[model].split()]
    values = of(published.TABLE_2, model).values
    assert list(values) == list(COLUMNS)
    assert [x for one in values.values() for x in (one.mean, one.deviation)] == printed


def test_the_rivals_of_table_2_are_as_printed() -> None:
    bit = of(published.TABLE_2, "BiT-L R152x4, JFT")
    assert {name: str(one) for name, one in bit.values.items()} == {
        "imagenet": "87.54 ± 0.02",
        "real": "90.54",
        "cifar10": "99.37 ± 0.06",
        "cifar100": "93.51 ± 0.08",
        "pets": "96.62 ± 0.23",
        "flowers": "99.63 ± 0.03",
        "vtab": "76.29 ± 1.70",
    }
    student, fixed = (of(published.TABLE_2, name) for name in ("Noisy Student L2", "Noisy Student L2, FixRes"))
    assert (means([student, fixed], "imagenet"), student.values["real"].mean) == ([88.4, 88.5], 90.55)
    days = [line.core_days for line in published.TABLE_2[:5]]
    assert days == [2500, 680, 230, 9900, 12300]


# By task, a row for each pretraining: ImageNet, ImageNet-21k, JFT; models in the order B/16, L/16, B/32, L/32, H/14.
TABLE_5 = {
    "imagenet": (
        [77.91, 76.53, 73.38, 71.16],
        [83.97, 85.15, 81.28, 80.99, 85.13],
        [84.15, 87.12, 80.73, 84.37, 88.04],
    ),
    "real": ([83.57, 82.19, 79.56, 77.83], [88.35, 88.40, 86.63, 85.65, 88.70], [88.85, 89.99, 86.27, 88.28, 90.33]),
    "cifar10": ([98.13, 97.86, 97.77, 97.94], [98.95, 99.16, 98.79, 99.13, 99.27], [99.00, 99.38, 98.61, 99.19, 99.50]),
    "cifar100": (
        [87.13, 86.35, 86.31, 87.07],
        [91.67, 93.44, 91.97, 93.04, 93.82],
        [91.87, 94.04, 90.49, 92.52, 94.55],
    ),
    "pets": ([93.81, 93.64, 92.04, 91.35], [94.43, 94.73, 93.02, 93.09, 94.82], [95.80, 97.11, 93.40, 95.83, 97.56]),
    "flowers": ([89.49, 89.66, 85.43, 86.36], [99.38, 99.61, 99.11, 99.19, 99.51], [99.56, 99.56, 99.27, 99.45, 99.68]),
}


@pytest.mark.parametrize("task", TABLE_5)
def test_every_number_of_table_5_is_the_papers(task: str) -> None:
    order = ("ViT-B/16", "ViT-L/16", "ViT-B/32", "ViT-L/32", "ViT-H/14")
    for pretraining, printed in zip(("ImageNet", "21k", "JFT"), TABLE_5[task], strict=True):
        models = order[: len(printed)]
        assert means([of(published.TABLE_5, f"{model}, {pretraining}") for model in models], task) == printed
    assert len(published.TABLE_5) == 14


# By column, from top to bottom: transformers, residual networks, hybrids.
TABLE_6 = {
    "exaflops": (
        "55 224 196 783 1567 4262",
        "50 199 96 141 563 1126 3306",
        "106 274 246 859 1668",
    ),
    "imagenet": (
        "80.73 84.15 84.37 86.30 87.12 88.08",
        "77.54 82.12 80.67 81.88 84.97 85.56 87.22",
        "84.90 85.58 85.68 86.60 87.12",
    ),
    "real": (
        "86.27 88.85 88.28 89.43 89.99 90.36",
        "84.56 87.94 87.07 87.96 89.69 89.89 90.15",
        "89.15 89.65 89.04 89.72 89.76",
    ),
    "cifar10": (
        "98.61 99.00 99.19 99.38 99.38 99.50",
        "97.67 98.29 98.48 98.82 99.06 99.24 99.34",
        "99.01 99.14 99.24 99.18 99.31",
    ),
    "cifar100": (
        "90.49 91.87 92.52 93.46 94.04 94.71",
        "86.07 89.20 89.17 90.22 92.05 91.92 93.53",
        "92.24 92.63 92.93 93.64 93.89",
    ),
    "pets": (
        "93.40 95.80 95.83 96.81 97.11 97.11",
        "91.11 93.43 94.08 94.17 95.37 95.75 96.32",
        "95.75 96.65 96.97 97.03 97.36",
    ),
    "flowers": (
        "99.27 99.56 99.45 99.66 99.56 99.71",
        "94.26 97.02 95.95 96.94 98.62 98.75 99.04",
        "99.46 99.40 99.43 99.40 99.11",
    ),
}


@pytest.mark.parametrize("column", TABLE_6)
def test_every_column_of_table_6_is_the_papers(column: str) -> None:
    printed = [float(word) for word in " ".join(TABLE_6[column]).split()]
    lines = published.TABLE_6
    assert ([line.exaflops for line in lines] if column == "exaflops" else means(lines, column)) == printed


def test_what_tables_5_and_6_both_have_of_seven_epochs_is_the_same() -> None:
    for model in ("ViT-B/32", "ViT-B/16", "ViT-L/32"):
        assert of(published.TABLE_6, f"{model}, 7 epochs").values == of(published.TABLE_5, f"{model}, JFT").values


def test_the_means_of_the_19_tasks_of_table_9_are_those_of_table_2() -> None:
    for model, mean in (("ViT-H/14, JFT", 77.63), ("ViT-L/16, JFT", 76.28), ("ViT-L/16, 21k", 72.72)):
        line = of(published.TABLE_9, model)
        found = fmean(line.values[task].mean for task in published.VTAB)
        # The tasks are printed to a tenth, so their mean may be off by half of that.
        assert found == pytest.approx(mean, abs=0.05)
        assert round(found, 1) == line.values["vtab"].mean
        assert of(published.TABLE_2, model).values["vtab"].mean == mean


def test_the_means_of_the_groups_of_table_9_are_those_of_its_tasks() -> None:
    recomputed = {
        "ViT-H/14, JFT": (86.69, 87.00, 65.03),
        "ViT-L/16, JFT": (85.56, 86.72, 62.96),
        "ViT-L/16, 21k": (83.27, 84.65, 57.50),
    }
    for model, groups in recomputed.items():
        values = of(published.TABLE_9, model).values
        assert [values[name].mean for name in published.GROUPS] == pytest.approx(groups, abs=0.0051)


def test_every_row_of_table_9_is_the_papers() -> None:
    printed = """
        95.3 85.5 75.2 99.7 97.2 65.0 88.9 83.3 96.7 91.4 76.6 91.7 63.8 53.1 79.4 63.3 84.5 33.2 51.2 77.6
        95.4 81.9 74.3 99.7 96.7 63.5 87.4 83.6 96.5 89.7 77.1 86.4 63.1 49.7 74.5 60.5 82.2 36.2 51.1 76.3
        90.8 84.1 74.1 99.3 92.7 61.0 80.9 82.5 95.6 85.2 75.3 70.3 56.1 41.9 74.7 64.9 79.9 30.5 41.7 72.7
    """
    names = """
        caltech101 cifar100 dtd flowers pets sun397 svhn camelyon eurosat resisc45 retinopathy clevr_count
        clevr_distance dmlab dsprites_location dsprites_orientation kitti smallnorb_azimuth smallnorb_elevation
    """
    columns = [*(f"vtab_{name}" for name in names.split()), "vtab"]
    for line, row in zip(published.TABLE_9, printed.strip().splitlines(), strict=True):
        assert [line.values[column].mean for column in columns] == [float(word) for word in row.split()]


def test_the_numbers_of_bit_cmt_maxvit_and_deit_are_theirs() -> None:
    bit, again, smaller = published.BIT_M
    assert [bit.values[c].mean for c in ("vtab", "flowers", "pets", "cifar100", "cifar10", "imagenet")] == [
        *(70.64, 99.30, 94.46, 92.17, 98.91, 85.39),
    ]
    assert [one.mean for one in again.values.values()] == [73.51, 80.77, 85.67, 61.08]
    # 7, 4 and 8 tasks: the groups weigh so in the mean of all.
    weighed = (7 * 80.77 + 4 * 85.67 + 8 * 61.08) / 19
    assert weighed == pytest.approx(73.51, abs=0.01)
    assert smaller.values == {"vtab": Number(72.65)}
    assert means(published.CMTS, "imagenet") == [79.2, 81.8, 83.5, 84.5]
    small = of(published.CMTS, "CMT-S, ImageNet").values
    assert [small[c].mean for c in ("pets", "flowers", "cifar100", "cifar10")] == [95.2, 98.7, 91.7, 99.2]
    sizes = {size: [line for line in published.MAXVITS if f"{size} px" in line.model] for size in (224, 384, 512)}
    assert means(sizes[224], "imagenet") == [83.62, 84.45, 84.95, 85.17]
    assert means(sizes[384], "imagenet") == [85.24, 85.74, 86.34, 86.40, 88.24, 88.32, 88.51, 88.69, 89.12, 89.36]
    assert means(sizes[512], "imagenet") == [85.72, 86.19, 86.66, 86.70, 88.38, 88.46, 88.70, 88.82, 89.41, 89.53]
    assert means(published.DEITS, "imagenet") == [72.2, 79.9, 81.8, 82.9, 74.5, 81.2, 83.4, 85.2]
    assert max(line.values["imagenet"].mean for line in published.AUGREGS) == 85.99


def test_every_column_of_the_papers_is_a_task_that_can_be_fine_tuned_or_a_mean_of_such() -> None:
    known = {task.name: task for task in tasks.ALL}
    further = {name for task in tasks.ALL for name, _ in task.also}
    lines = (
        *(published.TABLE_2 + published.TABLE_5 + published.TABLE_6 + published.TABLE_9),
        *(published.BIT_M + published.CMTS + published.MAXVITS + published.DEITS + published.AUGREGS),
    )
    columns = {column for line in lines for column in line.values}
    assert columns <= known.keys() | further | published.GROUPS.keys() | {"vtab"}
    assert all(line.source and line.values for line in lines)


def test_the_groups_of_vtab_are_those_of_its_tasks() -> None:
    found = {group: {task.name for task in tasks.ALL if task.group == group} for group in published.GROUPS}
    assert found == {group: set(names) for group, names in published.GROUPS.items()}
    assert [len(names) for names in published.GROUPS.values()] == [7, 4, 8] and len(set(published.VTAB)) == 19


@pytest.mark.parametrize("text", ["88.55±.04", "76.29±1.70", "99.74±.00", "90.54", "88.4"])
def test_every_printed_number_is_read_as_it_stands(text: str) -> None:
    one = published.number(text)
    assert one and str(one).replace(" ± 0.", "±.").replace(" ± ", "±") == text
    assert published.number("-") is None
