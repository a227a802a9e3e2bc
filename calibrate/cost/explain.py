"""A profile for people: what each candidate was planned to reach and reached, as rows and as a page. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from math import log2
from pathlib import Path
from statistics import median

from quantspec.calibrate.page import (
    BLUE,
    GRAY,
    HEIGHT,
    INK,
    LINE,
    WIDTH,
    document,
    facts,
    figure,
    paragraph,
    section,
    svg,
    table,
)
from quantspec.engine.costs import PLAIN, Candidate, CostCurve, Measured, Profile, Setting

COLUMNS = ("drafter", "setting", "planned, tokens/s", "measured, tokens/s", "off by", "to plain", "")
_SHORT = {
    "num_speculative_tokens": "n",
    "min_draft": "min",
    "tree_nodes": "inner",
    "tree_depth": "depth",
    "tree_top_k": "k",
}
_COLORS = (BLUE, "#1baf7a", "#eb6834", "#8a5cd0", "#b98900")


@dataclass(frozen=True)
class Row:
    """A candidate: its best setting as planned and as measured, in tokens per second, or why there is none. ``error``
    is of the plan, as a share of what was measured; ``speedup`` over plain decoding."""

    drafter: str
    setting: str = ""
    predicted: float | None = None
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    speedup: float | None = None
    chosen: bool = False
    failure: str | None = None

    def cells(self) -> list[str]:
        """In the order of ``COLUMNS``."""
        if self.measured is None or self.predicted is None or self.error is None:
            return [self.drafter, "", "", "", "", "", f"fails: {self.failure}"]
        return [
            self.drafter,
            self.setting,
            f"{self.predicted:.1f}",
            f"{self.measured:.1f} ({self.low:.1f}-{self.high:.1f})",
            f"{self.error:+.1%}",
            f"{self.speedup:.2f}x",
            "chosen" if self.chosen else "",
        ]

    def json(self) -> Mapping[str, object]:
        return asdict(self)


def rows(profile: Profile) -> list[Row]:
    """The fastest first, then those that failed."""
    plain = next((each.tokens_per_second for each in profile.measured if each.setting == PLAIN), 0.0)
    several = Counter(each.method for each in profile.candidates)
    found = [_row(each, plain, profile.chosen, several) for each in profile.measured]
    found.sort(key=lambda row: -(row.measured or 0.0))
    failed = [each for each in profile.candidates if each.failure]
    return found + [Row(_name(each, several), failure=each.failure) for each in failed]


def _row(each: Measured, plain: float, chosen: Setting, several: Mapping[str, int]) -> Row:
    speed, planned = each.tokens_per_second, each.predicted_tokens_per_second
    return Row(
        drafter=_name(each.setting, several),
        setting=" ".join(f"{_SHORT.get(name, name)}={value}" for name, value in each.setting.options.items()),
        predicted=planned,
        measured=speed,
        low=each.low,
        high=each.high,
        error=planned / speed - 1 if speed else 0.0,
        speedup=speed / plain if plain else 0.0,
        chosen=each.setting == chosen,
    )


def _name(one: Setting | Candidate, several: Mapping[str, int]) -> str:
    head = one.parts.get("head")
    return f"{one.method} {Path(head).name}" if head and several[one.method] > 1 else one.method


def median_error(found: Sequence[Row]) -> float:
    """Of the plan, without its sign."""
    return median([abs(row.error) for row in found if row.error is not None] or [0.0])


def caption(profile: Profile, found: Sequence[Row]) -> str:
    """How the figures came about."""
    return (
        f"Planned from {profile.target.widths[-1]} rows and {len(profile.target.contexts)} contexts of timed forwards, "
        "timed drafts and what the target took of the widest of them; measured: greedy text on the same prompts in "
        "turns, as auto runs each drafter, from the best setting on as wide as each draft is worth; least time of each "
        "step, the reading of prompts left out; in brackets 95% bootstraps over prompts. "
        f"Median error of the plan: {median_error(found):.1%}."
    )


def html(profile: Profile) -> str:
    """A page that needs nothing else."""
    found = rows(profile)
    machine = {**profile.machine, "kernels": profile.kernels, "model": profile.model[:16], "measured": profile.created}
    drafts = [
        (_name(each, Counter(one.method for one in profile.candidates)), *_acceptance(each))
        for each in profile.candidates
        if each.trace
    ]
    return document(
        "Speculation on this machine",
        (
            paragraph(caption(profile, found)),
            section("Candidates", table(COLUMNS, [row.cells() for row in found], (0, 1, 6)), _bars(found)),
            section("Forwards of n rows", figure("v(n): time over that of one row", _curves(profile.target))),
            section("Drafters at their widest", table(("drafter", "tokens per step", "accepted at 1, 2, ..."), drafts)),
            section("Where it holds", facts(machine)),
        ),
    )


def _acceptance(one: Candidate) -> tuple[str, str]:
    assert one.trace, "measured"
    steps = one.trace.steps
    length = sum(1 + sum(step.accepted) for step in steps) / max(len(steps), 1)
    return f"{length:.2f}", ", ".join(f"{share:.0%}" for share in one.trace.acceptance_by_position()[:8])


_LEFT, _BAR, _WIDE = 150, 30, 640


def _bars(found: Sequence[Row]) -> str:
    """Two bars per candidate: as planned, and as measured with its interval."""
    drawn = [row for row in found if row.measured is not None]
    most = max([max(row.high or 0.0, row.predicted or 0.0) for row in drawn], default=1.0)
    scale = (_WIDE - _LEFT - 60) / (most or 1.0)
    parts = []
    for i, row in enumerate(drawn):
        y, name = i * _BAR, escape(row.drafter)
        low, high, speed, planned = (float(each or 0) for each in (row.low, row.high, row.measured, row.predicted))
        tip = f"<title>{name}: planned {planned:.1f}, measured {speed:.1f} ({low:.1f} to {high:.1f}) tokens/s</title>"
        end = _LEFT + scale * max(high, planned)
        weight = ' font-weight="600"' if row.chosen else ""
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 17}" text-anchor="end"{weight}>{name}</text>',
            f'<rect x="{_LEFT}" y="{y + 3}" width="{scale * planned:.1f}" height="9" fill="{GRAY}">{tip}</rect>',
            f'<rect x="{_LEFT}" y="{y + 13}" width="{scale * speed:.1f}" height="9" fill="{BLUE}">{tip}</rect>',
            f'<path stroke="{INK}" d="M{_LEFT + scale * low:.1f} {y + 17.5}H{_LEFT + scale * high:.1f}"/>',
            f'<text x="{end + 6:.1f}" y="{y + 17}">{speed:.3g}</text>',
        ]
    drawing = svg(_WIDE, _BAR * max(len(drawn), 1) + 4, "tokens per second", parts)
    return figure("Tokens per second: planned (gray) and measured (blue)", drawing)


def _curves(curve: CostCurve) -> str:
    """v(n) at each context, both axes logarithmic."""
    most = log2(curve.widths[-1])
    top = max(log2(curve.relative(width, context)) for context in curve.contexts for width in curve.widths) or 1.0

    def place(width: int, context: int) -> tuple[float, float]:
        up = log2(curve.relative(width, context)) / top
        return 40 + log2(width) / most * (WIDTH - 60), HEIGHT - 30 - up * (HEIGHT - 50)

    parts = [
        f'<text x="{40 + k / most * (WIDTH - 60):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{2**k}</text>'
        for k in range(int(most) + 1)
    ]
    for k in range(int(top) + 1):
        y = HEIGHT - 30 - k / top * (HEIGHT - 50)
        parts.append(f'<path stroke="{LINE}" d="M40 {y:.1f}H{WIDTH - 20}"/>')
        parts.append(f'<text x="34" y="{y + 4:.1f}" text-anchor="end">{2**k}</text>')
    for number, context in enumerate(curve.contexts):
        color = _COLORS[number % len(_COLORS)]
        points = [place(width, context) for width in curve.widths]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path fill="none" stroke="{color}" stroke-width="2" d="M{path}"/>')
        parts.append(f'<text x="48" y="{24 + 14 * number}" style="fill:{color}">{context} tokens of context</text>')
    return svg(WIDTH, HEIGHT, "v(n)", parts)
