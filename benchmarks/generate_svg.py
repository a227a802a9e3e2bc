"""The charts of ``generate_charts`` as SVG, for pages that need nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from quantspec.benchmarks.generate_charts import PART_COLORS, Bars, Lines, Stack
from quantspec.calibrate.page import GRAY, INK, LINE, svg

_WIDTH, _ROW, _VALUES = 460, 22, 52
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 260, 40, 12, 12, 38
_LETTER = 6.0
"""Width of one at the labels' size, about."""


def bars(panel: Bars, end: float) -> str:
    """A bar a line with its interval; ``end`` is the value at the right edge, common to panels that are compared."""
    left = _label_width(bar.label for bar in panel.bars)
    scale = (_WIDTH - left - _VALUES) / (end or 1.0)
    parts = []
    for i, bar in enumerate(panel.bars):
        y = i * _ROW
        parts.append(_label(left, y, bar.label))
        if bar.value is None:
            parts.append(_text(left, y + 15, "no figure"))
            continue
        tip = f"<title>{escape(bar.label)}: {bar.value:.4g} ({bar.low:.4g} to {bar.high:.4g})</title>"
        box = f'x="{left}" y="{y + 3}" width="{scale * bar.value:.1f}" height="16" fill="{bar.color}"'
        right = left + scale * bar.high
        parts += [
            f"<rect {box}>{tip}</rect>",
            f'<path stroke="{INK}" d="M{left + scale * bar.low:.1f} {y + 11}H{right:.1f}"/>',
            _text(right + 6, y + 15, f"{bar.value:.3g}"),
        ]
    return svg(_WIDTH, _ROW * len(panel.bars) + 4, panel.title, parts)


def stacks(label: str, rows: Sequence[Stack]) -> str:
    """A stacked bar a line, with a legend above them."""
    left = _label_width(row.label for row in rows)
    scale = (_WIDTH - left - _VALUES) / (max(row.total for row in rows) or 1.0)
    parts = list(_legend((name, color) for name, color in PART_COLORS.items()))
    for i, row in enumerate(rows, 1):
        x, y = float(left), i * _ROW
        parts.append(_label(left, y, row.label))
        for name, value in row.parts:
            tip = f"<title>{escape(row.label)}, {name}: {value:.3g} ms</title>"
            box = f'x="{x:.1f}" y="{y + 3}" width="{scale * value:.1f}" height="16" fill="{PART_COLORS[name]}"'
            parts.append(f"<rect {box}>{tip}</rect>")
            x += scale * value
        parts.append(_text(x + 6, y + 15, f"{row.total:.3g}"))
    return svg(_WIDTH, _ROW * (len(rows) + 1) + 4, label, parts)


def _label_width(labels: Iterable[str]) -> int:
    """Room for the longest, up to a half of the picture."""
    return min(_WIDTH // 2, max(90, 12 + round(_LETTER * max(map(len, labels), default=0))))


def _label(right: int, y: float, text: str) -> str:
    """At the left of a bar, cut where it is too long."""
    most = int((right - 12) / _LETTER)
    return _text(right - 8, y + 15, text if len(text) <= most else f"{text[: most - 1]}…", "end")


def lines(chart: Lines) -> str:
    """Lines with points, each named in a legend below."""
    axes = _Axes(chart)
    parts = axes.grid()
    if chart.guide:
        parts.append(f'<path fill="none" stroke="{GRAY}" stroke-dasharray="5 4" d="{axes.guide()}"/>')
    for line in chart.lines:
        parts.append(f'<path fill="none" stroke="{line.color}" stroke-width="2" d="{axes.path(line.points)}"/>')
        for x, y in line.points:
            across, up = axes.place(x, y)
            tip = f"<title>{escape(line.name)}, {chart.x_label} {x:g}: {y:.3g}</title>"
            parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="3" fill="{line.color}">{tip}</circle>')
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 4, chart.x_label, "middle"))
    rows = list(_legend(((line.name, line.color) for line in chart.lines), _HEIGHT, columns=2))
    height = _HEIGHT + _ROW * math.ceil(len(chart.lines) / 2) + 4
    return svg(_WIDTH, height, chart.title, [*parts, *rows])


class _Axes:
    """Where values lie. Both logarithmic, or x from 1 and y from 0 to 1."""

    def __init__(self, chart: Lines) -> None:
        self._log = chart.log
        xs, ys = zip(*(point for line in chart.lines for point in line.points), strict=True)
        self._x_end = max(2.0, *xs)
        self._low = min(0.9, *ys) if chart.log else 0.0
        self._high = 1.08 * max(2.0, *ys) if chart.log else 1.0

    def place(self, x: float, y: float) -> tuple[float, float]:
        if self._log:
            across = math.log(x) / math.log(self._x_end)
            up = math.log(y / self._low) / math.log(self._high / self._low)
        else:
            across, up = (x - 1) / (self._x_end - 1), y
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        return "M" + "L".join("{:.1f} {:.1f}".format(*self.place(x, y)) for x, y in points)

    def guide(self) -> str:
        """Along y = x to where the picture ends."""
        end = min(self._x_end, self._high)
        return self.path(((1.0, 1.0), (end, end)))

    def grid(self) -> list[str]:
        parts = []
        doubles = [2.0**k for k in range(20)]
        for y in [v for v in doubles if v <= self._high] if self._log else [0.0, 0.25, 0.5, 0.75, 1.0]:
            _, up = self.place(1.0, y)
            parts.append(f'<path stroke="{LINE}" d="M{_LEFT} {up:.1f}H{_WIDTH - _RIGHT}"/>')
            parts.append(_text(_LEFT - 6, up + 4, f"{y:g}", "end"))
        step = math.ceil(self._x_end / 16)
        ticks = [v for v in doubles if v <= self._x_end] if self._log else range(1, int(self._x_end) + 1, step)
        parts += [_text(self.place(x, 1.0)[0], _HEIGHT - _BOTTOM + 16, f"{x:g}", "middle") for x in ticks]
        return parts


def _legend(names: Iterable[tuple[str, str]], top: float = 0.0, columns: int = 4) -> Iterable[str]:
    width = (_WIDTH - _LEFT) / columns
    for i, (name, color) in enumerate(names):
        x, y = _LEFT + i % columns * width, top + i // columns * _ROW
        yield f'<rect x="{x:.1f}" y="{y + 5}" width="10" height="10" fill="{color}"/>'
        yield _text(x + 15, y + 14, name)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
