"""``quantspec bench drafters``: rows, intervals, failures, interruptions and misuse. No timing is asserted."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantspec.benchmarks import drafters, drafters_page
from quantspec.benchmarks.config import DraftersBench
from quantspec.benchmarks.drafters_found import find
from quantspec.calibrate.cost.found import _more_heads
from quantspec.cli.main import run as cli
from quantspec.engine import build
from quantspec.engine.llm import LLM
from quantspec.errors import ModelError, UsageError
from quantspec.models import atomic
from quantspec.models.resolve import FAMILY

ROW = {"drafter", "acceptance_length", "draft_ms", "tokens_per_second", "exactness", "equal_to_plain"}
QUICK = {"limit": 2, "max_new_tokens": 12, "rounds": 1, "threads": 1}
FLAGS = ("--limit", "2", "--max-new-tokens", "12", "--rounds", "1", "--threads", "1")


def head_of(folder: Path, **changes: Any) -> Path:
    """The family's EAGLE head under another name, its config changed."""
    atomic.make_folder(folder)
    atomic.copy_file(FAMILY / "eagle-target/model.safetensors", folder / "model.safetensors")
    raw = json.loads((FAMILY / "eagle-target/config.json").read_text())
    atomic.write_json(folder / "config.json", raw | changes)
    return folder


