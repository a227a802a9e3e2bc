"""The charts of a report of ``bench generate`` as one PNG, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from math import log2
from textwrap import fill
from typing import Any

from quantspec.benchmarks.generate_charts import PART_COLORS, Bars, Lines, Stack, acceptance, curve, speeds, steps
from quantspec.benchmarks.generate_rows import Report
from quantspec.benchmarks.plot import why_not
from quantspec.errors import Unavailable

_INK, _SOFT, _GRID = "#1f2328", "#59636e", "#d8dee4"
_COLUMNS, _LETTERS = 3, 24


def png(report: Report) -> bytes:
    """The picture. Raises ``Unavailable`` without matplotlib."""
    lines = [chart for chart in (acceptance(report), curve(report)) if chart is not None]
    stacks = {"Milliseconds of a step by part": rows} if (rows := steps(report)) else {}
    return picture(speeds(report), stacks, lines)


def picture(panels: Sequence[Bars], stacks: Mapping[str, Sequence[Stack]], lines: Sequence[Lines]) -> bytes:
    """One panel for each of these, stacks by their titles, bars over one scale. Raises as ``png``."""
    reason = why_not()
    if reason is not None:
        raise Unavailable(reason, hint="pip install 'quantspec[plots]', or read the HTML report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(panels) + len(stacks) + len(lines)  # none where a run was stopped before its first figure
    columns, most = max(1, min(_COLUMNS, count)), max((len(panel.bars) for panel in panels), default=0)
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(5.0 * columns, max(3.2, 1.1 + 0.32 * most) * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    end = max((panel.end for panel in panels), default=0.0) or 1.0
    for axis, panel in zip(axes, panels, strict=False):
        _bars(axis, panel, end)
    for axis, (title, stacked) in zip(axes[len(panels) :], stacks.items(), strict=False):
        _stacks(axis, title, stacked)
    for axis, chart in zip(axes[len(panels) + len(stacks) :], lines, strict=False):
        _lines(axis, chart)
    for number, axis in enumerate(axes):
        axis.tick_params(length=0, labelcolor=_SOFT)
        axis.set_axisbelow(True)
        axis.set_visible(number < count)
        for spine in ("top", "right", "left"):
            axis.spines[spine].set_visible(False)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def _bars(axis: Any, panel: Bars, end: float) -> None:
    bars = panel.bars[::-1]  # the first stands at the top
    values = [bar.value or 0.0 for bar in bars]
    around = [[max(value - bar.low, 0.0) if bar.value else 0.0 for value, bar in zip(values, bars, strict=True)]]
    around += [[max(bar.high - value, 0.0) if bar.value else 0.0 for value, bar in zip(values, bars, strict=True)]]
    places = range(len(bars))
    axis.barh(places, values, xerr=around, color=[bar.color for bar in bars], ecolor=_INK, height=0.7)
    axis.set_yticks(places, [fill(bar.label, _LETTERS) for bar in bars])
    for place, bar in zip(places, bars, strict=True):
        said = "no figure" if bar.value is None else f"{bar.value:.3g}"
        axis.text((bar.high if bar.value else 0.0) + 0.015 * end, place, said, va="center", fontsize=8, color=_SOFT)
    axis.set_xlim(0, 1.18 * end)
    axis.set_title(f"Tokens/s, {panel.title}", fontsize=10, loc="left")


def _stacks(axis: Any, title: str, rows: Sequence[Stack]) -> None:
    rows = rows[::-1]
    left = [0.0] * len(rows)
    for i, (part, _) in enumerate(rows[0].parts):
        values = [row.parts[i][1] for row in rows]
        axis.barh(range(len(rows)), values, left=left, color=PART_COLORS[part], height=0.7, label=part)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axis.set_yticks(range(len(rows)), [fill(row.label, _LETTERS) for row in rows])
    for place, row in enumerate(rows):
        axis.text(1.01 * row.total, place, f"{row.total:.3g}", va="center", fontsize=8, color=_SOFT)
    axis.set_title(title, fontsize=10, loc="left")
    _legend(axis, len(PART_COLORS))


def _lines(axis: Any, chart: Lines) -> None:
    for line in chart.lines:
        xs, ys = zip(*line.points, strict=True)
        axis.plot(xs, ys, color=line.color, marker="o", markersize=3.5, linewidth=1.8, label=line.name)
    if chart.guide:
        end = max(y for line in chart.lines for _, y in line.points)
        axis.plot([1, max(end, 2)], [1, max(end, 2)], color="#b4bdc7", linestyle=(0, (4, 3)))
    if chart.log:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        ticks = [2**k for k in range(int(log2(max(x for line in chart.lines for x, _ in line.points))) + 1)]
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axis.set_ylim(0, 1)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(visible=True, which="major", color=_GRID, linewidth=0.7)
    axis.set_xlabel(chart.x_label, fontsize=9, color=_SOFT)
    axis.set_title(chart.title, fontsize=10, loc="left")
    _legend(axis, 2)


def _legend(axis: Any, columns: int) -> None:
    """Below the panel, where nothing is drawn."""
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
    axis.legend(frameon=False, fontsize=8, ncols=columns, **below)
