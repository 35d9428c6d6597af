"""The report as one page that needs nothing but itself, and the files beside it."""

import re
from collections.abc import Sequence
from datetime import datetime
from html import escape
from urllib.parse import urlsplit

from pipeline.insight import charts, words
from pipeline.insight.report import Report
from shards.storage import Folder

WIDE, NARROW = 740, 250
"""Pixels across the charts' plots: for a desk, and for a telephone."""


def write(report: Report, folder: str, uri: str, when: datetime) -> str:
    """Write `report.html`, `report.csv` and, where there is something to draw, `report.svg` and `report.png`.

    Returns the place of the page.
    """
    target = Folder(folder)
    target.write("report.csv", words.points_csv(report).encode())
    if report.front:
        chart = charts.scaling(report, charts.PAPER, WIDE, 400)
        target.write("report.svg", charts.svg(chart).encode())
        target.write("report.png", charts.png(chart))
    target.write("report.html", html(report, uri, when).encode())
    return f"{target.absolute}/report.html"


def html(report: Report, uri: str, when: datetime) -> str:
    """The page. It loads nothing: its style and its charts are inside it, and it has no scripts."""
    sections = f"{_scaling(report)}\n{_runs(report)}\n{_transfer(report)}"
    return page("Comparison of runs", _escaped(_headline(report)), without_password(uri), when, sections)


def page(name: str, headline: str, where: str, when: datetime, sections: str, style: str = "") -> str:
    """A page of this name, read from `where`; `headline` and `sections` are HTML, `style` is added to that of all."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)} · vitscale</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
<header>
<p class="kind">vitscale · {escape(name.lower())}</p>
<h1>{headline}</h1>
<p class="from">Read from <code>{escape(where)}</code> on
<time datetime="{when.isoformat(timespec="seconds")}">{when:%-d %B %Y, %H:%M %Z}</time></p>
</header>
{sections}
</main>
</body>
</html>
"""


def without_password(uri: str) -> str:
    """The URI as it may be shown."""
    password = urlsplit(uri).password
    return uri.replace(f":{password}@", ":***@") if password else uri


def _headline(report: Report) -> str:
    ends = [(run.end.accuracy, run) for run in report.runs if run.end]
    if not ends:
        return "No run has been validated yet"
    accuracy, best = max(ends, key=lambda pair: pair[0])
    assert best.end
    count = f"{len(report.runs)} pretraining run" + ("s" if len(report.runs) > 1 else "")
    return f"{count}, at best {words.percent(accuracy)} after {words.significant(best.end.exaflops)} exaFLOPs"


def _scaling(report: Report) -> str:
    if not report.front:
        return ""
    said = "".join(f"<p>{_escaped(sentence)}</p>" for sentence in words.findings(report))
    names = ", ".join(run.name for run in report.runs if run.end)
    drawn = curves(report, f"Line chart of validation accuracy against training compute for {names}", _legend(report))
    return f"<section><h2>Accuracy against training compute</h2>{drawn}{said}</section>"


def _legend(report: Report) -> str:
    told = (
        "Each line is a run through its validations, the large dot its end. The broad grey steps are the Pareto front: "
        "the best accuracy that any run had reached for that compute or less. The scale is logarithmic in the error."
    )
    law = " The dotted curve is the fitted law." if report.law else ""
    many = " Blue runs end on the front." if len(report.runs) > len(charts.PAGE.series) else ""
    return told + law + many


def _runs(report: Report) -> str:
    return f"""<section><h2>Pretraining runs</h2>
{_table(words.RUN_COLUMNS, words.run_rows(report), left={0})}
<p class="note">Front: no validation of any run is better for the same or less compute than this run's last. Time is
that spent in steps of training, without validations and pauses. MFU is known where the hardware's peak is.</p>
</section>"""


def _transfer(report: Report) -> str:
    if not report.transfers:
        return ""
    drawn = ""
    if any(t.pretrained and t.scratch for t in report.transfers):
        drawn = _figure(
            [
                charts.svg(charts.transfer(report, charts.PAGE, WIDE)),
                charts.svg(charts.transfer(report, charts.PAGE, NARROW - 20)),
            ],
            "Test accuracy on each task, pretrained and from scratch; the numbers are in the table below",
            "Dots are means over the seeds, bars one sample standard deviation to each side.",
        )
    doubts = "".join(f"<li>{_escaped(sentence)}</li>" for sentence in words.doubts(report))
    honest = (
        f'<div class="doubts"><h3>Where pretraining is not shown to help</h3><ul>{doubts}</ul></div>' if doubts else ""
    )
    return f"""<section><h2>Transfer: pretrained against scratch</h2>{drawn}{honest}
{_table(words.TASK_COLUMNS, words.task_rows(report), left={0, 1, 5, 6})}
<p class="note">Test accuracy in %, mean ± sample standard deviation over the seeds, whose number stands in brackets.
The margin is in points, with its standard error; ahead means by more than two of them. Learning rates, of pretrained
and of scratch, were chosen without the test set.</p></section>"""


def curves(report: Report, label: str, caption: str, *, judged: str = "validation accuracy") -> str:
    """The runs of a report, by their compute, as a figure."""
    sizes = ((WIDE, 400), (NARROW, 300))
    drawings = [charts.svg(charts.scaling(report, charts.PAGE, *size, judged=judged)) for size in sizes]
    return _figure(drawings, label, caption)


