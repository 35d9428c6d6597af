"""The report in words and rounded numbers, the same in the terminal and on the page."""

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.insight.report import Report, Results, Transfer
from shards.progress import duration

if TYPE_CHECKING:
    from rich.console import Console

RUN_COLUMNS = ("run", "parameters", "pictures seen", "exaFLOPs", "val. accuracy", "time", "pictures/s", "MFU", "front")
TASK_COLUMNS = ("pretrained on", "task", "pretrained", "scratch", "margin", "rates", "verdict")
ABSENT = "-"

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def run_rows(report: Report) -> list[tuple[str, ...]]:
    """A row of words for each pretraining run, under `RUN_COLUMNS`."""
    return [
        (
            run.name if run.finished else f"{run.name} ({run.status.lower()})",
            ABSENT if run.parameters is None else counted(run.parameters),
            ABSENT if run.pictures is None else counted(run.pictures),
            ABSENT if run.end is None else significant(run.end.exaflops),
            ABSENT if run.end is None else percent(run.end.accuracy),
            ABSENT if run.hours is None else duration(3600 * run.hours),
            ABSENT if run.pictures_per_second is None else significant(run.pictures_per_second),
            ABSENT if run.mfu is None else percent(run.mfu),
            "yes" if run.end and run.end.on_front else "no",
        )
        for run in report.runs
    ]


def task_rows(report: Report) -> list[tuple[str, ...]]:
    """A row of words for each transfer, under `TASK_COLUMNS`."""
    several = len({(t.source, t.checkpoint) for t in report.transfers}) > len({t.source for t in report.transfers})
    return [
        (
            f"{t.source} @ {t.checkpoint[:8]}" if several else t.source,
            t.task,
            _spread(t.pretrained),
            _spread(t.scratch),
            _margin(t),
            " / ".join(", ".join(side.rates) if side else ABSENT for side in (t.pretrained, t.scratch)),
            t.verdict,
        )
        for t in report.transfers
    ]


def findings(report: Report) -> list[str]:
    """What the comparison says about scaling, a sentence each."""
    if len(report.runs) < 2:
        return ["One pretraining run is here; a comparison needs at least two."] if report.runs else []
    if report.law is None:
        more = "finished runs that end" if report.missing > 1 else "finished run that ends"
        return [f"No law is fitted: it needs {report.missing} more {more} on the front."]
    low, high = report.law.power_between
    return [
        f"error = {report.law.floor:.3f} + {significant(report.law.scale)} · exaFLOPs^-{report.law.power:.2f}, through "
        f"the ends of {report.law.points} runs; 95 % of refits have a power between {low:.2f} and {high:.2f}, "
        f"and a floor between {report.law.floor_between[0]:.3f} and {report.law.floor_between[1]:.3f}."
    ]


def doubts(report: Report) -> list[str]:
    """Every task on which pretraining is not clearly better than none, a sentence each."""
    return [
        f"{t.task}, from {t.source}: {t.verdict}, margin {_margin(t)} points."
        for t in report.transfers
        if t.margin is not None and not t.verdict.startswith("ahead")
    ]


def points_csv(report: Report) -> str:
    """Every validation of every run, at full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", "id", "step", "exaflops", "val_accuracy", "end", "on_front"))
    for run in report.runs:
        for p in run.curve:
            writer.writerow((run.name, run.id, p.step, p.exaflops, p.accuracy, int(p is run.end), int(p.on_front)))
    return text.getvalue()


def show(report: Report, console: "Console") -> None:
    """Print both tables and what they say on a console of rich."""
    _show_table(console, "Pretraining", RUN_COLUMNS, run_rows(report), words={0, 8})
    if report.transfers:
        _show_table(console, "Transfer, accuracy in % over seeds", TASK_COLUMNS, task_rows(report), words={0, 1, 5, 6})
    for sentence in findings(report) + doubts(report):
        console.print(sentence, markup=False, highlight=False)


def _show_table(
    console: "Console", title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], words: set[int]
) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i in words else "right", overflow="fold", no_wrap=i > 0)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    console.print(made)


def counted(number: int) -> str:
    """A count in three figures or more: `850`, `60.0k`, `632M`, `1.2B`."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            share = number / size
            return f"{share:.0f}{letter}" if share >= 100 else f"{share:.1f}{letter}"
    return str(number)


def significant(number: float) -> str:
    """Three significant figures: `12,345`, `0.0123`, `1.23·10⁻⁷`."""
    if number >= 1000:
        return f"{number:,.0f}"
    if number == 0 or number >= 0.001:
        return f"{number:.3g}"
    figures, power = f"{number:.2e}".split("e")
    return f"{figures}·10{str(int(power)).translate(_RAISED)}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _spread(results: Results | None) -> str:
    if results is None:
        return ABSENT
    around = "" if results.deviation is None else f" ± {100 * results.deviation:.1f}"
    return f"{100 * results.mean:.1f}{around} ({len(results.accuracies)})"


def _margin(transfer: Transfer) -> str:
    if transfer.margin is None:
        return ABSENT
    return f"{100 * transfer.margin:+.1f}" + ("" if transfer.error is None else f" ± {100 * transfer.error:.1f}")
