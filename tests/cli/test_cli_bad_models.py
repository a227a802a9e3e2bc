"""Models that must not be loaded: one line, exit code 3 (2 where the request is at fault), and no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

PROMPT = "Question: a baker"


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupted_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"\x00" * 64 + path.read_bytes()[72:])


def endless_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 7 + b"\x7f" + path.read_bytes()[8:])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def edit_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def tokenizer_not_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


DAMAGES = {
    "truncated": (truncated, "safetensors"),
    "corrupted header": (corrupted_header, "safetensors"),
    "endless header": (endless_header, "safetensors"),
    "empty file": (empty_weights, "safetensors"),
    "pickle": (pickled, "safetensors"),
    "auto_map": (edit_config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "auto_map"),
    "unknown architecture": (edit_config(model_type="martian"), "martian"),
    "wrong shape": (edit_config(intermediate_size=128), "mlp."),
    "no config": (no_config, "config.json"),
    "config is not JSON": (config_not_json, "config.json"),
    "tokenizer is not a tokenizer": (tokenizer_not_json, "tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["generate", "quantize"])
def test_damaged_models(call, tiny: Path, tmp_path: Path, command: str, damage: str) -> None:
    change, expected = DAMAGES[damage]
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny, model)
    change(model)
    if command == "generate":
        result = call("generate", PROMPT, "--model", model, "--method", "none")
    else:
        result = call("quantize", model, "--out", out)
    assert (result.code, result.out) == (3, ""), result.err
    assert expected in result.error
    assert not out.exists()


@pytest.mark.parametrize("arguments", [("generate", PROMPT, "--model"), ("quantize", "--out", "out")])
def test_a_missing_folder(call, arguments: tuple[str, ...]) -> None:
    result = call(*arguments, "/no/such/model")
    assert (result.code, result.out) == (3, "")
    assert "no model folder at /no/such/model. hint: " in result.error


def test_a_drafter_with_another_tokenizer(call, tiny: Path, stranger: Path) -> None:
    result = call("generate", PROMPT, "--model", tiny, "--draft-model", stranger)
    assert (result.code, result.out) == (3, "")
    assert "tokenizer" in result.error


def test_a_prompt_longer_than_the_context(call, tiny: Path) -> None:
    result = call("generate", PROMPT * 100, "--model", tiny, "--method", "none")
    assert (result.code, result.out) == (2, "")
    assert "but the context holds 128. hint: shorten the prompt" in result.error


def test_a_method_without_its_parts(call, tiny: Path) -> None:
    result = call("generate", PROMPT, "--model", tiny, "--method", "eagle")
    assert result.code == 2
    assert "--head" in result.error
