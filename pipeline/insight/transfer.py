"""What fine-tunings came to, in the tables of the papers, with the papers' own numbers beside ours.

Everything is computed from the results that a sweep leaves in its folder: `tested.py` makes lines of them, `clean.py`
leaves out what the corpus holds, and `published.py` has what others reached.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from math import floor, log10
from statistics import fmean
from typing import Any

from pipeline.cli import parse
from pipeline.insight import page, words
from pipeline.insight.clean import Held, clean, contaminated
from pipeline.insight.published import (
    AUGREGS,
    BIT_M,
    CMTS,
    DEITS,
    GROUPS,
    MAXVITS,
    TABLE_2,
    TABLE_5,
    TABLE_6,
    TABLE_9,
    VTAB,
    Line,
    Number,
)
from pipeline.insight.report import Pretraining, Report, Results, Transfer, Validation
from pipeline.insight.tables import ABSENT, STYLE, Row, Table, html, markdown, show
from pipeline.insight.tested import Known, Ours, Result, Tested, lines
from shards.storage import Folder

HEADINGS = {
    "imagenet": "ImageNet",
    "real": "ReaL",
    "v2": "V2",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "pets": "Pets",
    "flowers": "Flowers",
    "vtab": "VTAB (19)",
    "exaflops": "exaFLOPs",
}
"""Of the columns that the papers' tables have."""
_OF_PAPERS = {"imagenet", "cifar10", "cifar100", "pets", "flowers", *VTAB}
_MEANS = {
    "vtab": "mean of 19",
    "natural": "mean of natural (7)",
    "specialized": "mean of specialized (4)",
    "structured": "mean of structured (8)",
}


def tables(
    results: Mapping[str, Result],
    held: Mapping[str, Held] | None = None,
    models: Mapping[str, Known] | None = None,
) -> tuple[Table, ...]:
    """The tables in which the results have something to say.

    `held` says by root digest of a test set which of its pictures the pretraining's corpus holds; `models`
    tells of models, by digest.
    """
    ours = lines(results, models)
    made = [
        _models("Transfer (as table 2 of the ViT paper)", ours, _FIRST, [*TABLE_2, *BIT_M, *_OTHERS]),
        _models("Transfer by size and pretraining (as tables 5 and 6)", ours, _SECOND, [*TABLE_5, *TABLE_6]),
        _vtab(ours),
        _beside(ours),
        _clean(ours, held) if held is not None else None,
    ]
    return tuple(table for table in made if table)


_FIRST = ("imagenet", "real", "v2", "cifar10", "cifar100", "pets", "flowers", "vtab")
_SECOND = ("imagenet", "real", "cifar10", "cifar100", "pets", "flowers", "exaflops")
_OTHERS = (*(line for line in MAXVITS if line.model.endswith("512 px")), *CMTS, *DEITS, *AUGREGS)


def _models(title: str, ours: Sequence[Ours], columns: Sequence[str], others: Sequence[Line]) -> Table | None:
    """A row for each model; None where none of ours has a number in it."""
    known = [line for line in ours if {*line.values, *line.undecided} & set(columns)]
    if not known:
        return None
    shown = [column for column in columns if any(column in _values(line) for line in [*known, *others])]
    sources = _marks(line for line in others)
    rows = [Row((line.label, *_cells(_values(line), shown)), ours=True, section="ours") for line in known]
    rows += [
        Row((f"{line.model} [{sources[line.source]}]", *_cells(_values(line), shown)), section=line.source)
        for line in others
    ]
    notes = (*_notes(known, shown), *(f"[{mark}] {source}" for source, mark in sources.items()))
    return Table(title, ("model", *(HEADINGS[column] for column in shown)), tuple(rows), notes)


def _values(line: Ours | Line) -> Mapping[str, Number]:
    """With the compute of its pretraining, where it was told; of ours in three digits."""
    if isinstance(line, Line):
        return line.values if line.exaflops is None else {**line.values, "exaflops": Number(line.exaflops, decimals=0)}
    if spent := line.known and line.known.exaflops:
        return {**line.values, "exaflops": Number(spent, decimals=max(0, 2 - floor(log10(spent))))}
    return line.values


def _cells(values: Mapping[str, Number], columns: Iterable[str]) -> list[str]:
    return [str(values[column]) if column in values else ABSENT for column in columns]


