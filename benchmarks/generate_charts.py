"""What there is to draw in a report of ``bench generate``: bars, stacks and lines, for the page and the PNG alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quantspec.benchmarks.generate_rows import ALL, PARTS, PLAIN, Report, Row

PLAIN_COLOR, OURS_COLOR, PEER_COLOR = "#8a949e", "#2f6fb0", "#d98a2b"
PART_COLORS = {"draft": "#d98a2b", "verify": "#2f6fb0", "overhead": "#b4bdc7"}
LINE_COLORS = ("#2f6fb0", "#d9632b", "#1b9e77", "#8a5cd0", "#b98900", "#c2397f", "#4d4d4d", "#66a61e")
"""Apart for colour-blind readers, neighbours above all."""


@dataclass(frozen=True)
class Bar:
    """A value with its interval; a ``value`` of None is a method without figures here."""

    label: str
    value: float | None
    low: float
    high: float
    color: str


@dataclass(frozen=True)
class Bars:
    """Bars of one panel."""

    title: str
    bars: tuple[Bar, ...]

    @property
    def end(self) -> float:
        """Where the longest one ends, its interval counted."""
        return max((bar.high for bar in self.bars if bar.value is not None), default=0.0)


@dataclass(frozen=True)
class Stack:
    """Parts of a whole, in the order of ``PARTS``."""

    label: str
    parts: tuple[tuple[str, float], ...]

    @property
    def total(self) -> float:
        return sum(value for _, value in self.parts)


@dataclass(frozen=True)
class Line:
    """Points by rising x."""

    name: str
    points: tuple[tuple[float, float], ...]
    color: str


@dataclass(frozen=True)
class Lines:
    """Lines over common axes. ``log``: both are logarithmic; else y goes from 0 to 1. ``guide``: a line y = x."""

    title: str
    x_label: str
    lines: tuple[Line, ...]
    log: bool = False
    guide: bool = False


_SHORT = {"num_speculative_tokens": "n", "tree_depth": "depth", "tree_top_k": "top", "tree_nodes": "nodes"}


def label(method: str) -> str:
    """What people read for a method: its settings in short, the folders of its parts by name."""
    name, *settings = method.split(":")
    pairs = [setting.partition("=") for setting in settings]
    said = [f"{_SHORT.get(key, key)} {value.rstrip('/').rpartition('/')[2]}" for key, _, value in pairs]
    return " ".join(["plain" if name == PLAIN else name, ", ".join(said)]).strip()


def task_label(task: str) -> str:
    return "all tasks" if task == ALL else task.replace("_", " ")


def speeds(report: Report) -> list[Bars]:
    """Tokens/s by method: all tasks together first, then each, unless there is only one."""
    tasks = [task for task in report.tasks if task != ALL]
    shown = [ALL, *tasks] if len(tasks) > 1 else [ALL]
    panels = [Bars(task_label(task), _bars(report, task)) for task in shown]
    return [panel for panel in panels if any(bar.value is not None for bar in panel.bars)]


def _bars(report: Report, task: str) -> tuple[Bar, ...]:
    rows = [row for row in (report.row(method, task) for method in report.methods) if row is not None]
    return tuple(_bar(row) for row in rows)


def _bar(row: Row) -> Bar:
    value = row.tokens_per_second
    low, high = row.intervals.get("tokens_per_second", (value or 0.0, value or 0.0))
    color = PLAIN_COLOR if row.method == PLAIN else PEER_COLOR if row.kind == "peer" else OURS_COLOR
    return Bar(label(row.method), value, low, high, color)


def steps(report: Report, name: Callable[[str], str] = label) -> tuple[Stack, ...]:
    """Milliseconds of a step by part, of every method that knows its own; ``name`` gives what people read for it."""
    rows = [(method, report.row(method)) for method in report.methods]
    return tuple(
        Stack(name(method), tuple((part, row.step_ms.get(part, 0.0)) for part in PARTS))
        for method, row in rows
        if row is not None and row.step_ms
    )


def acceptance(report: Report) -> Lines | None:
    """Share of target forwards that accepted a drafted token at a position, by method."""
    rows = [row for row in (report.row(method) for method in report.methods) if row is not None]
    return acceptance_of({label(row.method): row for row in rows})


def acceptance_of(rows: Mapping[str, Row]) -> Lines | None:
    """Likewise of some rows by name; None where none has drafted."""
    drawn = {name: row.acceptance_by_position for name, row in rows.items() if row.acceptance_by_position}
    lines = tuple(
        Line(name, tuple((k + 1.0, share) for k, share in enumerate(shares)), color)
        for (name, shares), color in zip(drawn.items(), _colors(len(drawn)), strict=True)
    )
    title = "Share of target forwards that accept up to a position"
    return Lines(title, "position in the draft", lines) if lines else None


def curve(report: Report) -> Lines | None:
    """v(n): what a target forward of n rows costs, over one of one row."""
    return None if not report.curve else curves({"target": report.curve})


def curves(seconds: Mapping[str, Mapping[int, float]]) -> Lines:
    """v(n) of several models, each from seconds by rows."""
    lines = tuple(
        Line(name, tuple((float(n), by_rows[n] / by_rows[1]) for n in sorted(by_rows)), color)
        for (name, by_rows), color in zip(seconds.items(), _colors(len(seconds)), strict=True)
    )
    return Lines("v(n) = t(n) / t(1) of the target; dashed: n", "rows n", lines, log=True, guide=True)


def _colors(count: int) -> Sequence[str]:
    return [LINE_COLORS[i % len(LINE_COLORS)] for i in range(count)]
