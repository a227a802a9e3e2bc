"""A report of ``bench generate`` as one HTML page that needs nothing else: no scripts, no network, pictures as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from quantspec.benchmarks import generate_svg
from quantspec.benchmarks.generate_charts import Bars, acceptance, curve, label, speeds, steps
from quantspec.benchmarks.generate_rows import ALL, PLAIN, Report, Row
from quantspec.benchmarks.generate_table import COLUMNS, cells, closing, title
from quantspec.calibrate.page import document, figure, paragraph, section, table, tiles


def html(report: Report) -> str:
    """The whole page."""
    drawn = (section("Speed by task and method", paragraph(_BARS), charts(speeds(report))), *_time(report))
    return document("Generation, side by side", (*_head(report), *drawn, *_tables(report), *_foot(report)))


_BARS = "Tokens/s, prefills included; the lines are 95% intervals."


def charts(panels: Sequence[Bars]) -> str:
    """Panels over one scale."""
    end = max((panel.end for panel in panels), default=0.0)
    return side_by_side([figure(panel.title, generate_svg.bars(panel, end)) for panel in panels])


def side_by_side(figures: Sequence[str]) -> str:
    """Two in a line; a last one alone does not grow to the whole width."""
    return f'<div class="charts">{"".join(figures)}{"<figure></figure>" * (len(figures) % 2)}</div>'


def best_row(report: Report) -> Row | None:
    """Of our own methods' rows over all tasks, the fastest."""
    rows = [row for row in report.rows if row.task == ALL and row.kind == "ours" and row.tokens_per_second]
    return max(rows, key=lambda row: row.tokens_per_second or 0.0, default=None)


def _head(report: Report) -> Iterator[str]:
    known = report.circumstances
    place = " ".join(str(known[key]) for key in ("processor", "date") if known.get(key))
    yield f"<p><code>{escape(str(known.get('command', '')))}</code> {escape(place)}</p>"
    plain, best, shown = report.row(PLAIN), best_row(report), {"prompts": str(report.prompts)}
    if plain is not None and plain.tokens_per_second:
        shown["plain decoding, tokens/s"] = f"{plain.tokens_per_second:.1f}"
    if best is not None and best.tokens_per_second:
        shown |= {"fastest method": label(best.method), "its tokens/s": f"{best.tokens_per_second:.1f}"}
    if best is not None and best.speedup:
        shown["over plain"] = f"{best.speedup:.2f}x"
    yield tiles(shown)


def _time(report: Report) -> Iterator[str]:
    pictures = []
    if stacked := steps(report):
        caption = "Milliseconds of a step by part"
        pictures.append(figure(caption, generate_svg.stacks(caption, stacked)))
    for lines in (acceptance(report), curve(report)):
        if lines is not None:
            pictures.append(figure(lines.title, generate_svg.lines(lines)))
    if pictures:
        yield section("Where the time goes", side_by_side(pictures))


def _tables(report: Report) -> Iterator[str]:
    for task in report.tasks:
        rows = [cells(row) for row in report.rows if row.task == task]
        yield section(title(report, task), table(COLUMNS, rows, (0, len(COLUMNS) - 1)))


def _foot(report: Report) -> Iterator[str]:
    yield section("How it was measured", *map(paragraph, closing(report)))