def _marks(others: Iterable[Line]) -> dict[str, int]:
    """A number for each source, in their order."""
    return {source: i for i, source in enumerate(dict.fromkeys(line.source for line in others), 1)}


def _notes(ours: Sequence[Ours], columns: Iterable[str]) -> list[str]:
    """How our numbers are to be read, and what is missing to those that are not there."""
    seeds = sorted({len(test.seeds) for line in ours for test in line.tests.values()} or {0})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    notes = [
        f"Test accuracy in %. Ours stand out: mean over {count} seed{'s' if count != '1' else ''}"
        f"{' ± sample standard deviation' if seeds[-1] > 1 else ''}, with learning rates chosen without the test set. "
        "21k is ImageNet-21k."
    ]
    notes += [
        f"{line.label}: several learning rates were tested on {task}, and none was chosen; it is left out."
        for line in ours
        for task in line.undecided
    ]
    if {"vtab", *GROUPS} & set(columns):
        notes += [f"{line.label}: {missing}" for line in ours if (missing := _missing(line))]
    return notes


def _missing(line: Ours) -> str:
    """Which tasks of VTAB-1k are not there, of those that have begun."""
    absent = [task.removeprefix("vtab_") for task in VTAB if task not in line.tests]
    if not absent or len(absent) == len(VTAB):
        return ""
    return f"{len(VTAB) - len(absent)} of the 19 tasks of VTAB-1k, so no mean of them; missing: {', '.join(absent)}."


def _vtab(ours: Sequence[Ours]) -> Table | None:
    """A row for each task of VTAB-1k and a column for each model, as table 9 turned."""
    known = [line for line in ours if {*line.values, *line.undecided} & set(VTAB)]
    if not known:
        return None
    others = [*TABLE_9, *(line for line in BIT_M if "natural" in line.values)]
    sources = _marks(others)
    columns = [*(line.label for line in known), *(f"{line.model} [{sources[line.source]}]" for line in others)]
    named = {task: task.removeprefix("vtab_").replace("_", " ") for task in VTAB} | _MEANS
    groups = {**{group: (*tasks, group) for group, tasks in GROUPS.items()}, "vtab": ("vtab",)}
    rows = [
        Row((named[key], *(_short(_values(line), key) for line in [*known, *others])), key in _MEANS, group)
        for group, keys in groups.items()
        for key in keys
    ]
    notes = (
        *_notes(known, ["vtab"]),
        "Means of groups in the columns of table 9 are computed from their tasks.",
        *(f"[{mark}] {source}" for source, mark in sources.items()),
    )
    title = "VTAB-1k by task (as table 9)"
    return Table(title, ("task", *columns), tuple(rows), notes, ours=frozenset(range(1, len(known) + 1)))


def _short(values: Mapping[str, Number], key: str) -> str:
    if key not in values:
        return ABSENT
    one = values[key]
    return str(one if key == "vtab" else Number(one.mean, one.deviation, 1))


def _beside(ours: Sequence[Ours]) -> Table | None:
    """Tasks that no paper has: pretrained beside from scratch."""
    scratch = [line for line in ours if line.start == "scratch"]
    found = [
        Transfer(line.name, line.model, task, line.protocol, _results(test), _results(_scratch(scratch, line, task)))
        for line in ours
        if line.start != "scratch"
        for task, test in sorted(line.tests.items())
        if task not in _OF_PAPERS
    ]
    if not found:
        return None
    report = Report((), tuple(found), None, 0)
    several = len({(one.source, one.checkpoint, one.protocol) for one in found}) > 1
    rows = tuple(
        Row((f"{one.task}, {_who(one)}" if several else one.task, *row[2:]), section=_who(one))
        for row, one in zip(words.task_rows(report), found, strict=True)
    )
    notes = (
        "Test accuracy in %, mean ± sample standard deviation over the seeds, whose number stands in brackets. The "
        "margin is in points, with its standard error; ahead means by more than two of them. Learning rates, of "
        "pretrained and of scratch, were chosen without the test set.",
        *words.doubts(report),
        *(f"Pretrained: {who}." for who in dict.fromkeys(map(_who, found)) if not several),
    )
    return Table("Pretrained beside from scratch", words.TASK_COLUMNS[1:], rows, notes, words=frozenset({0, 4, 5}))


def _who(transfer: Transfer) -> str:
    return f"{transfer.source}, {transfer.protocol}"


