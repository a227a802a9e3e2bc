"""Pictures of the cost curves: milliseconds against the bound, and v(n), a panel for each shape. PNG, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from quantspec.errors import Unavailable

COLORS = {
    "cpu-int8": "#2a78d6",
    "cpu-fp32": "#1baf7a",
    "torch-fp32": "#eb6834",
    "torch-bf16": "#b98900",
    "torch-int4": "#8a5cd0",
    "cuda": "#2a78d6",
    "triton": "#1baf7a",
    "gptqmodel-marlin": "#eb6834",
    "bnb-nf4": "#8a5cd0",
    "model": "#2a78d6",
}
"""Of the backends, wherever they are drawn; apart for colour-blind readers, and on white as on black."""
OTHER = "#888888"


@dataclass(frozen=True)
class Series:
    """One line: milliseconds for each number of rows."""

    name: str
    ms: Mapping[int, float]

    def v(self) -> dict[int, float]:
        return {n: ms / self.ms[1] for n, ms in self.ms.items()}


@dataclass(frozen=True)
class Panel:
    """One shape: its backends, and the bound of int8 (None where it was not measured)."""

    title: str
    series: tuple[Series, ...]
    bound: Series | None


def panels(report: Mapping[str, Any]) -> list[Panel]:
    """What there is to draw in a report of ``bench kernels``."""
    shapes = list(dict.fromkeys((row["K"], row["N"]) for row in report["rows"]))
    return [_panel(k, n, [row for row in report["rows"] if (row["K"], row["N"]) == (k, n)]) for k, n in shapes]


def _panel(k: int, n: int, rows: list[dict[str, Any]]) -> Panel:
    names = dict.fromkeys(row["backend"] for row in rows)
    series = tuple(Series(name, {row["n"]: row["ms"] for row in rows if row["backend"] == name}) for name in names)
    bound = {row["n"]: row["bound_ms"] for row in rows if row["mode"] == "int8"}
    return Panel(f"K = {k}, N = {n}", series, Series("bound", bound) if bound else None)


def caption(report: Mapping[str, Any]) -> str:
    """Where and how the figures came about, for a line below them."""
    tile = f", inner loop {report['tile_gmacs']:.0f} GMAC/s" if report.get("tile_gmacs") else ""
    place = report.get("device_name") or f"{report['threads']} threads"
    if report.get("processor") and not report.get("device_name"):
        place = f"{report['processor']}, {place}"
    return (
        f"{place}, groups of {report['group_size']}; read bandwidth "
        f"{report['read_bandwidth_gbps']:.1f} GB/s{tile}; least time of {report['rounds']} rounds"
    )


def why_not() -> str | None:
    """Why no PNG can be drawn here."""
    return None if find_spec("matplotlib") else "a PNG needs matplotlib, which is not installed"


def png(report: Mapping[str, Any]) -> bytes:
    """The picture of a report. Raises ``Unavailable`` without matplotlib."""
    reason = why_not()
    if reason is not None:
        raise Unavailable(reason, hint="pip install 'quantspec[plots]', or write --html")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = panels(report)
    figure = Figure(figsize=(max(7.0, 5.2 * len(drawn)), 8.0), layout="constrained")
    axes = figure.subplots(2, len(drawn), squeeze=False, sharex=True, sharey="row")
    for column, panel in enumerate(drawn):
        top, bottom = axes[0][column], axes[1][column]
        for one in panel.series:
            style = {"color": COLORS.get(one.name, OTHER), "marker": "o", "markersize": 4, "linewidth": 2}
            top.plot(*_points(one.ms), label=one.name, **style)
            bottom.plot(*_points(one.v()), **style)
        if panel.bound:
            style = {"color": "#555555", "linestyle": (0, (4, 3)), "linewidth": 1.5}
            top.plot(*_points(panel.bound.ms), label="bound of int8", **style)
            bottom.plot(*_points(panel.bound.v()), **style)
        top.set_title(panel.title, fontsize=12, loc="left")
        bottom.set_xlabel("rows n")
        for one_axis in (top, bottom):
            _style(one_axis, sorted({n for one in panel.series for n in one.ms}))
    axes[0][0].set_ylabel("ms")
    axes[1][0].set_ylabel("v(n) = t(n) / t(1)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
    figure.supxlabel(caption(report), fontsize=8.5, color="#555555", x=0.01, ha="left")
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def _points(values: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return sorted(values), [values[n] for n in sorted(values)]


def _style(axis: Any, widths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = [n for n in widths if n & (n - 1) == 0]
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
    axis.tick_params(which="both", length=0, labelcolor="#555555")
    axis.set_axisbelow(True)
    for spine in ("top", "right", "left"):
        axis.spines[spine].set_visible(False)
