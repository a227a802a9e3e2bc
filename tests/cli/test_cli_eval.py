"""``quantspec eval``: its report, and one line for each thing that can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from quantspec.kernels import packages

QUESTION = "Question: a baker has 24 rolls and sells 9 of them. How many are left?"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{QUESTION} {i}"}) for i in range(12)))
    return path


@pytest.fixture(scope="session")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In 4 bits. Read only."""
    from quantspec.calibrate.quantize.config import QuantizeConfig
    from quantspec.calibrate.quantize.run import run

    out = tmp_path_factory.mktemp("models") / "w4"
    run(QuantizeConfig(tiny, out, method="rtn", eval_samples=0))
    return out


def test_json_and_page(call, tiny: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = call(
        "eval", quantized, "--against", tiny, "--data", text, "--seq-len", 32, "--html", page, "--json"
    )  # fmt: skip
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["perplexity"] > 1
    assert report["tokens"] == report["rows"] * 31
    assert report["parent"]["kl"] > 0
    assert 0 < report["parent"]["top1_agreement"] < 1
    assert len(report["by_position"]) == 16
    assert report["data"] == str(text)
    assert f"{report['parent']['kl']:.4f} nats" in page.read_text()


def test_tables(call, tiny: Path, quantized: Path, text: Path) -> None:
    options = ("--data", text, "--seq-len", 32, "--backend", "reference-fast", "--kv-cache-dtype", "int8")
    result = call("eval", quantized, "--against", tiny, *options)
    assert result.code == 0, result.err
    assert "on reference-fast" in result.out
    assert "KL divergence, nats per token" in result.out
    assert "tokens of context" in result.out
    assert "\x1b" not in result.out
    alone = call("eval", quantized, *options)
    assert alone.code == 0
    assert "perplexity" in alone.out
    assert "KL" not in alone.out


def test_one_token(call, tiny: Path, tmp_path: Path) -> None:
    """And the end token that closes it: one prediction."""
    (tmp_path / "one.txt").write_text("a")
    result = call("eval", tiny, "--against", tiny, "--data", tmp_path / "one.txt", "--html", tmp_path / "p.html")
    assert result.code == 0, result.err
    assert (tmp_path / "p.html").exists()


@pytest.mark.parametrize(
    "name, content, code, said",
    [
        ("none.jsonl", None, 3, "cannot read text"),
        ("empty.jsonl", "", 3, "holds no text"),
        ("blank.txt", "  \n<|doc|>\n ", 3, "holds no text"),
        ("broken.jsonl", "{", 3, "line 1: not JSON"),
        ("columns.jsonl", '{"prompt": "a"}', 3, "line 1: no text"),
        ("bytes.txt", b"\xff\xfe", 3, "cannot read text"),
    ],
)
def test_text_that_is_none(
    call, tiny: Path, tmp_path: Path, name: str, content: str | bytes | None, code: int, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    result = call("eval", tiny, "--data", tmp_path / name)
    assert (result.code, result.out) == (code, "")
    assert said in result.error


def test_a_parent_of_another_tokenizer(call, tiny: Path, stranger: Path, text: Path) -> None:
    result = call("eval", tiny, "--against", stranger, "--data", text)
    assert (result.code, result.out) == (2, "")
    assert "another tokenizer" in result.error
    assert "hint: " in result.error


def test_a_parent_of_another_vocabulary(call, tiny: Path, stranger: Path, text: Path, tmp_path: Path) -> None:
    """The same tokenizer over a larger embedding."""
    padded = shutil.copytree(stranger, tmp_path / "padded")
    shutil.copy(tiny / "tokenizer.json", padded / "tokenizer.json")
    result = call("eval", tiny, "--against", padded, "--data", text)
    assert (result.code, result.out) == (2, "")
    assert "300 tokens in its vocabulary" in result.error


def test_models_that_are_none(call, tiny: Path, text: Path, tmp_path: Path) -> None:
    assert call("eval", tmp_path / "nothing", "--data", text).code == 3
    result = call("eval", tiny, "--against", tmp_path / "nothing", "--data", text)
    assert (result.code, result.out) == (3, "")
    assert "no model folder" in result.error


def test_kernels_that_cannot(call, tiny: Path, text: Path) -> None:
    assert call("eval", tiny, "--data", text, "--backend", "cpu-int3").code == 2
    assert call("eval", tiny, "--data", text, "--backend", "cpu-int8").code == 2  # its weights are not quantized


@pytest.mark.parametrize("place", ["folder", "missing/page.html", "text.jsonl/page.html"])
def test_a_page_that_cannot_be_written(call, tiny: Path, text: Path, tmp_path: Path, place: str) -> None:
    """Said before anything is measured."""
    (tmp_path / "folder").mkdir()
    result = call("eval", tiny, "--data", text, "--html", tmp_path / place)
    assert (result.code, result.out) == (4, "")
    assert "cannot write" in result.error


def test_a_disk_that_fills_up_meanwhile(call, tiny: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    """The figures are printed all the same."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = call("eval", tiny, "--data", text, "--html", tmp_path / "page.html", "--json")
    assert result.code == 4
    assert "no space left" in result.error
    assert json.loads(result.out)["perplexity"] > 1
    assert not list(tmp_path.glob("*page*"))


def test_tasks_without_the_harness(call, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise packages.PackageNotFoundError(package)

    monkeypatch.setattr(packages, "version", missing)
    result = call("eval", tiny, "--tasks", "hellaswag")
    assert (result.code, result.out) == (2, "")
    assert "lm_eval is not installed" in result.error
    assert "pip install 'quantspec[lm-eval]'" in result.error


@pytest.mark.parametrize(
    "options", [("--limit", 3), ("--seq-len", 1), ("--num-samples", 0), ("--tasks", "quiz", "--against", "default")]
)
def test_options_that_make_no_sense(call, tiny: Path, options: tuple[object, ...]) -> None:
    result = call("eval", tiny, *options)
    assert (result.code, result.out) == (2, "")
    assert result.error
