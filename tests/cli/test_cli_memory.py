"""``quantspec generate --dry-run``: what memory a run would take, and what to change where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantspec.models.tensors import TensorStore


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run that reads a weight fails."""
    monkeypatch.setattr(TensorStore, "get", lambda self, name: pytest.fail(f"read {name}"))


def few_bytes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    from quantspec.engine import memory

    monkeypatch.setattr(memory, "available_bytes", lambda: count)


@pytest.mark.usefixtures("nothing_is_read")
def test_dry_run_lists_what_it_would_take(call, tiny: Path, drafter: Path) -> None:
    result = call("generate", "-m", tiny, "--draft-model", drafter, "--dry-run", "-n", 20, "one two three")
    assert result.code == 0, result.err
    rows = [line.split("|")[1].strip() for line in result.out.splitlines() if line.startswith("|")]
    assert rows[2].startswith(f"target {tiny}")
    assert rows[3].startswith(f"draft model {drafter}")
    assert rows[-1] == "free on cpu"
    assert "it fits, and so do contexts of up to" in result.out


@pytest.mark.usefixtures("nothing_is_read")
def test_dry_run_counts_the_prompt_and_its_output(call, tiny: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("one two three")
    common = ("generate", "-m", tiny, "--method", "none", "--dry-run", "--json")
    alone = json.loads(call(*common).out)
    given = json.loads(call(*common, "-f", prompt, "-n", 20).out)
    several = json.loads(call(*common, "-f", prompt, "-n", 20, "--num-samples", 3).out)
    from quantspec.models.tokenizer import Tokenizer

    assert given["context"] == len(Tokenizer(tiny).encode("one two three")) + 20
    assert alone["context"] > given["context"]  # nothing said: a usual one, at most the model's
    assert several["sequences"] == 3
    assert several["running"] > given["running"]
    assert given["fits"]
    assert given["longest_context"] >= given["context"]


@pytest.mark.usefixtures("nothing_is_read")
def test_dry_run_refuses_a_prompt_that_the_run_would_refuse(call, tiny: Path) -> None:
    result = call(
        "generate", "-m", tiny, "--method", "none", "--dry-run", "--max-context", 4, "one two three four five"
    )
    assert (result.code, result.out) == (2, "")
    assert "but the context holds 4" in result.error


@pytest.mark.usefixtures("nothing_is_read")
def test_dry_run_of_what_does_not_fit_says_what_to_change(
    call, tiny: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    common = ("generate", "-m", tiny, "--draft-model", drafter, "--dry-run", "--num-samples", 8, "-n", 100, "one")
    needed = json.loads(call(*common, "--json").out)["needed"]
    few_bytes(monkeypatch, needed - 1)
    result = call(*common, "--json")
    assert result.code == 4
    record = json.loads(result.out)
    assert not record["fits"]
    assert any("--method lookup" in way for way in record["changes"])
    assert result.err.startswith("error: it takes ")
    assert "in each of 8 sequences" in result.err
    assert "hint: run 4 at a time" in result.err


def test_a_run_leaves_out_the_drafter_that_does_not_fit(
    call, tiny: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    common = ("generate", "-m", tiny, "-n", 8, "one two", "--draft-model", drafter)
    usual = call(*common)
    # What a run plans for, since nobody asks for a context here.
    few_bytes(
        monkeypatch, json.loads(call(*common[:-1], drafter, "--dry-run", "--json", "-n", 10**6).out)["needed"] - 1
    )
    less = call(*common)
    assert (usual.code, less.code) == (0, 0), less.err
    assert less.out == usual.out
    assert "going on without the drafter of method draft" in less.err


def test_a_target_that_does_not_fit_is_an_error_of_resources(
    call, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    few_bytes(monkeypatch, 1000)
    result = call("generate", "-m", tiny, "--method", "none", "one")
    assert result.code == 4
    assert result.err.count("\n") == 1
    assert "does not fit: it takes" in result.err
    assert "hint: quantize it first: quantspec quantize" in result.err
