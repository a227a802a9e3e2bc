"""The charts of a report of ``bench generate`` as one PNG, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from quantspec.benchmarks.generate_charts import PART_COLORS, Bars, Lines, Stack, acceptance, curve, speeds, steps
from quantspec.benchmarks.generate_rows import Report
from quantspec.benchmarks.plot import why_not
from quantspec.errors import Unavailable

_INK, _SOFT, _GRID = "#1f2328", "#59636e", "#d8dee4"
_COLUMNS = 3


def png(report: Report, title: str = "") -> bytes:
    """The picture. Raises ``Unavailable`` without matplotlib."""
    draw = [
        *(lambda axis, panel=panel, end=end: _bars(axis, panel, end) for panel, end in _common_scale(speeds(report))),
        *([lambda axis, rows=rows: _stacks(axis, rows)] if (rows := steps(report)) else []),
        *(lambda axis, chart=chart: _lines(axis, chart) for chart in (acceptance(report), curve(report)) if chart),
    ]
    return picture(draw, title, most=max((len(panel.bars) for panel in speeds(report)), default=4))


def picture(draw: Sequence[Any], title: str, most: int) -> bytes:
    """One panel for each of ``draw``, which gets its axes; ``most`` bars lie in a panel."""
    reason = why_not()
    if reason is not None:
        raise Unavailable(reason, hint="pip install 'quantspec[plots]', or read the HTML report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, max(len(draw), 1))
    rows = -(-len(draw) // columns)
    figure = Figure(figsize=(5.0 * columns, max(3.0, 1.1 + 0.32 * most) * max(rows, 1)), layout="constrained")
    axes = figure.subplots(max(rows, 1), columns, squeeze=False).flat
    for axis, one in zip(axes, draw, strict=False):
        one(axis)
        axis.tick_params(length=0, labelcolor=_SOFT)
        axis.set_axisbelow(True)
        for spine in ("top", "right", "left"):
            axis.spines[spine].set_visible(False)
    for axis in list(figure.axes)[len(draw) :]:
        axis.set_visible(False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def _common_scale(panels: list[Bars]) -> list[tuple[Bars, float]]:
    end = max((panel.end for panel in panels), default=1.0)
    return [(panel, end) for panel in panels]


def _bars(axis: Any, panel: Bars, end: float) -> None:
    bars = panel.bars[::-1]  # the first stands at the top
    values = [bar.value or 0.0 for bar in bars]
    around = [[max(value - bar.low, 0.0) if bar.value else 0.0 for value, bar in zip(values, bars, strict=True)]]
    around += [[max(bar.high - value, 0.0) if bar.value else 0.0 for value, bar in zip(values, bars, strict=True)]]
    places = range(len(bars))
    axis.barh(places, values, xerr=around, color=[bar.color for bar in bars], ecolor=_INK, height=0.7)
    axis.set_yticks(places, [bar.label for bar in bars])
    for place, bar in zip(places, bars, strict=True):
        said = "no figure" if bar.value is None else f"{bar.value:.3g}"
        axis.text((bar.high if bar.value else 0.0) + 0.015 * end, place, said, va="center", fontsize=8, color=_SOFT)
    axis.set_xlim(0, 1.18 * end)
    axis.set_title(f"Tokens/s, {panel.title}", fontsize=10, loc="left")


def _stacks(axis: Any, rows: Sequence[Stack]) -> None:
    rows = rows[::-1]
    left = [0.0] * len(rows)
    for i, (part, _) in enumerate(rows[0].parts):
        values = [row.parts[i][1] for row in rows]
        axis.barh([row.label for row in rows], values, left=left, color=PART_COLORS[part], height=0.7, label=part)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axis.set_title("Milliseconds of a step by part", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8, loc="best")


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
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axis.set_ylim(0, 1)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(visible=True, which="major", color=_GRID, linewidth=0.7)
    axis.set_xlabel(chart.x_label, fontsize=9, color=_SOFT)
    axis.set_title(chart.title, fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8, loc="best", ncols=1 + (len(chart.lines) > 5))
