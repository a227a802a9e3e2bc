"""``quantspec bench simulate`` through the command line: its outputs, its check's exit code, and misuse in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantspec.benchmarks import simulate_check
from quantspec.benchmarks.simulate_check import Check, Checked


def test_json_page_and_table(call: Any, tmp_path: Path) -> None:
    page = tmp_path / "simulated.html"
    arguments = ("bench", "simulate", "--machine", "h200", "--target", "8b", "--strategies", "none,draft", "--batch", 4)
    found = call(*arguments, "--json", "--html", page)
    assert found.code == 0, found.err
    report = json.loads(found.out)
    assert [(row["strategy"], row["batch"]) for row in report["rows"]] == [("none", 4), ("draft", 4)]
    assert report["rows"][0]["speedup"] == 1
    assert "h200" in page.read_text()
    shown = call(*arguments)
    assert shown.code == 0
    assert "Simulated, not measured" in shown.out
    assert "n 1" in shown.out or "n 2" in shown.out or "n 3" in shown.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--machine", "v100"), 2, "no machine 'v100' is known"),
        (("--target", "3b"), 2, "llama-3 has no target '3b'"),
        (("--format", "int3"), 2, "nothing is known of int3 on a100"),
        (("--acceptance", "mine"), 2, "no acceptance 'mine' is known"),
        (("--strategies", "eagle4"), 2, "no strategy 'eagle4' here"),
        (("--strategies", "eagle:depth=3"), 2, "eagle has no option 'depth'"),
        (("--strategies", "eagle:min_draft=3"), 2, "eagle has no option 'min_draft'"),
        (("--strategies", "none:tree_depth=3"), 2, "none has no option 'tree_depth'"),
        (("--strategies", "cascade:inner_min_draft=3"), 2, "cascade has no option 'inner_min_draft'"),
        (("--strategies", "eagle:tree_depth=x"), 2, "'tree_depth=x' is not KEY=NUMBER"),
        (("--batch", "0"), 2, "batch must be from 1 to 128"),
        (("--context", "-1"), 2, "context must not be below 0"),
        (("--html", "/no/such/folder/x.html"), 2, "cannot write"),
        (("--check", "/no/such/profile.json"), 3, "cannot read"),
        (("--check", "/no/such/profile.json", "--html", "x.html"), 2, "--check draws nothing"),
    ],
)
def test_misuse_is_one_line(call: Any, arguments: tuple[str, ...], code: int, said: str) -> None:
    found = call("bench", "simulate", *arguments)
    assert (found.code, said in found.error) == (code, True), found.err


@pytest.mark.parametrize(("error", "code"), [(-0.04, 0), (0.2, 5)])
def test_the_checks_outcome_is_its_exit_code(
    call: Any, monkeypatch: pytest.MonkeyPatch, error: float, code: int
) -> None:
    row = Checked("mine", "eagle", {"num_speculative_tokens": 3}, 100 * (1 + error), 100.0, 98.0, 102.0, error)
    monkeypatch.setattr(simulate_check, "run", lambda profiles: Check((row,), abs(error), 0.1))
    found = call("bench", "simulate", "--check", "mine.json")
    assert found.code == code
    assert f"Median error {abs(error):.1%} over 1 settings" in found.out
    assert f"{error:+.1%}" in found.out
