"""A report of ``bench generate`` as text: cells of a table per task, the lines below it, and a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quantspec.benchmarks.generate_rows import ALL, PARTS, Report, Row

COLUMNS = (
    "method", "tokens/s", "to plain", "acceptance length", "forwards", "draft, ms", "verify", "other",
    "first token, ms", "peak MB", "equal to plain",
)  # fmt: skip
NO_FIGURE = "-"


def cells(row: Row) -> list[str]:
    """One line of a table; a method that failed says why."""
    if row.error:
        return [row.method, *[NO_FIGURE] * (len(COLUMNS) - 2), f"failed: {row.error}"]
    parts = row.step_ms or {}
    return [
        row.method,
        _with_interval(row, "tokens_per_second", 1),
        _with_interval(row, "speedup", 2, "x"),
        _with_interval(row, "acceptance_length", 2),
        NO_FIGURE if row.target_forwards is None else str(row.target_forwards),
        *(f"{parts[part]:.2f}" if part in parts else NO_FIGURE for part in PARTS),
        NO_FIGURE if row.time_to_first_token is None else f"{1e3 * row.time_to_first_token:.1f}",
        NO_FIGURE if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.0f}",
        _equality(row),
    ]


def title(report: Report, task: str) -> str:
    """Above the table of a task."""
    model = report.settings.get("model", "")
    return f"{model}: {'all prompts' if task == ALL else task}"


def closing(report: Report) -> Iterator[str]:
    """How the figures came about, and what is wrong with them."""
    settings, loops = report.settings, len(report.degenerate_prompts)
    yield (
        f"{report.prompts} prompts of up to {settings.get('max_new_tokens')} tokens, greedy, {settings.get('rounds')} "
        f"rounds, {settings.get('threads')} threads; each contender in a process of its own, one at work at a time, in "
        "a new order each turn. Of a prompt's rounds the median time counts, prefills included; in brackets 95% "
        f"bootstraps over prompts and rounds. {loops} texts that loop are left out of all but the comparison. Forwards: "
        "the target's, prompts' left out; draft, verify, other: of one step."
    )
    if report.noise is not None:
        steadiness = f"spread of equal work {report.noise.spread:.1%}, {report.noise.limit:.0%} allowed"
        yield f"Machine: {steadiness}."
        if report.noise.refusal:
            yield f"{report.noise.refusal[0].upper()}{report.noise.refusal[1:]}."
    for name, info in report.contenders.items():
        versions = [str(info[key]) for key in ("describe", "version", "flags") if info.get(key)]
        if versions:
            yield f"{name}: {'; '.join(versions)}."
    if report.left_out:
        yield f"{len(report.left_out)} prompts were left out: {report.left_out[0]}."
    if not report.complete:
        yield "The run was stopped before its last turn."


def markdown(report: Report) -> str:
    """The whole report as a page."""
    known = report.circumstances
    parts = ["# Generation, side by side", *_place(known)]
    for task in report.tasks:
        rows = [cells(row) for row in report.rows if row.task == task]
        parts.append(f"## {title(report, task)}\n\n{_table(COLUMNS, rows)}")
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in closing(report))]) + "\n"


def _place(known: object) -> list[str]:
    if not isinstance(known, dict) or not known.get("command"):
        return []
    return [f"`{known['command']}`", f"{known.get('processor', '')}, {known.get('date', '')}"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _with_interval(row: Row, name: str, digits: int, unit: str = "") -> str:
    value = getattr(row, name)
    if value is None:
        return NO_FIGURE
    around = row.intervals.get(name)
    said = "" if around is None else f" ({around[0]:.{digits}f}-{around[1]:.{digits}f})"
    return f"{value:.{digits}f}{unit}{said}"


def _equality(row: Row) -> str:
    if row.equal_to_plain is None:
        return NO_FIGURE
    return "yes" if row.equal_to_plain else f"no ({row.equal_share or 0:.0%} are)"
