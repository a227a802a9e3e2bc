"""``bench paper``: settings, the choice of the fastest, the quotient of two methods, methods around one target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantspec.benchmarks import generate, paper, paper_page
from quantspec.benchmarks.generate_config import GenerateBench
from quantspec.benchmarks.generate_rows import PLAIN, UNFINISHED, Noise, Report, Row
from quantspec.benchmarks.paper_config import PaperBench, in_words
from quantspec.benchmarks.peers import shared
from quantspec.benchmarks.peers.process import Contender
from quantspec.benchmarks.peers.protocol import Ask
from quantspec.cli.main import run as cli
from quantspec.errors import UsageError

OUT = Path("results")


@pytest.mark.parametrize(
    "wrong",
    [
        {"precisions": ("w3",)}, {"precisions": ()}, {"precisions": ("w4", "w4")}, {"trees": ("2x2", "2x2")},
        {"limit": 0}, {"trees": ("8",)}, {"trees": ("2x3",)}, {"trees": ("0x0",)},
        {"cascades": ("4x3",)}, {"cascades": ("0/4x3",)}, {"cascades": ("6/",)}, {"shape": "1b,layers=none"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PaperBench(OUT, **wrong)


def test_settings_become_methods_and_words_again() -> None:
    config = PaperBench(OUT, trees=("2x2", "15x6"), cascades=("6/30x3",))
    trees, cascades = config.tree_methods(), config.cascade_methods()
    assert trees[0] == "eagle:num_speculative_tokens=2:tree_depth=2:tree_top_k=2"
    assert cascades == ("cascade:min_draft=6:num_speculative_tokens=8:tree_nodes=30:tree_depth=3:tree_top_k=4",)
    assert [in_words(method) for method in (PLAIN, *trees, *cascades)] == [
        "plain", "tree 2x2", "tree 15x6", "cascade 6/30x3",
    ]  # fmt: skip
    assert "tree_top_k=10" in PaperBench(OUT, trees=("15x6",), device="cuda").tree_methods()[0]


SPEEDS = {"tree 2x2": 50.0, "tree 8x4": 60.0, "cascade 3/4x3": 90.0}
"""Tokens/s; plain decoding gives 40."""


def _measured(steady: bool, seen: list[GenerateBench]) -> Callable[..., Report]:
    """What ``generate.run`` would measure."""

    def run(config: GenerateBench, note: Any, stop: Any, arrange: Any) -> Report:
        seen.append(config)
        speeds = {PLAIN: 40.0, **{method: SPEEDS[in_words(method)] for method in config.methods}}
        assert config.out is not None
        config.out.mkdir(parents=True)
        lines = [{"settings": {}}, {"id": "contender:none", "found": {}}]
        lines += [
            {
                "id": f"turn:{round_number}:{number}",
                "found": {
                    "distinct": 1.0,
                    "answers": {name: {"seconds": 90 / speed, "tokens": 90} for name, speed in speeds.items()},
                },
            }
            for round_number in range(2)
            for number in range(3)
        ]
        # A turn whose text loops, and one in which everything failed before the run was begun again, do not count.
        looping = {name: {"seconds": 1.0, "tokens": 90} for name in speeds}
        lines.append({"id": "turn:0:3", "found": {"distinct": 0.1, "answers": looping}})
        failed = {name: {"error": "crashed"} for name in config.methods}
        lines.append({"id": "turn:0:4", "found": {"distinct": 1.0, "answers": failed}})
        (config.out / generate.LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows = []
        for name, speed in speeds.items():
            ratio = {"speedup": speed / 40} if steady else {}
            around = {"speedup": (speed / 41, speed / 39)}
            rows.append(
                Row(task="all", method=name, tokens_per_second=speed, equal_to_plain=True, intervals=around, **ratio)  # type: ignore[arg-type]
            )
        noise = Noise(seconds=(1.0,), spread=0.0, limit=0.15, refusal=None if steady else "no speedups: too noisy")
        return Report(settings={}, contenders={}, rows=tuple(rows), noise=noise, curve={1: 1.0, 2: 1.5})

    return run


@pytest.mark.parametrize("steady", [True, False])
def test_the_fastest_of_either_kind_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steady: bool) -> None:
    seen: list[GenerateBench] = []
    folders = {name: tmp_path / name for name in ("bf16", "w4", *paper.DRAFTERS)}
    monkeypatch.setattr(paper, "scale", lambda config, note: folders)
    monkeypatch.setattr(generate, "run", _measured(steady, seen))
    config = PaperBench(tmp_path, precisions=("bf16", "w4"), trees=("2x2", "8x4"), cascades=("3/4x3",))
    found = paper.run(config, lambda line: None)
    assert [Path(each.model).name for each in seen] == ["bf16", "w4"]
    assert {Path(each).name for each in seen[0].head} == {"eagle-target", "eagle-intermediate"}
    assert in_words(found[0].tree or "") == "tree 8x4"
    cells = paper_page.cells(found[1])
    assert cells[:3] == ["w4", "40.0", "60.0 (8x4)"]
    if steady:
        assert found[0].quotient is not None
        assert (found[0].quotient[0], *found[0].quotient[1]) == pytest.approx((1.5, 1.5, 1.5))
        assert cells[3].startswith("1.50x (")
    else:  # a noisy machine gives speeds and no ratios
        assert found[0].quotient is None
        assert cells[3] == cells[-2] == "-"
    page = paper_page.html(found, config.shape)
    assert "too noisy" not in page if steady else "too noisy" in page
    assert "| w4 | 40.0 |" in paper_page.markdown(found, config.shape)
    json.dumps([each.as_dict() for each in found])


def test_each_precision_has_its_own_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a folder of models held before, and in which order."""
    members = ("target-w4", "intermediate-w4", "eagle-target-w4", "eagle-intermediate-w8", "target", "target-w8")
    written = {"members": dict.fromkeys(members)}
    monkeypatch.setattr("quantspec.benchmarks.scaled.run.run", lambda options, note: written)
    found = paper.scale(PaperBench(tmp_path, models=tmp_path), lambda line: None)
    assert {name: found[name].name for name in ("bf16", "w8", "w4")} == {
        "bf16": "target", "w8": "target-w8", "w4": "target-w4",
    }  # fmt: skip
    assert found["eagle-intermediate"].name == "eagle-intermediate-w8"