def _scratch(scratch: Sequence[Ours], line: Ours, task: str) -> Tested | None:
    """What the same protocol reached from scratch; None where that is of several architectures, or nothing."""
    same = [one for one in scratch if one.protocol == line.protocol and task in one.tests]
    same = [one for one in same if _same_setting(one.tests[task], line.tests[task])]
    return same[0].tests[task] if len({one.model for one in same}) == 1 else None


def _same_setting(one: Tested, other: Tested) -> bool:
    ours, theirs = (test.results[0]["trial"] for test in (one, other))
    said = ours["recipe"].keys() & theirs["recipe"].keys()
    return ours["data"] == theirs["data"] and all(ours["recipe"][name] == theirs["recipe"][name] for name in said)


def _results(test: Tested | None) -> Results | None:
    return Results(test.accuracies(), (f"{test.rate:g}",)) if test else None


def _clean(ours: Sequence[Ours], held: Mapping[str, Held]) -> Table:
    """Accuracy with and without the test pictures that the corpus holds."""
    rows: list[Row] = []
    unknown: dict[str, None] = {}
    every = True
    for line, name, test, also in _test_sets(ours):
        called = HEADINGS.get(also or name, also or name)
        if one := clean(test, held, also):
            found = f"{one.found:,}" if one.every else f"at least {one.found:,}"
            cells = (f"{one.pictures:,}", found, str(one.all), str(one.clean or ABSENT))
            every &= one.every
            rows.append(Row((f"{called}, {line.label}", *cells), section=line.label))
        else:
            unknown["VTAB-1k" if called in VTAB else called] = None
    notes = [
        "Found: test pictures of which the corpus held a copy before --against took it out. Clean subset: the accuracy "
        "on all others, in %. It matters for models that were pretrained on the corpus as it was before."
    ]
    if not every:
        notes.append(
            "At least: this corpus names one test picture for each picture that left it, and others of the same or of "
            "another test set may be copies, too. One that is made now names all of them."
        )
    if unknown:
        notes.append(f"The corpus was not held against the test pictures, as they are now, of: {', '.join(unknown)}.")
    columns = ("test set", "pictures", "found", "all", "clean subset")
    return Table("Without test pictures that the corpus holds", columns, tuple(rows), tuple(notes))


def _test_sets(ours: Sequence[Ours]) -> Iterator[tuple[Ours, str, Tested, str]]:
    """Every test of ours, with the further test sets of each."""
    for line in ours:
        for name, test in sorted(line.tests.items()):
            for also in ("", *(key for key, _ in test.task["also"] if test.accuracies(key))):
                yield line, name, test, also


# --- accuracy against compute ---------------------------------------------------------------------------------------

_DRAWN = 8
"""Curves in a chart, each of a colour of its own."""


def growing(ours: Sequence[Ours]) -> dict[str, tuple[Pretraining, ...]]:
    """By protocol, a curve for each task, of checkpoints of one architecture by the compute of their pretraining.

    There are curves where an architecture was judged after two or more amounts of compute; of checkpoints that cost the
    same a curve has the mean, since the test set chooses nothing. Tasks of VTAB-1k are there
    as its mean and those of its groups.
    """
    reached: dict[str, dict[tuple[str, str], dict[float, list[float]]]] = {}
    for line in ours:
        if not (line.known and line.known.exaflops):
            continue
        for column, one in line.values.items():
            if column not in VTAB:
                curves = reached.setdefault(line.protocol, {})
                points = curves.setdefault((line.known.architecture, column), {})
                points.setdefault(line.known.exaflops, []).append(one.mean / 100)
    found = {protocol: _curves(of) for protocol, of in sorted(reached.items())}
    return {protocol: curves for protocol, curves in found.items() if curves}


def _curves(reached: Mapping[tuple[str, str], Mapping[float, Sequence[float]]]) -> tuple[Pretraining, ...]:
    """The first few of those that have a length."""
    long = {key: points for key, points in sorted(reached.items()) if len(points) > 1}
    several = len({architecture for architecture, _ in long}) > 1
    return tuple(
        Pretraining(
            id=f"{architecture} {column}",
            name=HEADINGS.get(column, _MEANS.get(column, column)) + (f" ({architecture[:4]})" if several else ""),
            status="FINISHED",
            parameters=None,
            pictures=None,
            hours=None,
            pictures_per_second=None,
            mfu=None,
            curve=tuple(Validation(0, exaflops, fmean(found)) for exaflops, found in sorted(points.items())),
        )
        for (architecture, column), points in list(long.items())[:_DRAWN]
    )


