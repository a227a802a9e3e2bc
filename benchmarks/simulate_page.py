"""Predictions and checks as cells, as an HTML page that needs nothing else, and as a PNG by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape

from quantspec.benchmarks.simulate import Report, Row
from quantspec.benchmarks.simulate_check import Check, Checked
from quantspec.calibrate.page import BLUE, GRAY, document, figure, paragraph, section, svg, table

COLUMNS = ("strategy", "setting", "batch", "tokens a step", "rows", "ms a step", "of it draft", "tokens/s", "to plain")
CHECK_COLUMNS = ("profile", "method", "setting", "simulated, tokens/s", "measured, tokens/s", "off by")
SHORT = {
    "num_speculative_tokens": "n", "tree_depth": "depth", "tree_nodes": "inner n", "min_draft": "min",
    "inner_min_draft": "inner min", "inner_num_speculative_tokens": "inner chain", "tree_top_k": "k",
}  # fmt: skip
_LEFT, _WIDTH, _BAR = 130, 460, 20


def setting(options: Mapping[str, int]) -> str:
    """Options in short: ``n 15, depth 3``."""
    return ", ".join(f"{SHORT[key]} {value}" for key, value in options.items())


def cells(row: Row) -> list[str]:
    """One line of the table."""
    return [
        row.strategy,
        setting(row.options),
        str(row.batch),
        f"{row.tokens:.2f}",
        f"{row.rows:.1f}",
        f"{row.seconds * 1e3:.2f}",
        f"{row.draft_seconds / row.seconds:.0%}",
        f"{row.tokens_per_second:.1f}",
        f"{row.speedup:.2f}x",
    ]


def check_cells(row: Checked) -> list[str]:
    """One line of the table of a check."""
    measured = f"{row.measured:.2f} ({row.low:.2f}-{row.high:.2f})"
    return [row.profile, row.method, setting(row.options), f"{row.simulated:.2f}", measured, f"{row.error:+.1%}"]


def by_machine(report: Report) -> dict[str, list[Row]]:
    """The rows of each machine, in their order."""
    found: dict[str, list[Row]] = {}
    for row in report.rows:
        found.setdefault(row.machine, []).append(row)
    return found


def caption(report: Report) -> str:
    """How the figures came about."""
    return (
        f"Simulated, not measured, with {report.context} tokens of context; acceptance: {report.acceptance}. Each "
        "strategy's best setting; rows: of one sequence in the target's forward; n: the most draft tokens there; "
        "prefills are left out."
    )


def verdict(check: Check) -> str:
    """The outcome in a line."""
    within = "within" if check.median_error <= check.limit else "above"
    return f"Median error {check.median_error:.1%} over {len(check.rows)} settings, {within} {check.limit:.0%}."


def html(report: Report) -> str:
    """A page of the report."""
    sections = [
        section(name, figure("Tokens/s of all sequences", _bars(name, rows)), table(COLUMNS, map(cells, rows), (0, 1)))
        for name, rows in by_machine(report).items()
    ]
    return document(
        "Speculation, simulated", (paragraph(caption(report)), *(paragraph(note) for note in report.notes), *sections)
    )


def _label(row: Row) -> str:
    return f"{row.strategy}, batch {row.batch}"


def _bars(label: str, rows: Sequence[Row]) -> str:
    scale, parts = (_WIDTH - _LEFT - 90) / max(row.tokens_per_second for row in rows), []
    for i, row in enumerate(rows):
        y, width, color = i * _BAR, scale * row.tokens_per_second, GRAY if row.strategy == "none" else BLUE
        tip = f"<title>{escape(setting(row.options) or 'plain decoding')}</title>"
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(_label(row))}</text>',
            f'<rect x="{_LEFT}" y="{y + 3}" width="{width:.1f}" height="14" fill="{color}">{tip}</rect>',
            f'<text x="{_LEFT + width + 6:.1f}" y="{y + 14}">{row.tokens_per_second:.4g} ({row.speedup:.2f}x)</text>',
        ]
    return svg(_WIDTH, _BAR * len(rows) + 4, label, parts)


def png(report: Report) -> bytes:
    """The bars of the page as a picture; matplotlib must be there (``plot.why_not``)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = by_machine(report)
    most = max(len(rows) for rows in found.values())
    drawn = Figure(figsize=(5.5 * len(found), 1.4 + 0.32 * most), layout="constrained")
    for axis, (name, rows) in zip(drawn.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        colors = [GRAY if row.strategy == "none" else BLUE for row in rows][::-1]
        bars = axis.barh(
            [_label(row) for row in rows][::-1], [row.tokens_per_second for row in rows][::-1], color=colors
        )
        axis.bar_label(bars, [f" {row.speedup:.2f}x" for row in rows][::-1], fontsize=8)
        axis.margins(x=0.15)
        axis.set_title(f"{name}: tokens/s, simulated", fontsize=11, loc="left")
        axis.tick_params(length=0)
        for spine in ("top", "right"):
            axis.spines[spine].set_visible(False)
    out = io.BytesIO()
    FigureCanvasAgg(drawn).print_png(out)
    return out.getvalue()