def test_methods_share_a_target_and_write_its_text() -> None:
    family = {"head": "default/eagle-target"}
    options: dict[str, dict[str, Any]] = {
        PLAIN: {"method": PLAIN},
        "eagle:2": {"method": "eagle", "num_speculative_tokens": 2, **family},
        "eagle:8": {"method": "eagle", "num_speculative_tokens": 8, **family},
    }
    contenders = shared.sharing(
        [
            Contender(name=name, kind="ours", options={"model": "default", "threads": 1, **each})
            for name, each in options.items()
        ]
        + [Contender(name="broken", kind="ours", error="not there")]
    )
    assert len({one.process_key for one in contenders[:3]}) == 1
    assert contenders[3].error == "not there"
    described, answer = shared.load(contenders[0].options)
    assert described["exactness"] == "exact"
    found = {
        one.name: answer(Ask(tokens=(5, 6, 7, 8), text="", max_new_tokens=16, extra=one.ask)) for one in contenders[:3]
    }
    assert len({one.tokens for one in found.values()}) == 1
    forwards = [found[name].target_forwards or 0 for name in options]
    assert forwards[0] > forwards[1] >= forwards[2]


def test_what_failed_or_differs_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tree, cascade = (
        PaperBench(OUT, trees=("2x2",)).tree_methods(),
        PaperBench(OUT, cascades=("3/4x3",)).cascade_methods(),
    )

    def found(equal: bool, complete: bool = True) -> paper.Precision:
        rows = (
            Row(task="all", method=PLAIN, tokens_per_second=40.0, equal_to_plain=True),
            Row(task="all", method=tree[0], tokens_per_second=50.0, equal_to_plain=equal, exactness="exact"),
            Row(task="all", method=cascade[0], error="no such head" if complete else UNFINISHED),
            Row(task="all", method="transformers-bf16", kind="peer", error="crashed"),
        )
        report = Report(settings={}, contenders={}, rows=rows, noise=None, complete=complete)
        return paper.Precision(name="w4", report=report, tree=tree[0], cascade=None, quotient=None)

    text = paper_page.markdown([found(True)], "1b")
    assert "w4, cascade 3/4x3: failed: no such head." in text
    assert "w4, transformers-bf16: failed: crashed." in text
    assert "failed" in paper_page.cells(found(True))
    assert "failed" not in paper_page.cells(found(True, complete=False))
    command = ["bench", "paper", "--out", str(tmp_path)]
    for equal, code, complaint in ((True, 3, "no cascade ran on w4"), (False, 5, "differs from plain decoding's")):
        monkeypatch.setattr(paper, "run", lambda *arguments, equal=equal: [found(equal)])
        assert cli(command) == code
        assert complaint in capfd.readouterr().err
    assert cli([*command, "--prompts", "/dev/null"]) == 3
    assert "has no prompts" in capfd.readouterr().err
    monkeypatch.setattr(paper, "run", lambda *arguments: [])  # stopped before the first precision
    assert cli(command) == 0
