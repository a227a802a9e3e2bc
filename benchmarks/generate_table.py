"""A report of ``bench generate`` as text: cells of a table per task, the lines below it, and a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quantspec.benchmarks.generate_charts import label
from quantspec.benchmarks.generate_rows import ALL, PARTS, Report, Row

COLUMNS = (
    "method", "tokens/s", "to plain", "decoding alone", "acceptance length", "forwards", "step, ms", "peak MB",
    "equal to plain",
)  # fmt: skip
NO_FIGURE = "-"


def cells(row: Row) -> list[str]:
    """One line of a table; why a method failed stands below it (``closing``)."""
    if row.error:
        why = "failed" if row.failed else row.error
        return [label(row.method), why, *[NO_FIGURE] * (len(COLUMNS) - 3), _equality(row)]
    step = [] if row.step_ms is None else [f"{row.step_ms[part]:.2f}" for part in PARTS]
    return [
        label(row.method),
        _with_interval(row, "tokens_per_second", 0 if (row.tokens_per_second or 0) >= 100 else 1),
        _with_interval(row, "speedup", 2, "x"),
        _with_interval(row, "decode_speedup", 2, "x"),
        NO_FIGURE if row.acceptance_length is None else f"{row.acceptance_length:.2f}",
        NO_FIGURE if row.target_forwards is None else str(row.target_forwards),
        " + ".join(step) or NO_FIGURE,
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
        "a new order each turn. Of a prompt's rounds the median time counts, prefills included; 'decoding alone' "
        "is to plain too, from the first token on; in brackets 95% bootstraps over prompts and rounds. "
        f"{loops} prompts whose text loops are left out of all but the comparison. "
        "Forwards, and steps (draft + verify + other), are without the prompts' own."
    )
    if report.noise is not None:
        steadiness = f"spread of equal work {report.noise.spread:.1%}, {report.noise.limit:.0%} allowed"
        yield f"Machine: {steadiness}."
        if report.noise.refusal:
            yield f"{report.noise.refusal[0].upper()}{report.noise.refusal[1:]}."
    for name in report.methods:
        info, errors = report.contenders.get(name, {}), failures(report, name)
        said = [str(info[key]) for key in ("describe", "version", "flags") if info.get(key)]
        said += [f"failed: {error}" for error in errors]
        if said:
            yield f"{label(name)}: {'; '.join(said)}."
    if report.left_out:
        yield f"{len(report.left_out)} prompts were left out: {report.left_out[0]}."
    if not report.complete:
        yield "The run was stopped before its last turn."


def failures(report: Report, method: str) -> Sequence[str]:
    """Why a method has no figures, each reason once."""
    rows = [row for row in report.rows if row.method == method and row.failed]
    return tuple(dict.fromkeys(str(row.error) for row in rows))


def markdown(report: Report) -> str:
    """The whole report as a page."""
    known = report.circumstances
    parts = ["# Generation, side by side", *_place(known)]
    for task in report.tasks:
        rows = [cells(row) for row in report.rows if row.task == task]
        parts.append(f"## {title(report, task)}\n\n{markdown_table(COLUMNS, rows)}")
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in closing(report))]) + "\n"


def _place(known: object) -> list[str]:
    if not isinstance(known, dict) or not known.get("command"):
        return []
    return [f"`{known['command']}`", f"{known.get('processor', '')}, {known.get('date', '')}"]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column holds words and whose others hold figures."""
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
    return "yes" if row.equal_to_plain else f"no ({row.equal_share or 0:.0%})"
