"""The same pictures as one HTML page that needs nothing else: SVG drawn here, no scripts, the figures in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from quantspec.benchmarks.plot import COLORS, OTHER, Panel, Series, caption, panels

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 34
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #6b6b70; --line: #e3e3e6; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f2f2f4; --soft: #a2a2a8; --line: #38383c; --paper: #17171a; }
}
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { color: var(--soft); margin: .25rem 0; max-width: 48rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 1rem 0 0; padding: 0; list-style: none; }
.legend svg { display: inline-block; width: 26px; height: 10px; margin-right: .4rem; vertical-align: middle; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; flex: 1 1 24rem; min-width: 0; }
figcaption { color: var(--soft); font-size: .85rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; } .grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.series { fill: none; stroke-width: 2; stroke-linejoin: round; } .dot { stroke: var(--paper); stroke-width: 1; }
.bound { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th.backend { text-align: center; color: var(--ink); }
code { font-size: .85rem; overflow-wrap: anywhere; }
"""


def html(report: Mapping[str, Any]) -> str:
    """The page of a report of ``bench kernels``."""
    drawn = panels(report)
    command = f"<p><code>{escape(report.get('command', ''))}</code> {escape(report.get('date', ''))}</p>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Cost curves v(n)</title>\n<style>{_STYLE}</style></head>\n<body>\n<h1>What n rows cost</h1>\n"
        f"<p>{escape(caption(report))}.</p>\n{command}\n"
        f"<p>{_EXPLAINED}</p>\n{_legend(drawn)}\n{''.join(_section(panel) for panel in drawn)}</body></html>\n"
    )


_EXPLAINED = (
    "Time of one product of n rows with a weight K x N, and v(n) = t(n) / t(1). The bound is the longer of reading the "
    "packed weights at the measured bandwidth and of doing n K N multiply-adds at the rate of the int8 kernel&rsquo;s "
    "inner loop. Both axes are logarithmic."
)


def _legend(drawn: Sequence[Panel]) -> str:
    names = dict.fromkeys(one.name for panel in drawn for one in panel.series)
    line = '<svg viewBox="0 0 26 10"><path {} d="M0 5H26"/></svg>'
    items = [(line.format(f'class="series" stroke="{COLORS.get(name, OTHER)}"'), name) for name in names]
    if any(panel.bound for panel in drawn):
        items.append((line.format('class="bound"'), "bound of int8"))
    return f'<ul class="legend">{"".join(f"<li>{mark}{escape(name)}</li>" for mark, name in items)}</ul>'


def _section(panel: Panel) -> str:
    speeds = [Series(one.name, one.v()) for one in panel.series]
    bound_v = Series("bound", panel.bound.v()) if panel.bound else None
    charts = _chart("ms over rows n", panel.series, panel.bound) + _chart("v(n) over rows n", speeds, bound_v)
    return f'<h2>{escape(panel.title)}</h2>\n<div class="charts">{charts}</div>\n{_table(panel)}\n'


def _chart(title: str, series: Sequence[Series], bound: Series | None) -> str:
    lines = [*series, *([bound] if bound else [])]
    scale = _Scale([n for one in lines for n in one.ms], [value for one in lines for value in one.ms.values()])
    parts = [scale.grid()]
    if bound:
        parts.append(f'<path class="bound" d="{scale.path(bound)}"/>')
    for one in series:
        color = COLORS.get(one.name, OTHER)
        parts.append(f'<path class="series" stroke="{color}" d="{scale.path(one)}"/>')
        for n, value in sorted(one.ms.items()):
            x, y = scale.place(n, value)
            tip = f"<title>{escape(one.name)}, n = {n}: {_figure(value)}</title>"
            parts.append(f'<circle class="dot" fill="{color}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>')
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{drawn}</figure>"


class _Scale:
    """Logarithmic axes around all points of a chart."""

    def __init__(self, widths: Sequence[int], values: Sequence[float]) -> None:
        self._most = max(2, *widths)
        self._low = math.floor(math.log10(min(values)) * 3) / 3 - 0.05  # lines do not lie on the axis
        self._high = max(math.ceil(math.log10(max(values)) * 3) / 3, self._low + 1 / 3)

    def place(self, n: int, value: float) -> tuple[float, float]:
        across = math.log(n) / math.log(self._most)
        up = (math.log10(value) - self._low) / (self._high - self._low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def path(self, series: Series) -> str:
        points = (self.place(n, value) for n, value in sorted(series.ms.items()))
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)

    def grid(self) -> str:
        parts = []
        for value in self._ticks():
            _, y = self.place(1, value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        base = HEIGHT - BOTTOM
        parts.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
        n = 1
        while n <= self._most:
            x, _ = self.place(n, 1.0)
            parts.append(f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{n}</text>')
            n *= 2
        return "".join(parts)

    def _ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten; powers of ten alone where those would be many."""
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        steps = (1, 2, 5) if self._high - self._low <= 2 else (1,)
        ticks = (step * 10.0**power for power in powers for step in steps)
        return [tick for tick in ticks if self._low - 1e-9 <= math.log10(tick) <= self._high + 1e-9]


def _table(panel: Panel) -> str:
    heads = "".join(f'<th class="backend" colspan="2">{escape(one.name)}</th>' for one in panel.series)
    bound_head = '<th rowspan="2">bound, ms</th>' if panel.bound else ""
    rows = []
    for n in sorted({n for one in panel.series for n in one.ms}):
        cells = [str(n), *([_figure(panel.bound.ms[n])] if panel.bound else [])]
        for one in panel.series:
            cells += [_figure(one.ms[n]), f"{one.v()[n]:.2f}"]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    kinds = "<th>ms</th><th>v</th>" * len(panel.series)
    return (
        f'<div class="scroll"><table><thead><tr><th rowspan="2">n</th>{bound_head}{heads}</tr><tr>{kinds}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figure(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
