"""What ``bench paper`` found: a table like SpecMQuant's figures, as cells, Markdown, HTML and PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from quantspec.benchmarks import generate_plot, generate_svg
from quantspec.benchmarks.generate_charts import (
    OURS_COLOR,
    PEER_COLOR,
    PLAIN_COLOR,
    Bar,
    Bars,
    Lines,
    Stack,
    acceptance_of,
    curves,
    steps,
)
from quantspec.benchmarks.generate_page import charts, side_by_side
from quantspec.benchmarks.generate_rows import PLAIN, Row
from quantspec.benchmarks.generate_table import COLUMNS as ALL_COLUMNS
from quantspec.benchmarks.generate_table import cells as all_cells
from quantspec.benchmarks.generate_table import closing, failures, markdown_table
from quantspec.benchmarks.paper import Precision
from quantspec.benchmarks.paper_config import in_words
from quantspec.calibrate.page import document, figure, paragraph, section, table

COLUMNS = (
    "target", "plain, tokens/s", "EAGLE-2 tree", "to plain", "accepted", "cascade", "to plain", "accepted",
    "cascade to tree", "equal",
)  # fmt: skip
_NO_FIGURE = "-"
TITLE = "EAGLE-2's tree and a cascade by the target's precision"


def cells(found: Precision) -> list[str]:
    """One line of the table."""
    plain, tree, cascade = (found.row(method) for method in (PLAIN, found.tree, found.cascade))
    return [
        found.name,
        _speed(plain),
        *_method(tree, found.report.complete),
        *_method(cascade, found.report.complete),
        _NO_FIGURE if found.quotient is None else _around(found.quotient[0], found.quotient[1], "x"),
        _equal([row for row in (tree, cascade) if row is not None]),
    ]


def caption(found: Sequence[Precision], shape: str) -> Iterator[str]:
    """How the figures came about, in lines."""
    yield (
        f"Shape-scaled models of the {shape} shape: text and acceptance of small trained models at the cost of large "
        "ones. Drafters are the same for every precision of the target. Of each kind the fastest setting is shown (a "
        "tree's nodes x levels; the tokens at which a cascade asks the target / the tree inside); all stand below. "
        "To plain: over plain decoding of the same target, with 95% bootstraps; accepted: tokens per target forward."
    )
    for one in found:
        if one.report.noise is not None and one.report.noise.refusal:
            yield f"{one.name}: {one.report.noise.refusal}."
        for method in one.report.methods:
            for error in failures(one.report, method):
                yield f"{one.name}, {in_words(method)}: failed: {error}."
        if not one.report.complete:
            yield f"{one.name}: the run was stopped before its last turn."


def markdown(found: Sequence[Precision], shape: str) -> str:
    """The tables as a page."""
    parts = [f"# {TITLE}", markdown_table(COLUMNS, list(map(cells, found)))]
    for one in found:
        rows = [all_cells(row) for row in one.report.rows]
        parts.append(f"## {one.name}, all settings\n\n{markdown_table(ALL_COLUMNS, rows)}")
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in caption(found, shape))]) + "\n"


def html(found: Sequence[Precision], shape: str) -> str:
    """The page."""
    known = found[0].report.circumstances if found else {}
    place = " ".join(str(known[key]) for key in ("processor", "date") if known.get(key))
    tables = (
        section(f"{one.name}, all settings", table(ALL_COLUMNS, map(all_cells, one.report.rows), (0,))) for one in found
    )
    lines = side_by_side([figure(chart.title, generate_svg.lines(chart)) for chart in _lines(found)])
    parts = side_by_side([figure(title, generate_svg.stacks(title, rows)) for title, rows in _stacks(found).items()])
    closings = (f"{one.name}: {line}" for one in found for line in closing(one.report))
    head = f"<p><code>{escape(str(known.get('command', '')))}</code> {escape(place)}</p>"
    shown = (section("Tokens/s", charts(bars(found))), section("Why", lines, parts))
    said = section("How it was measured", *map(paragraph, (*caption(found, shape), *closings)))
    return document(TITLE, (head, table(COLUMNS, map(cells, found)), *shown, *tables, said))


def png(found: Sequence[Precision]) -> bytes:
    """The charts as a picture. Raises ``Unavailable`` without matplotlib."""
    return generate_plot.picture(bars(found), _stacks(found), _lines(found))


def bars(found: Sequence[Precision]) -> list[Bars]:
    """Tokens/s of plain decoding, the tree and the cascade, a panel for each precision."""
    colors = (PLAIN_COLOR, PEER_COLOR, OURS_COLOR)
    panels = []
    for one in found:
        rows = [one.row(method) for method in (PLAIN, one.tree, one.cascade)]
        drawn = tuple(_bar(row, color) for row, color in zip(rows, colors, strict=True) if row is not None)
        panels.append(Bars(f"{one.name} target", drawn))
    return panels


def _bar(row: Row, color: str) -> Bar:
    value = row.tokens_per_second
    low, high = row.intervals.get("tokens_per_second", (value or 0.0, value or 0.0))
    return Bar(in_words(row.method), value, low, high, color)


def _stacks(found: Sequence[Precision]) -> dict[str, tuple[Stack, ...]]:
    named = {f"Milliseconds of a step by part, {one.name}": steps(one.report, in_words) for one in found}
    return {title: rows for title, rows in named.items() if rows}


def _lines(found: Sequence[Precision]) -> list[Lines]:
    measured = {one.name: one.report.curve for one in found if one.report.curve}
    chosen = {
        f"{one.name}, {in_words(row.method)}": row
        for one in found
        for row in (one.row(one.tree), one.row(one.cascade))
        if row is not None
    }
    accepted = acceptance_of(chosen)
    return [*([curves(measured)] if measured else []), *([accepted] if accepted else [])]


def _method(row: Row | None, complete: bool) -> list[str]:
    if row is None:
        return ["failed" if complete else _NO_FIGURE, _NO_FIGURE, _NO_FIGURE]
    speedup, length = row.speedup, row.acceptance_length
    return [
        f"{_speed(row)} ({in_words(row.method).partition(' ')[2]})",
        _NO_FIGURE if speedup is None else _around(speedup, row.intervals["speedup"], "x"),
        _NO_FIGURE if length is None else f"{length:.2f}",
    ]


def _speed(row: Row | None) -> str:
    return _NO_FIGURE if row is None or row.tokens_per_second is None else f"{row.tokens_per_second:.1f}"


def _around(value: float, interval: tuple[float, float], unit: str) -> str:
    return f"{value:.2f}{unit} ({interval[0]:.2f}-{interval[1]:.2f})"


def _equal(rows: Sequence[Row]) -> str:
    return "yes" if rows and all(row.equal_to_plain for row in rows) else "no"