def no_notes(line: str) -> None:
    raise AssertionError(line)


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    chosen = ("--drafters", "lookup,eagle")
    assert cli(["bench", "drafters", *FLAGS, *chosen, "--out", str(out), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert [row["drafter"] for row in report["rows"]] == ["none", "lookup", "eagle"]
    plain, _, eagle = report["rows"]
    assert all(row.keys() >= ROW and row["equal_to_plain"] and row["exactness"] == "exact" for row in report["rows"])
    assert (plain["acceptance_length"], plain["speedup"]) == (1.0, 1.0)
    low, high = eagle["intervals"]["acceptance_length"]
    assert 1 < low <= eagle["acceptance_length"] <= high <= 12
    assert eagle["tokens_per_second"] > 0 < eagle["draft_ms"]
    assert eagle["sampled"]["acceptance_length"] >= 1
    assert (report["prompts"], report["complete"]) == (2, True)
    assert json.loads((out / "drafters.json").read_text()) == report
    page = (out / "drafters.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 2
    assert not re.search(r"<script|https?://|src=|@import", page)
    # The same command once more finds all of it done, and shows the same as a table.
    assert cli(["bench", "drafters", *FLAGS, *chosen, "--out", str(out)]) == 0
    text, notes = capfd.readouterr()
    assert "going on after 2 of 2 prompts" in notes
    assert f"{eagle['acceptance_length']:.2f} ({low:.2f}-{high:.2f})" in text


def test_the_target_and_a_draft_model_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many drafters: each of the two models is, and all drafters run beside the same one."""
    load_model, loaded = build.load_model, list[str]()

    def counted(name: Path, **options: Any) -> Any:
        loaded.append(name.name)
        return load_model(name, **options)

    monkeypatch.setattr(build, "load_model", counted)
    config = DraftersBench(**QUICK, drafters=("draft", "eagle", "cascade"))
    bench = drafters._Bench(config, find(config, lambda line: None), lambda line: None)
    assert bench.errors == {}
    assert loaded == ["target-w4", "intermediate-w4"]
    assert len({id(llm._engine.model) for llm in bench.llms.values()}) == 1
    assert [llm.config.method for llm in bench.llms.values()] == ["none", "draft", "eagle", "cascade"]


def test_a_drafter_that_fails_has_a_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    narrow = head_of(tmp_path / "narrow", hidden_size=192)
    broken = head_of(tmp_path / "broken", num_hidden_layers=3)
    options = (*FLAGS, "--drafters", "narrow,broken", "--head", str(narrow), "--head", str(broken))
    assert cli(["bench", "drafters", *options, "--json"]) == 3
    text, notes = capfd.readouterr()
    plain, *failed = json.loads(text)["rows"]
    assert plain["equal_to_plain"]
    assert [row["drafter"] for row in failed] == ["narrow", "broken"]
    assert all(row.keys() >= ROW and row["error"] and row["acceptance_length"] is None for row in failed)
    assert "for a model of width 192" in failed[0]["error"]
    assert "error: narrow, broken failed" in notes


def test_a_drafter_that_fails_on_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generate, calls = LLM.generate, []

    def failing(self: LLM, *arguments: Any) -> Any:
        if self.config.method == "lookup":
            calls.append(1)
            if len(calls) > 3:  # the warm-up, then both settings of the first prompt
                raise RuntimeError("no luck\nat all")
        return generate(self, *arguments)

    monkeypatch.setattr(LLM, "generate", failing)
    heard: list[str] = []
    options = {**QUICK, "out": tmp_path / "out", "drafters": ("lookup",)}
    report = drafters.run(DraftersBench(**options), heard.append)
    assert report["rows"][1]["error"] == "RuntimeError: no luck"
    assert "lookup fails: RuntimeError: no luck" in heard
    assert (report["prompts"], report["rows"][0]["prompts"]) == (2, 2)
    assert "failed: RuntimeError: no luck" in drafters_page.html(report | {"model": "default"})


def test_what_was_interrupted_goes_on(tmp_path: Path) -> None:
    config = DraftersBench(**QUICK, out=tmp_path / "out", drafters=("lookup",))
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 6  # of two drafters, two texts each a prompt: in the middle of the second one

    first = drafters.run(config, lambda line: None, stop)
    assert (first["prompts"], first["complete"]) == (1, False)
    log = tmp_path / "out/log.jsonl"
    with open(log, "a") as file:
        file.write('{"id": 1, "fou')  # a line that was being written when power failed
    heard: list[str] = []
    second = drafters.run(config, heard.append)
    assert "going on after 1 of 2 prompts" in heard
    assert second["complete"]
    assert [json.loads(line).get("id") for line in log.read_text().splitlines()] == [None, 0, 1]
    with pytest.raises(UsageError, match="a run with other settings"):
        drafters.run(
            DraftersBench(**{**QUICK, "seed": 1}, out=tmp_path / "out", drafters=("lookup",)), lambda line: None
        )
    log.write_text("[]\n[]\n")
    with pytest.raises(UsageError, match="is not the log of such a run"):
        drafters.run(config, lambda line: None)


def test_ctrl_c_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    generate, calls = LLM.generate, []

    def interrupted(self: LLM, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # a warm-up, the two texts of the first prompt, and then
            os.kill(os.getpid(), signal.SIGINT)
        return generate(self, *arguments)

    monkeypatch.setattr(LLM, "generate", interrupted)
    options = ("bench", "drafters", *FLAGS, "--drafters", "none", "--out", str(tmp_path / "out"))
    assert cli(list(options)) == 130
    text, notes = capfd.readouterr()
    assert "1 prompts" in text
    assert "go on with: quantspec bench drafters" in notes
    assert json.loads((tmp_path / "out/drafters.json").read_text())["complete"] is False


def test_text_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    sample: Callable[..., dict[str, Any]] = drafters._sample
    monkeypatch.setattr(drafters, "_sample", lambda runs, plain: sample(runs, plain) | {"equal": runs[0] is plain})
    assert cli(["bench", "drafters", *FLAGS, "--drafters", "lookup"]) == 5
    text, notes = capfd.readouterr()
    assert "no (4 texts)" in text
    assert "error: the text of lookup differs" in notes


def test_loops_are_left_out_of_figures() -> None:
    def found(distinct: float, forwards: int) -> drafters.Prompt:
        sample = {"distinct": distinct, "new_tokens": 9, "target_forwards": forwards, "equal": True}
        return {"none": {"greedy": sample, "sampled": sample}}

    done = {0: found(1.0, 4), 1: found(0.59, 1), 2: found(0.6, 8)}
    assert drafters._loops(done, "greedy") == {1}
    assert drafters._lengths(drafters._of(done, "none", "greedy")) == [(8, 4), (8, 8)]


def test_which_drafters_there_are(tmp_path: Path) -> None:
    head, inner = head_of(tmp_path / "mine"), FAMILY / "eagle-intermediate"
    names = {one.name: one.options for one in find(DraftersBench(head=(str(head),)), lambda line: None)}
    assert {"none", "lookup", "draft", "eagle", "cascade", "mine"} <= names.keys()
    assert names["mine"] == {"method": "eagle", "head": str(head)}
    # Without a family: what needs no parts, and what is named.
    alone = DraftersBench(model=str(FAMILY / "target-w4"), head=(str(head),), draft_model="default/intermediate-w4")
    assert [one.name for one in find(alone, no_notes)] == ["none", "lookup", "draft", "mine"]
    within = DraftersBench(
        model=str(FAMILY / "target-w4"), head=(str(inner),), draft_model=str(FAMILY / "intermediate-w4")
    )
    assert find(within, no_notes)[-1].options["method"] == "cascade"
    with pytest.raises(UsageError, match="there is no drafter 'eagel' here"):
        find(DraftersBench(drafters=("eagel",)), lambda line: None)
    with pytest.raises(UsageError, match="two heads are named mine"):
        find(DraftersBench(head=(str(head), str(head))), lambda line: None)


def test_heads_of_the_family_that_no_method_names() -> None:
    found = _more_heads({FAMILY / "eagle-target"})
    assert "default/eagle-intermediate" in found
    assert not {"default/eagle-target", "default/target", "default/intermediate-w4"} & set(found)


def test_prompts(tmp_path: Path) -> None:
    bundled = drafters.questions(drafters.HELD_OUT, 1000)
    assert len(set(bundled)) == 100
    assert all(prompt.startswith("Question: ") and prompt.endswith("\nAnswer:") for prompt in bundled)
    file = tmp_path / "mine.jsonl"
    for text in ('{"text": "x"}', "[1]", "no JSON", ""):
        file.write_text(text)
        with pytest.raises(ModelError):
            drafters.questions(file, 1)
    with pytest.raises(UsageError, match="cannot read"):
        drafters.questions(tmp_path, 1)


@pytest.mark.parametrize(
    "options, code, complaint",
    [
        (("--limit", "0"), 2, "--limit must be at least 1"),
        (("--rounds", "0"), 2, "rounds must be at least 1"),
        (("--prompts", "nowhere.jsonl"), 2, "cannot read nowhere.jsonl"),
        (("--model", "nowhere"), 3, "no model folder at nowhere"),
        (("--out", "/proc/self/x"), 4, "cannot write"),
    ],
)
def test_misuse(options: tuple[str, ...], code: int, complaint: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(["bench", "drafters", *FLAGS, *options]) == code
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert complaint in errors[0]
