"""The page and the picture of a report of ``bench generate``."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from quantspec.benchmarks import generate_page, generate_plot
from quantspec.benchmarks.generate_charts import acceptance, curve, label, speeds, steps
from quantspec.benchmarks.generate_rows import ALL, PLAIN, Noise, Report, Row
from quantspec.benchmarks.plot import why_not

TREE = "eagle:num_speculative_tokens=8:tree_depth=4"


def _row(task: str, method: str, speed: float, **more: Any) -> Row:
    intervals = {"tokens_per_second": (0.9 * speed, 1.1 * speed), "speedup": (0.9 * speed / 40, 1.1 * speed / 40)}
    figures: dict[str, Any] = {
        "tokens_per_second": speed,
        "speedup": speed / 40,
        "equal_to_plain": True,
        "intervals": intervals,
    }
    return Row(task=task, method=method, **{**figures, **more})


def _report(*tasks: str) -> Report:
    drafted = {
        "acceptance_length": 2.5,
        "acceptance_by_position": (0.8, 0.5, 0.2),
        "step_ms": {"draft": 9.0, "verify": 30.0, "overhead": 1.0},
    }
    rows = []
    for task in (ALL, *tasks):
        rows += [
            _row(task, PLAIN, 40.0, step_ms={"draft": 0.0, "verify": 25.0, "overhead": 0.5}),
            _row(task, TREE, 64.0, **drafted),
            _row(task, "llama.cpp", 38.0, kind="peer"),
            Row(task=task, method="transformers-compiled", kind="peer", error="needs a GPU <here>"),
        ]
    return Report(
        settings={"model": "m", "rounds": 3},
        contenders={PLAIN: {"describe": "plain & simple"}},
        rows=tuple(rows),
        noise=Noise(seconds=(1.0, 1.1), spread=0.05, limit=0.15, refusal=None),
        curve={1: 0.025, 2: 0.025, 4: 0.03, 8: 0.06},
        prompts=6,
        circumstances={"command": "quantspec bench generate", "processor": "a CPU", "date": "today"},
    )


def test_a_method_is_named_in_short() -> None:
    assert label(PLAIN) == "plain"
    assert label(TREE) == "eagle n 8, depth 4"
    assert label("cascade:head=/a/b/eagle-w4/") == "cascade head eagle-w4"


def test_charts_hold_what_the_rows_say() -> None:
    report = _report("qa", "rag")
    panels = speeds(report)
    assert [panel.title for panel in panels] == ["all tasks", "qa", "rag"]
    assert [bar.value for bar in panels[0].bars] == [40.0, 64.0, 38.0, None]
    assert panels[0].end == pytest.approx(1.1 * 64.0)
    assert [(stack.label, stack.total) for stack in steps(report)] == [("plain", 25.5), ("eagle n 8, depth 4", 40.0)]
    accepted, costs = acceptance(report), curve(report)
    assert accepted is not None
    assert accepted.lines[0].points == ((1.0, 0.8), (2.0, 0.5), (3.0, 0.2))
    assert costs is not None
    assert costs.lines[0].points[-1] == pytest.approx((8.0, 2.4))


def test_one_task_is_not_drawn_twice() -> None:
    assert [panel.title for panel in speeds(_report("qa"))] == ["all tasks"]


def test_the_page_needs_nothing_else_and_is_well_formed() -> None:
    page = generate_page.html(Report.from_dict(json.loads(json.dumps(_report("qa", "rag").as_dict()))))
    assert not re.search(r"<script|<link|<img|https?://|url\(|@import", page)
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawings) == 3 + 3  # tasks; parts of a step, acceptance, v(n)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "1.60x" in page
    assert "plain &amp; simple" in page
    assert "<here>" not in page


def test_the_page_of_a_noisy_run_that_has_hardly_begun() -> None:
    noise = Noise(seconds=(1.0, 2.0), spread=0.7, limit=0.15, refusal="no speedups: too noisy")
    rows = tuple(
        replace(row, speedup=None, tokens_per_second=None, error="stopped", step_ms=None) for row in _report().rows
    )
    bare = replace(_report(), rows=rows, noise=noise, curve=None, complete=False)
    page = generate_page.html(replace(bare, rows=tuple(replace(row, acceptance_by_position=()) for row in rows)))
    assert "o speedups: too noisy" in page
    assert "<svg" not in page


@pytest.mark.skipif(why_not() is not None, reason="matplotlib is not installed")
def test_the_picture_is_a_png() -> None:
    assert generate_plot.png(_report("qa", "rag")).startswith(b"\x89PNG")
    bare = replace(_report(), curve=None, rows=_report().rows[:1])
    assert generate_plot.png(bare).startswith(b"\x89PNG")
    stopped = replace(bare, rows=())  # before its first figure
    assert generate_plot.png(stopped).startswith(b"\x89PNG")
