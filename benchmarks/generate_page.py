"""A report of ``bench generate`` as one HTML page that needs nothing else: no scripts, no network, pictures as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from quantspec.benchmarks import generate_svg
from quantspec.benchmarks.generate_charts import Bars, acceptance, curve, label, speeds, steps, task_label
from quantspec.benchmarks.generate_rows import ALL, PLAIN, Report, Row
from quantspec.calibrate.page import count_bytes, document, facts, figure, paragraph, section, table, tiles

COLUMNS = (
    "method", "tokens/s", "to plain", "acceptance length", "equal to plain", "first token, ms", "peak memory",
)  # fmt: skip
NO_FIGURE = "–"


def html(report: Report, title: str = "Generation, side by side") -> str:
    """The whole page."""
    return document(title, (*_head(report), *body(report), *_foot(report)))


def body(report: Report) -> Iterator[str]:
    """Charts and tables of one report, as parts of a page."""
    yield section("Speed by task and method", paragraph("Tokens/s, prefills included; lines are 95% intervals."))
    yield charts(speeds(report))
    pictures = []
    if stacked := steps(report):
        title = "Milliseconds of a step by part"
        pictures.append(figure(title, generate_svg.stacks(title, stacked)))
    for lines in (acceptance(report), curve(report)):
        if lines is not None:
            note = "; dashed: v(n) = n" if lines.guide else ""
            pictures.append(figure(lines.title + note, generate_svg.lines(lines)))
    if pictures:
        yield section("Where the time goes", side_by_side(pictures))
    for task in (ALL, *(task for task in report.tasks if task != ALL)):
        rows = [row for row in (report.row(method, task) for method in report.methods) if row is not None]
        if rows:
            yield section(task_label(task).capitalize(), table(COLUMNS, map(cells, rows), (0, 4)))


def charts(panels: list[Bars]) -> str:
    """Panels over one scale."""
    end = max((panel.end for panel in panels), default=0.0)
    return side_by_side([figure(panel.title, generate_svg.bars(panel, end)) for panel in panels])


def side_by_side(figures: Sequence[str]) -> str:
    """Two in a line; a last one alone does not grow to the whole width."""
    return f'<div class="charts">{"".join(figures)}{"<figure></figure>" * (len(figures) % 2)}</div>'


def cells(row: Row) -> list[str]:
    """One line of a table; a method without figures says why."""
    if row.error:
        return [label(row.method), *[""] * 3, row.error, "", ""]
    first, memory = row.time_to_first_token, row.peak_memory_bytes
    return [
        label(row.method),
        _with_interval(row, "tokens_per_second"),
        _with_interval(row, "speedup", "x"),
        _with_interval(row, "acceptance_length"),
        equality(row),
        NO_FIGURE if first is None else f"{1000 * first:.0f}",
        NO_FIGURE if memory is None else count_bytes(memory),
    ]


def equality(row: Row) -> str:
    """Whether the texts are those of plain decoding, in words."""
    if row.equal_to_plain is None:
        return NO_FIGURE
    if row.equal_to_plain:
        return "yes"
    return "no" if row.equal_share is None else f"no ({row.equal_share:.0%} of texts)"


def _with_interval(row: Row, name: str, unit: str = "") -> str:
    value = getattr(row, name)
    if value is None:
        return NO_FIGURE
    digits = 1 if value >= 10 else 2
    around = row.intervals.get(name)
    said = "" if around is None else f" ({around[0]:.{digits}f}-{around[1]:.{digits}f})"
    return f"{value:.{digits}f}{unit}{said}"


def _head(report: Report) -> Iterator[str]:
    known = report.circumstances
    place = " ".join(str(known[key]) for key in ("processor", "date") if known.get(key))
    yield f"<p><code>{escape(str(known.get('command', '')))}</code> {escape(place)}</p>"
    if not report.complete:
        yield paragraph(f"The run was stopped after {report.prompts} prompts.")
    if report.noise is not None and report.noise.refusal:
        yield paragraph(report.noise.refusal)
    plain, best = report.row(PLAIN), best_row(report)
    shown = {"prompts": str(report.prompts)}
    if plain is not None and plain.tokens_per_second:
        shown["plain decoding, tokens/s"] = f"{plain.tokens_per_second:.1f}"
    if best is not None and best.tokens_per_second:
        shown["best method"] = label(best.method)
        shown["its tokens/s"] = f"{best.tokens_per_second:.1f}"
    if best is not None and best.speedup:
        shown["over plain"] = f"{best.speedup:.2f}x"
    yield tiles(shown)


def best_row(report: Report) -> Row | None:
    """Of our own methods' rows over all tasks, the fastest."""
    rows = [row for row in report.rows if row.task == ALL and row.kind == "ours" and row.tokens_per_second]
    return max(rows, key=lambda row: row.tokens_per_second or 0.0, default=None)


def _foot(report: Report) -> Iterator[str]:
    yield section("Who took part")
    yield facts({label(name): _said(about) for name, about in report.contenders.items()})
    yield section("How it was measured", facts(dict(report.settings)))
    if report.noise is not None:
        yield paragraph(
            f"The same plain decoding before each round varied by {report.noise.spread:.1%} (from the 10th to the 90th "
            f"percentile); speedups are given up to {report.noise.limit:.0%}."
        )
    if report.degenerate_prompts:
        yield paragraph(f"{len(report.degenerate_prompts)} prompts whose text loops are left out of the figures.")
    if report.left_out:
        yield paragraph(f"Left out: {'; '.join(report.left_out)}.")


def _said(about: object) -> str:
    if not isinstance(about, dict):
        return str(about)
    return ", ".join(f"{key} {value}" for key, value in about.items() if value not in (None, "", {}, ()))
