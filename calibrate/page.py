"""Reports as HTML pages that need nothing else: no scripts, no network, pictures as SVG; made to be printed too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

INK, SOFT, LINE, BLUE, GRAY = "#1f2328", "#59636e", "#d8dee4", "#2f6fb0", "#b4bdc7"
WIDTH, HEIGHT = 460, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 36

_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem; background: #fff; color: {INK};
  font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0; }} h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .5rem; }}
p {{ margin: .25rem 0 .75rem; max-width: 46rem; }} p, figcaption {{ color: {SOFT}; }}
.tiles {{ display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0 0; padding: 0; list-style: none; }}
.tiles li {{ flex: 1 1 9.5rem; border: 1px solid {LINE}; border-radius: 6px; padding: .6rem .8rem; }}
.tiles span {{ display: block; color: {SOFT}; font-size: .82rem; }} .tiles b {{ font-size: 1.2rem; font-weight: 600; }}
.charts {{ display: flex; flex-wrap: wrap; gap: 1.25rem; }} figure {{ margin: 0; flex: 1 1 24rem; min-width: 0; }}
figcaption {{ font-size: .88rem; margin-bottom: .2rem; }} svg {{ width: 100%; height: auto; display: block; }}
svg text {{ fill: {SOFT}; font: 11px system-ui, sans-serif; }} .wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }}
th, td {{ padding: .22rem .7rem .22rem 0; text-align: right; border-bottom: 1px solid {LINE}; vertical-align: top; }}
th, td {{ white-space: nowrap; }} th {{ color: {SOFT}; font-weight: 500; }}
.text {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 11px; }} h2 {{ break-after: avoid; margin-top: 1.2rem; }}
  figure, tr, .tiles {{ break-inside: avoid; }} thead {{ display: table-header-group; }}
  .charts {{ flex-wrap: nowrap; }} .charts figure {{ flex: 1 1 0; }}
  * {{ -webkit-print-color-adjust: exact; print-color-adjust: exact; }}
  @page {{ margin: 16mm; }}
}}
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page; ``parts`` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts)


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def tiles(figures: Mapping[str, str]) -> str:
    """The figures that matter most, by name."""
    items = (f"<li><span>{escape(name)}</span><b>{escape(value)}</b></li>" for name, value in figures.items())
    return f'<ul class="tiles">{"".join(items)}</ul>'


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], text: Sequence[int] = (0,)) -> str:
    """``text`` are the columns that hold words, and so stand at the left."""

    def cells(values: Sequence[object], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if i in text else ''}>{escape(str(value))}</{tag}>" for i, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells(columns, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(values: Mapping[str, object]) -> str:
    """Names and what they are; those without a value (None, or empty) are left out."""
    return table(("", ""), ((name, value) for name, value in values.items() if value not in (None, "", ())), (0, 1))


def figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


def svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def steps(label: str, ranges: Sequence[tuple[int, int, float]], percent: bool = False, zero: bool = False) -> str:
    """A chart of values over ranges of tokens ``(start, end, value)``: a flat line for each. ``zero``: the axis begins
    there."""
    values = [value for _, _, value in ranges]
    low, high = (0.0 if zero else min(values)), max(values)
    unit = _tick(max(high - low, abs(high) * 1e-3, 1e-9) / 4)
    low, high = floor(low / unit) * unit, ceil(high / unit + 1e-9) * unit
    if percent and high > 1:  # of which there are none
        low, high = min(low, 1 - unit), 1.0
    last = ranges[-1][1]

    def x(token: float) -> float:
        return _LEFT + token / last * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for i in range(round((high - low) / unit) + 1):
        tick = low + i * unit
        said = f"{tick * 100:.4g}%" if percent else f"{tick:.4g}"
        parts.append(f'<path stroke="{LINE}" d="M{_LEFT} {y(tick):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{said}</text>')
    for token in dict.fromkeys((0, last // 4, last // 2, 3 * last // 4, last)):
        parts.append(f'<text x="{x(token):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{token}</text>')
    parts.append(f'<text x="{x(last / 2):.1f}" y="{HEIGHT - 4}" text-anchor="middle">tokens of context</text>')
    path = "".join(
        f"{'L' if i else 'M'}{x(start):.1f} {y(value):.1f}H{x(end):.1f}" for i, (start, end, value) in enumerate(ranges)
    )
    parts.append(f'<path fill="none" stroke="{BLUE}" stroke-width="2" stroke-linejoin="round" d="{path}"/>')
    for start, end, value in ranges:
        said = f"{value:.2%}" if percent else f"{value:.4g}"
        tip = f"<title>{start} to {end - 1} tokens of context: {said}</title>"
        parts.append(
            f'<rect x="{x(start):.1f}" y="{_TOP}" width="{x(end) - x(start):.1f}" height="{HEIGHT - _TOP - _BOTTOM}" '
            f'fill="transparent">{tip}</rect>'
        )
    return svg(WIDTH, HEIGHT, label, parts)


def _tick(least: float) -> float:
    """The smallest of 1, 2 and 5 times powers of ten that is not below ``least``."""
    power = 10.0 ** floor(log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


@dataclass(frozen=True)
class Cell:
    """A place of a heat map; ``tip`` is shown under the pointer, and a ``ring`` marks it."""

    value: float
    tip: str
    ring: bool = False


def heat_map(label: str, rows: Sequence[str], cells: Mapping[tuple[int, int], Cell]) -> str:
    """``cells`` by (decoder layer, row), shaded by the logarithm of their values, with a scale below."""
    depth = 1 + max(layer for layer, _ in cells)
    logs = {place: log10(max(cell.value, 1e-12)) for place, cell in cells.items()}
    low = min(logs.values())
    span = max(max(logs.values()) - low, 1e-6)
    left, height, width = 96, 20, max(7.0, min(34.0, 780 / depth))
    parts = [
        f'<text x="{left - 8}" y="{height * row + 14}" text-anchor="end">{escape(name)}</text>'
        for row, name in enumerate(rows)
    ]
    for (layer, row), cell in sorted(cells.items()):
        x, y, color = left + layer * width, height * row, shade((logs[layer, row] - low) / span)
        box = f'x="{x:.1f}" y="{y}" width="{width - 1:.1f}" height="{height - 1}" fill="{color}"'
        parts.append(f"<rect {box}><title>{escape(cell.tip)}</title></rect>")
        if cell.ring:
            center = f'cx="{x + (width - 1) / 2:.1f}" cy="{y + (height - 1) / 2:.1f}"'
            parts.append(f'<circle {center} r="3" fill="#fff" stroke="{BLUE}" stroke-width="2"/>')
    foot = height * len(rows) + 14
    for layer in range(0, depth, max(1, round(40 / width))):
        parts.append(f'<text x="{left + (layer + 0.5) * width:.1f}" y="{foot}" text-anchor="middle">{layer}</text>')
    parts += _scale(left, foot + 16, 10**low, 10 ** (low + span))
    size = max(left + depth * width, 420)
    return f'<div style="max-width:{size * 1.1:.0f}px">{svg(size, foot + 48, label, parts)}</div>'


def _scale(x: float, y: float, low: float, high: float) -> Iterator[str]:
    steps = 24
    for i in range(steps):
        yield f'<rect x="{x + 8 * i}" y="{y}" width="8.5" height="10" fill="{shade(i / (steps - 1))}"/>'
    yield f'<text x="{x}" y="{y + 23}" text-anchor="start">{low:.1e}</text>'
    yield f'<text x="{x + 8 * steps}" y="{y + 23}" text-anchor="end">{high:.1e}</text>'


def shade(share: float) -> str:
    """A colour from pale (0) to dark (1), readable in black and white too."""
    light, dark = (243, 247, 251), (122, 20, 40)
    middle = (240, 170, 90)
    share = min(max(share, 0.0), 1.0)
    one, other, at = (light, middle, share * 2) if share < 0.5 else (middle, dark, share * 2 - 1)
    return "#" + "".join(f"{round(a + (b - a) * at):02x}" for a, b in zip(one, other, strict=True))


def count_bytes(count: float) -> str:
    """Bytes in the unit that suits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:g} bytes"