def _figure(drawings: Sequence[str], label: str, caption: str) -> str:
    """A chart in two widths, of which a page shows the one that fits, with its caption."""
    wide, narrow = (_inline(drawing, label) for drawing in drawings)
    return f"""<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div>
<figcaption>{escape(caption)}</figcaption></figure>"""


def _inline(drawing: str, label: str) -> str:
    """An SVG as part of a page: as wide as its place allows, and one picture to those who hear it."""
    opening, rest = drawing.split(">", 1)
    width = re.search(r'width="([\d.]+)"', opening)
    box = re.search(r'viewBox="[^"]+"', opening)
    assert width and box
    rest = re.sub(r' (?:role|aria-[a-z]+)="[^"]*"', "", rest)
    return f'<svg role="img" aria-label="{escape(label)}" {box[0]} style="--width:{width[1]}px">{rest}'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: set[int]) -> str:
    """A table; on a narrow page each row becomes a card in which every value carries the name of its column."""
    kinds = ["text" if i in left else "number" for i in range(len(columns))]
    head = "".join(f'<th scope="col" class="{kind}">{escape(c)}</th>' for c, kind in zip(columns, kinds, strict=True))
    body = "".join(f"<tr>{_cells(columns, row, kinds)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cells(columns: Sequence[str], row: Sequence[str], kinds: Sequence[str]) -> str:
    first = f'<th scope="row">{escape(row[0])}</th>'
    return first + "".join(
        f'<td class="{kind}" data-name="{escape(column)}"{_mark(cell)}>{_escaped(cell)}</td>'
        for column, cell, kind in zip(columns[1:], row[1:], kinds[1:], strict=True)
    )


def _mark(cell: str) -> str:
    """What should not be overlooked: a verdict against pretraining."""
    return ' data-mark="doubt"' if cell in ("behind", "no clear difference", "not ahead") else ""


def _escaped(text: str) -> str:
    """As HTML, with powers raised and signs kept on the line of their number."""
    kept = escape(text).replace(" %", "&nbsp;%").replace(" ± ", "&nbsp;±&nbsp;")
    return re.sub(r"\^(-?[\d.]+)", r"<sup>\1</sup>", kept)


STYLE = """
:root {
  --ink: #1f2328; --quiet: #646a73; --grid: #e9e6df; --paper: #fdfcf9; --line: #d9d5cb; --accent: #1b5e9e;
  --doubt: #a1470f; --wash: #f5f2ea;
  --series-0: #1b5e9e; --series-1: #b4541a; --series-2: #2d7d5a; --series-3: #8a3d78;
  --series-4: #8a6d00; --series-5: #3a7d96; --series-6: #a63a50; --series-7: #5b5fa8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8e6e1; --quiet: #a2a5aa; --grid: #2c2f33; --paper: #17191c; --line: #3a3d42; --accent: #79b0e8;
    --doubt: #eba26f; --wash: #1f2226;
    --series-0: #79b0e8; --series-1: #eba26f; --series-2: #76c3a0; --series-3: #d393c3;
    --series-4: #d6bb58; --series-5: #86c5dc; --series-6: #ee8fa1; --series-7: #a9ade9;
  }
}
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%; }
body { margin: 0; font: 1rem/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4.5rem) clamp(1.1rem, 4vw, 2.5rem) 5rem; }
h1, h2 { font-family: Charter, "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, "DejaVu Serif", serif;
  font-weight: 600; line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(1.65rem, 4.4vw, 2.6rem); margin: .35rem 0 .9rem; letter-spacing: -.012em; max-width: 24em; }
h2 { font-size: 1.4rem; margin: 0 0 1.1rem; }
h3 { font-size: .95rem; margin: 0 0 .35rem; }
p, li { max-width: 44rem; }
.kind { margin: 0; color: var(--quiet); font-size: .9rem; }
.from { margin: 0; color: var(--quiet); font-size: .9rem; overflow-wrap: anywhere; }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; color: var(--ink); }
section { margin-top: clamp(2.6rem, 6vw, 4rem); padding-top: 1.6rem; border-top: 1px solid var(--line); }
figure { margin: 0 0 1.4rem; }
figcaption, .note { color: var(--quiet); font-size: .875rem; max-width: 44rem; margin-top: .9rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.wide svg { max-width: var(--width); }
.narrow svg { max-width: 28rem; }
sup { line-height: 0; font-size: .75em; }
.narrow { display: none; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .5rem; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--quiet); font-weight: 400; font-size: .82rem; border-bottom-color: var(--line); }
tbody th { font-weight: 600; overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
[data-mark] { color: var(--doubt); font-weight: 600; }
.doubts { background: var(--wash); border-left: 3px solid var(--doubt); padding: .9rem 1.1rem; margin: 0 0 1.4rem; }
.doubts ul { margin: 0; padding-left: 1.1rem; }
@media (max-width: 44rem) {
  .wide { display: none; }
  .narrow { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody { display: block; }
  tr { display: block; padding: .8rem 0; border-bottom: 1px solid var(--line); }
  tbody th, td { display: flex; justify-content: space-between; gap: 1.5rem; border: 0; padding: .14rem 0; }
  td.text, td.number { text-align: right; white-space: normal; }
  td::before { content: attr(data-name); color: var(--quiet); white-space: nowrap; text-align: left; }
}
@media print { .narrow { display: none; } .wide { display: block; } section { break-inside: avoid; } }
"""
