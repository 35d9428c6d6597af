"""The charts of the report: one specification gives the page's inline SVG and the files beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

import altair as alt
import vl_convert

from pipeline.insight.report import Pretraining, Report, Transfer, Validation

_LEAST_ERROR = 5e-4
"""Nothing is drawn nearer to perfection, which lies at infinity on a logarithmic axis."""
_LINE = 15
"""Pixels from one label to the next."""
_TEXT = {"align": "left", "baseline": "middle", "dx": 10, "limit": 130, "fontWeight": 600}


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Palette:
    """Colours, in any words that a browser knows."""

    ink: str
    quiet: str
    grid: str
    paper: str
    accent: str
    series: tuple[str, ...]


PAPER = Palette(
    ink="#1f2328",
    quiet="#6b7280",
    grid="#e7e5e0",
    paper="#ffffff",
    accent="#1b5e9e",
    series=("#1b5e9e", "#b4541a", "#2d7d5a", "#8a3d78", "#8a6d00", "#3a7d96", "#a63a50", "#5b5fa8"),
)
"""For files that are looked at by themselves."""

PAGE = Palette(
    ink="var(--ink)",
    quiet="var(--quiet)",
    grid="var(--grid)",
    paper="var(--paper)",
    accent="var(--accent)",
    series=tuple(f"var(--series-{i})" for i in range(8)),
)
"""For the page, whose style says what they are by day and by night."""


def scaling(
    report: Report, palette: Palette, width: int, height: int, *, judged: str = "validation accuracy"
) -> alt.LayerChart:
    """Accuracy against training compute: a line for each run, its end marked; behind them the front and the law.

    The vertical axis is logarithmic in the error, as is usual for scaling laws: equal distances are equal factors.
    """
    drawn = [run for run in report.runs if run.curve]
    errors = [_error(point) for run in drawn for point in run.curve]
    axis = _Axis(min(errors) / 1.12, min(1.0, max(errors) * 1.12), height)
    x = alt.X(
        "exaflops:Q",
        title="training compute, exaFLOPs",
        scale=alt.Scale(type="log", nice=False, padding=14),
        axis=_powers(report),
    )
    y = alt.Y(
        "error:Q",
        title=judged,
        scale=alt.Scale(type="log", domain=[axis.low, axis.high], reverse=True, nice=False, zero=False),
        axis=alt.Axis(values=axis.ticks(), labelExpr="format(1 - datum.value, '.3~%')"),
    )
    colours = {run.name: _colour(run, i, len(drawn), palette) for i, run in enumerate(drawn)}
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    colour = alt.Color("run:N", scale=scale, legend=None)
    lines = alt.Chart(_data([_row(run, point) for run in drawn for point in run.curve]))
    ends = alt.Chart(_data(_labels(drawn, axis, width)))
    words = ends.encode(x, alt.Y("label:Q", scale=alt.Scale(type="log")), alt.Text("run:N"))
    layers: list[alt.Chart] = [
        alt.Chart(_data([{"exaflops": p.exaflops, "error": _error(p)} for p in report.front]))
        .mark_line(interpolate="step-after", strokeWidth=9, opacity=0.16, color=palette.ink, strokeJoin="round")
        .encode(x, y),
        lines.mark_line(strokeWidth=2).encode(x, y, colour),
        lines.mark_point(size=16, filled=True, opacity=1).encode(x, y, colour),
        ends.mark_point(size=110, filled=True, opacity=1, stroke=palette.paper, strokeWidth=2).encode(x, y, colour),
        # The same words twice: a rim in the paper's colour keeps them readable upon lines.
        words.mark_text(**_TEXT, stroke=palette.paper, strokeWidth=4, strokeJoin="round", color=palette.paper),
        words.mark_text(**_TEXT).encode(color=colour),
    ]
    if report.law:
        layers.insert(1, _law(report).mark_line(strokeDash=[2, 4], strokeWidth=1.5, color=palette.ink).encode(x, y))
    return _styled(alt.layer(*layers).properties(width=width, height=height), palette)


def transfer(report: Report, palette: Palette, width: int) -> alt.VConcatChart:
    """Test accuracy on each task, pretrained above scratch, with a standard deviation to each side."""
    compared = [t for t in report.transfers if t.pretrained and t.scratch]
    sources = list(dict.fromkeys((t.source, t.checkpoint) for t in compared))
    sides = [(side.mean, side.deviation or 0.0) for t in compared for side in (t.pretrained, t.scratch) if side]
    domain = [min(mean - around for mean, around in sides), max(mean + around for mean, around in sides)]
    parts = [
        _tasks([t for t in compared if (t.source, t.checkpoint) == source], source[0], palette, width, domain, i == 0)
        for i, source in enumerate(sources)
    ]
    return _styled(alt.vconcat(*parts, spacing=26), palette)


def svg(chart: alt.TopLevelMixin) -> str:
    """The chart as SVG."""
    return vl_convert.vegalite_to_svg(chart.to_dict())


def png(chart: alt.TopLevelMixin) -> bytes:
    """The chart as PNG, at twice its size for sharp screens."""
    return vl_convert.vegalite_to_png(chart.to_dict(), scale=2)


@dataclass(frozen=True)
class _Axis:
    """Errors from `low` (top) to `high` (bottom) on a logarithmic axis so many pixels high."""

    low: float
    high: float
    height: int

    def pixel(self, error: float) -> float:
        return self.height * log10(error / self.low) / log10(self.high / self.low)

    def error(self, pixel: float) -> float:
        return self.low * (self.high / self.low) ** (pixel / self.height)

    def ticks(self) -> list[float]:
        """The errors of round accuracies, the roundest first, with room for a line of text between any two."""
        kept: list[float] = []
        for step in (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 1e-4):
            for k in range(ceil(self.low / step), int(self.high / step) + 1):
                if all(abs(self.pixel(step * k) - self.pixel(error)) >= 2 * _LINE for error in kept):
                    kept.append(step * k)
            if len(kept) >= 5:
                break
        return sorted(kept)


def _apart(self, errors: Sequence[float]) -> list[float]:
    kept: list[float] = []
    for error in errors:
        if not kept or self.pixel(error) - self.pixel(kept[-1]) >= 2 * _LINE:
            kept.append(error)
    return kept


def _colour(run: Pretraining, i: int, runs: int, palette: Palette) -> str:
    """A colour of its own for each of few runs; of many, those that end on the front stand out."""
    if runs <= len(palette.series):
        return palette.series[i]
    return palette.accent if run.end and run.end.on_front else palette.quiet


def _powers(report: Report) -> alt.Axis:
    """Compute in powers of ten, with steps between them where the runs span few."""
    compute = [point.exaflops for run in report.runs for point in run.curve]
    low, high = floor(log10(min(compute))) - 1, ceil(log10(max(compute))) + 1
    between = (1, 2, 5) if log10(max(compute) / min(compute)) < 1.5 else (1,)
    ticks = [(f"{digit}e{power}", _scientific(digit, power)) for power in range(low, high + 1) for digit in between]
    values, names = [float(number) for number, _ in ticks], [name for _, name in ticks]
    return alt.Axis(values=values, labelExpr=f"{names}[indexof({values}, datum.value)]")


def _scientific(digit: int, power: int) -> str:
    if -3 <= power <= 3:
        return f"{digit * 10.0**power:,.{max(0, -power)}f}"
    return ("" if digit == 1 else f"{digit}·") + "10" + str(power).translate(_RAISED)


def _error(point: Validation) -> float:
    return max(1 - point.accuracy, _LEAST_ERROR)


def _row(run: Pretraining, point: Validation) -> dict[str, Any]:
    return {"run": run.name, "exaflops": point.exaflops, "error": _error(point)}


def _labels(runs: Sequence[Pretraining], axis: _Axis, width: int) -> list[dict[str, Any]]:
    """The end of each run, with its label moved down where it would lie upon another."""
    ends = sorted(((run, run.end) for run in runs if run.end), key=lambda pair: _error(pair[1]))
    compute = [log10(point.exaflops) for run in runs for point in run.curve]
    a_pixel = (max(compute) - min(compute)) / width or 1.0
    placed: list[tuple[float, float]] = []
    rows = []
    for run, end in ends:
        x, y = log10(end.exaflops) / a_pixel, axis.pixel(_error(end))
        while near := [py for px, py in placed if abs(px - x) < 140 and abs(py - y) < _LINE - 1]:
            y = max(near) + _LINE
        placed.append((x, y))
        rows.append(_row(run, end) | {"label": axis.error(y)})
    return rows


def _law(report: Report) -> alt.Chart:
    assert report.law
    compute = [point.exaflops for point in report.front]
    low, high = log10(min(compute)), log10(max(compute) * 2)
    grid = [10 ** (low + (high - low) * i / 60) for i in range(61)]
    return alt.Chart(_data([{"exaflops": c, "error": max(report.law.error(c), _LEAST_ERROR)} for c in grid]))


def _tasks(
    transfers: Sequence[Transfer], source: str, palette: Palette, width: int, domain: list[float], first: bool
) -> Any:
    rows = [
        {
            "task": t.task,
            "start": start,
            "mean": side.mean,
            "low": side.mean - (side.deviation or 0.0),
            "high": side.mean + (side.deviation or 0.0),
        }
        for t in transfers
        for start, side in (("pretrained", t.pretrained), ("from scratch", t.scratch))
        if side
    ]
    starts = ["pretrained", "from scratch"]
    legend = alt.Legend(orient="top", title=None, symbolOpacity=1) if first else None
    colour = alt.Color("start:N", scale=alt.Scale(domain=starts, range=[palette.accent, palette.quiet]), legend=legend)
    shared = {
        "y": alt.Y("task:N", title=None, axis=alt.Axis(grid=False, ticks=False, labelPadding=10), sort=None),
        "yOffset": alt.YOffset("start:N", sort=starts, scale=alt.Scale(paddingOuter=0.5)),
        "color": colour,
    }
    axis, scale = alt.Axis(format=".0%", tickCount=width // 100), alt.Scale(domain=domain, nice=True, zero=False)
    x = alt.X("mean:Q", title="test accuracy", axis=axis, scale=scale)
    base = alt.Chart(_data(rows), width=width, height=alt.Step(13), title=f"from {source}")
    return alt.layer(
        base.mark_rule(strokeWidth=2.5, opacity=0.45).encode(alt.X("low:Q", scale=scale), alt.X2("high:Q"), **shared),
        base.mark_point(filled=True, size=80, opacity=1).encode(x, **shared),
    )


def _data(rows: list[dict[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=rows)


def _styled(chart: Any, palette: Palette) -> Any:
    font = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
    return (
        chart.configure(background="transparent" if palette is PAGE else palette.paper, font=font, padding=4)
        .configure_view(stroke=None)
        .configure_axis(
            domain=False,
            ticks=False,
            gridColor=palette.grid,
            labelColor=palette.quiet,
            titleColor=palette.quiet,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight=400,
            labelPadding=8,
            titlePadding=10,
        )
        .configure_axisX(labelFlush=False, labelOverlap=True)
        .configure_text(fontSize=12)
        .configure_legend(labelColor=palette.ink, labelFontSize=12, offset=12, columnPadding=18)
        .configure_title(color=palette.ink, fontSize=13, fontWeight=600, anchor="start", offset=8)
    )
