"""A table of words and numbers, the same in the terminal, on a page and in Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

ABSENT = "\u2013"
_NAME = 34
"""Letters of words on a line of a cell in the terminal; longer ones are broken."""
_GAP = 2
"""Letters from one column to the next."""


@dataclass(frozen=True)
class Row:
    """Cells, the first of which names the row."""

    cells: tuple[str, ...]
    ours: bool = False
    """To stand out among the others."""
    section: str = ""
    """Rows of the same one stand together."""


@dataclass(frozen=True)
class Table:
    """What is compared."""

    title: str
    columns: tuple[str, ...]
    """Headings, the first of which is above the names of the rows."""
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    words: frozenset[int] = frozenset({0})
    """Columns that hold words; the others hold numbers."""
    ours: frozenset[int] = frozenset()
    """Columns that stand out."""

    def __post_init__(self) -> None:
        assert all(len(row.cells) == len(self.columns) for row in self.rows), self.title


def show(tables: Sequence[Table], console: "Console") -> None:
    """Print tables on a console of rich; one that is too wide comes in several parts, with its rows named in each."""
    for table in tables:
        for i, part in enumerate(_parts(table, console.width)):
            _show(table, part, console, f"{table.title}, continued" if i else table.title)
        for note in table.notes:
            console.print(note, markup=False, highlight=False, style="dim")
        console.print()


def _parts(table: Table, width: int) -> Iterator[list[int]]:
    """The columns beside the first that fit upon a line, then the next ones."""
    left = width - _width(table, 0) - 2 * _GAP
    part: list[int] = []
    for column in range(1, len(table.columns)):
        needed = sum(_width(table, one) + _GAP for one in [*part, column])
        if part and needed > left:
            yield part
            part = []
        part.append(column)
    yield part


def _width(table: Table, column: int) -> int:
    """Letters that a column takes; a heading may be broken between words, and so may words in cells."""
    heading = max(map(len, table.columns[column].split()), default=0)
    cells = max((len(row.cells[column]) for row in table.rows), default=0)
    return max(heading, min(cells, _NAME) if column in table.words else cells)


def _show(table: Table, part: Sequence[int], console: "Console", title: str) -> None:
    from rich import box
    from rich.table import Table as Rich
    from rich.text import Text

    made = Rich(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (0, *part):
        justify = "left" if column in table.words else "right"
        style = "bold" if column in table.ours else ""
        made.add_column(table.columns[column], justify=justify, width=_width(table, column), style=style)
    # In a part, only those rows of others that have something there.
    rows = [row for row in table.rows if row.ours or any(row.cells[column] != ABSENT for column in part)]
    for i, row in enumerate(rows):
        if i and row.section != rows[i - 1].section:
            made.add_section()
        made.add_row(*(Text(row.cells[column]) for column in (0, *part)), style="bold" if row.ours else "")
    console.print(made)


def markdown(table: Table) -> str:
    """The table in Markdown, under a heading, with what is ours in bold."""
    head = " | ".join(_plain(column) for column in table.columns)
    rule = "|".join("---" if i in table.words else "---:" for i in range(len(table.columns)))
    lines = [f"## {table.title}", "", f"| {head} |", f"|{rule}|"]
    for row in table.rows:
        cells = [
            f"**{_plain(cell)}**" if cell and (row.ours or i in table.ours) else _plain(cell)
            for i, cell in enumerate(row.cells)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {_plain(note)}" for note in table.notes)]).rstrip() + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def html(table: Table) -> str:
    """The table as a section of a page; on a narrow one each row becomes a card whose values carry their names."""
    kinds = [
        ("text" if i in table.words else "number") + (" ours" if i in table.ours else "")
        for i in range(len(table.columns))
    ]
    head = "".join(f'<th scope="col" class="{k}">{escape(c)}</th>' for c, k in zip(table.columns, kinds, strict=True))
    sections = groupby(table.rows, key=lambda row: row.section)
    rows = "".join(f"<tbody>{''.join(_html_row(table, row, kinds) for row in of)}</tbody>" for _, of in sections)
    notes = "".join(f"<li>{_kept(note)}</li>" for note in table.notes)
    return f"""<section><h2>{escape(table.title)}</h2>
<div class="broad" tabindex="0" role="region" aria-label="{escape(table.title)}"><table><thead><tr>{head}</tr></thead>
{rows}</table></div>
<ul class="notes">{notes}</ul></section>"""


def _html_row(table: Table, row: Row, kinds: Sequence[str]) -> str:
    cells = "".join(
        f'<td class="{kind}{" absent" if cell == ABSENT else ""}" data-name="{escape(column)}">{_kept(cell)}</td>'
        for column, cell, kind in zip(table.columns[1:], row.cells[1:], kinds[1:], strict=True)
    )
    opening = '<tr class="ours">' if row.ours else "<tr>"
    return f'{opening}<th scope="row">{_kept(row.cells[0])}</th>{cells}</tr>'


def _kept(text: str) -> str:
    """As HTML, with a deviation on the line of its number."""
    return escape(text).replace(" ± ", "&nbsp;±&nbsp;").replace(" %", "&nbsp;%")


STYLE = """
main { max-width: 76rem; }
.broad { overflow-x: auto; }
.broad table { font-size: .86rem; }
.broad th, .broad td { padding: .38rem .4rem; }
.broad tbody th { font-weight: 400; min-width: 13rem; }
.broad tbody:not(:last-child) tr:last-child > * { border-bottom-color: var(--quiet); }
.broad .text:not(:first-child) { padding-left: 1.2rem; }
.broad thead th { vertical-align: bottom; white-space: normal; min-width: 4.5rem; }
.broad thead th.ours { color: var(--ink); font-weight: 600; }
.broad tr.ours { background: var(--wash); }
.broad tr.ours th, .broad tr.ours td, .broad td.ours { font-weight: 600; }
.broad .absent { color: var(--quiet); font-weight: 400; }
.notes { color: var(--quiet); font-size: .875rem; max-width: 44rem; margin: .9rem 0 0; padding-left: 1.1rem; }
@media (max-width: 44rem) {
  .broad { overflow-x: visible; }
  .broad th, .broad td, .broad .text:not(:first-child) { padding: .14rem .4rem; }
  .broad tbody:not(:last-child) { border-bottom: 1px solid var(--quiet); }
  .broad tbody th { min-width: 0; font-weight: 600; }
  .broad tr:not(.ours) .absent { display: none; }
}
"""
