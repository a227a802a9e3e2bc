"""``quantspec train``: the command line around the recipes, on a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantspec.calibrate.train.config import FamilyConfig, LMConfig, Optim, RunOptions
from quantspec.cli.options import assemble, field_names
from quantspec.cli.train import train

TEXT = "Question: a baker has 24 rolls and sells {} of them. How many are left?\nAnswer: 24 minus {} is {}.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rolls.txt"
    path.write_text("<|doc|>\n".join(TEXT.format(i, i, 24 - i) for i in range(24)) * 3)
    return path


def test_tokenizer_then_lm(call, text: Path, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "lm"
    made = call("train", "tokenizer", "--data", f"{text}:1.0", "--out", corpus, "--vocab-size", 300)
    assert made.code == 0, made.err
    assert json.loads(made.out)["vocab_size"] == 300
    options = ("--role", "intermediate", "--steps", 2, "--batch", 2, "--seq-len", 32, "--threads", 1)
    trained = call("train", "lm", "--corpus", corpus, "--out", out, *options)
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["steps"] == 2
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}


def test_an_interrupted_recipe_says_how_to_go_on(
    call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantspec.calibrate.train import corpus

    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "build_corpus", interrupt)
    arguments = ("train", "tokenizer", "--data", text, "--out", tmp_path / "corpus")
    result = call(*arguments)
    assert (result.code, result.out) == (130, "")
    assert result.error.endswith(f"hint: go on with: quantspec {' '.join(map(str, arguments))}")


def test_defaults_come_from_the_config_of_each_recipe() -> None:
    """Recipes share option names but not defaults, and nested dataclasses keep the defaults their owner gives them."""
    parsed = train.commands["family"].make_context("family", ["--data", ".", "--work", "w", "--out", "o"]).params
    config = assemble(FamilyConfig, parsed)
    assert config == FamilyConfig(config.sources, Path("w"), Path("o"))
    parsed = train.commands["lm"].make_context("lm", ["--corpus", "c", "--out", "o", "--lr", "0.5"]).params
    built = assemble(LMConfig, parsed, shape=None)
    assert built == LMConfig(Path("c"), Path("o"), None, Optim(minutes=50.0, lr=0.5), RunOptions())  # type: ignore[arg-type]
    assert field_names(Optim) <= field_names(LMConfig)