def _drawn(protocol: str, curves: tuple[Pretraining, ...]) -> str:
    """The chart as a section of the page."""
    figure = page.curves(
        Report(curves, (), None, 0),
        f"Line chart of test accuracy against the compute of pretraining for {', '.join(run.name for run in curves)}",
        "Each line is a task, each dot a checkpoint: the mean over the seeds, and over checkpoints that cost the same. "
        "The scale is logarithmic in the error.",
        judged="test accuracy",
    )
    return f"<section><h2>Accuracy against the compute of pretraining, {escape(protocol)}</h2>{figure}</section>"


# --- what is written ------------------------------------------------------------------------------------------------

_CSV: tuple[str, ...] = (
    "model",
    "protocol",
    "start",
    "checkpoint",
    "exaflops",
    "task",
    "accuracy",
    "deviation",
    "seeds",
    "rate",
    "clean",
    "source",
)


def points_csv(
    results: Mapping[str, Result],
    held: Mapping[str, Held] | None = None,
    models: Mapping[str, Known] | None = None,
) -> str:
    """Every number of ours at full precision and every published one as printed, in %, a line each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV, lineterminator="\n")
    writer.writeheader()
    for line in lines(results, models):
        same = {"model": line.name, "protocol": line.protocol, "start": line.start, "checkpoint": line.model}
        same |= {"exaflops": line.known.exaflops} if line.known else {}
        for column, one in line.values.items():
            row = {**same, "task": column, "accuracy": one.mean, "deviation": one.deviation, "source": "ours"}
            if test := line.tests.get(column):
                unseen = clean(test, held or {})
                row |= {"seeds": len(test.seeds), "rate": test.rate}
                row["clean"] = unseen.clean.mean if unseen and unseen.clean else None
            writer.writerow(row)
    for line in (*TABLE_2, *TABLE_5, *TABLE_6, *TABLE_9, *BIT_M, *MAXVITS, *CMTS, *DEITS, *AUGREGS):
        for column, one in line.values.items():
            writer.writerow(
                {
                    "model": line.model,
                    "task": column,
                    "accuracy": f"{one.mean:.{one.decimals}f}",
                    "deviation": one.deviation,
                    "source": line.source,
                }
            )
    return text.getvalue()


def markdown_page(made: Sequence[Table], title: str) -> str:
    """All tables in Markdown."""
    return "\n".join([f"# {title}\n", *(markdown(table) for table in made)])


def html_page(made: Sequence[Table], title: str, where: str, when: datetime, ours: Sequence[Ours] = ()) -> str:
    """The page. It loads nothing, and it has no scripts."""
    drawn = (_drawn(protocol, of) for protocol, of in growing(ours).items())
    sections = "".join([*drawn, *map(html, made)])
    return page.page("Transfer", escape(title), where, when, sections, STYLE)


@dataclass(frozen=True)
class Arguments:
    """Show what fine-tunings came to beside what the papers report."""

    to: str = ""
    """Folder or URL for report.html, report.md and report.csv; FOLDER/report if empty."""
    corpus: str = ""
    """A corpus that was made with --against: which test pictures it held is known, and left out in a second column."""
    sets: str = ""
    """Folder of the test sets, where they are no longer where they were when the corpus was made."""
    checkpoints: str = ""
    """Runs, milestones or exports, with commas between them, that models are called by, if they have been moved."""


def report_main(argv: list[str]) -> None:
    """`report FOLDER`: print the tables, write them and say where; FOLDER is what `--to` was for the fine-tunings."""
    match argv:
        case ["-h" | "--help", *_]:
            parse(Arguments, ["--help"])
        case [folder, *options] if not folder.startswith("-"):
            _report(Folder(folder), parse(Arguments, options))
        case _:
            raise ValueError("report takes the folder of the results first: python jobs/finetune.py report FOLDER")


def _report(folder: Folder, wanted: Arguments) -> None:
    from rich.console import Console

    if wanted.sets and not wanted.corpus:
        raise ValueError("--sets says where the test sets of a corpus are; --corpus is missing")
    results = read(folder)
    held = contaminated(wanted.corpus, wanted.sets) if wanted.corpus else None
    models = {**described(folder), **named(wanted.checkpoints)}
    made = tables(results, held, models)
    if not made:
        raise ValueError(f"{folder.absolute} has no result of a test yet, only of trials to choose a learning rate by")
    show(made, Console())
    target = Folder(wanted.to) if wanted.to else folder / "report"
    points, ours = points_csv(results, held, models), lines(results, models)
    print(f"report: {write(target, made, points, headline(results), folder.absolute, ours)}")


def read(folder: Folder) -> dict[str, Result]:
    """The results in the folder of a sweep, by trial; ValueError where there are none, or one is no result."""
    found = _kept(folder / "results", "result", lambda one: _NEEDED - one.keys() or _OF_TRIAL - one["trial"].keys())
    if not found:
        raise ValueError(
            f"{folder.absolute}/results has no results; python jobs/finetune.py … --to {folder.absolute} makes them"
        )
    return found


_NEEDED = {"trial", "accuracy", "correct", "count", "right", "also"}
_OF_TRIAL = {"task", "data", "split", "start", "model", "protocol", "recipe", "rate", "seed"}


def described(folder: Folder) -> dict[str, Known]:
    """What a sweep has kept of the models in its folder, and of their architectures, by digest."""
    found: dict[str, Known] = {}
    for digest, about in _kept(folder / "models", "model", lambda one: {"folder", "architecture"} - one.keys()).items():
        _tell(found, digest, about["architecture"], about["folder"], about.get("exaflops"))
    return found


def _kept(inside: Folder, what: str, missing: Callable[[Any], set[str]]) -> dict[str, Any]:
    """The JSON files of a folder, by name; ValueError where one is damaged, or something is missing in it."""
    files = sorted(name for name in inside.sizes() if name.endswith(".json"))
    found: dict[str, Any] = {}
    for file, data in zip(files, inside.ranges([(file, 0, -1) for file in files]), strict=True):
        try:
            one = json.loads(data)
            absent = missing(one)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{inside.absolute}/{file} is damaged: {error}") from error
        if absent:
            raise ValueError(f"{inside.absolute}/{file} has no {min(absent)!r}: it is no {what} of this version")
        found[file.removesuffix(".json")] = one
    return found


def named(checkpoints: str) -> dict[str, Known]:
    """Models and their architectures, by digest, called by the last parts of where they lie.

    Of a run its milestones are told of, too. ValueError where there is no model.
    """
    from pipeline.models.weights.exported import ABOUT, find

    found: dict[str, Known] = {}
    for url in filter(None, checkpoints.split(",")):
        run = Folder(url)
        places = [f"milestones/{one}" for one in (run / "milestones").folders()]
        places = [place for place in places if run.exists(f"{place}/{ABOUT}")]
        if not places or run.exists(f"export/{ABOUT}"):
            places.append("export" if run.exists(f"export/{ABOUT}") else "")
        for place in places:
            model, where = find((run / place if place else run).absolute), f"{run.absolute}/{place}"
            _tell(found, model.digest, model.architecture, where, model.about["metrics"].get("exaflops"))
    return found


def _tell(found: dict[str, Known], digest: str, architecture: str, where: str, exaflops: float | None) -> None:
    """Call a model by where it is, and an architecture by the first model of it."""
    *_, before, last = ["", *(part for part in where.split("/") if part not in ("", "export", "milestones"))]
    step = last.startswith("step-")
    found[digest] = Known(f"{before} {last}" if step else last, architecture, exaflops)
    found.setdefault(architecture, Known(before if step else last, architecture))


def headline(results: Mapping[str, Result]) -> str:
    """How much there is."""
    tested = [result["trial"] for result in results.values() if result["trial"]["split"] == "test"]
    tasks = len({trial["task"]["name"] for trial in tested})
    models = len({trial["model"] for trial in tested if trial["start"] == "pretrained"})
    words = (f"{count:,} {what}" + ("s" if count != 1 else "") for count, what in ((tasks, "task"), (models, "model")))
    return f"{', '.join(words)}, {len(tested):,} test" + ("s" if len(tested) != 1 else "")


def write(folder: Folder, made: Sequence[Table], points: str, title: str, where: str, ours: Sequence[Ours] = ()) -> str:
    """Write `report.html`, `report.md` and `report.csv`; returns the place of the page."""
    folder.write("report.csv", points.encode())
    folder.write("report.md", markdown_page(made, title).encode())
    folder.write("report.html", html_page(made, title, where, datetime.now(UTC), ours).encode())
    return f"{folder.absolute}/report.html"
