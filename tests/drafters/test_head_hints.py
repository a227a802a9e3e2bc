"""What a user is told to do about a head's files: every refusal of a wrong map, name or missing part has a hint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantspec.drafters.eagle3_files import read_eagle3
from quantspec.drafters.eagle_head import read_head
from quantspec.drafters.medusa_files import read_medusa
from quantspec.drafters.peagle_files import read_peagle
from quantspec.errors import ModelError
from quantspec.models.resolve import resolve

Change = Callable[[dict[str, Tensor]], Any]
READERS: dict[str, Callable[[Path], Any]] = {
    "default/eagle-target": read_head,
    "default/eagle3-target": read_eagle3,
    "default/peagle-target": read_peagle,
    "default/medusa-target": read_medusa,
}


def refused(folder: Path, shipped: str, config: dict[str, Any], change: Change = lambda tensors: None) -> str:
    """Message and hint for a shipped head whose config or tensors were changed."""
    folder.mkdir()
    source = resolve(shipped)
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        READERS[shipped](folder)
    assert "\n" not in str(caught.value)
    return f"{caught.value} hint: {caught.value.hint}"


@pytest.mark.parametrize("shipped", READERS)
def test_own_section(tmp_path: Path, shipped: str) -> None:
    text = refused(tmp_path / "base", shipped, {"quantspec": {"base": 5}})
    assert "quantspec.base must be a string, not 5 hint: write it in quotes, or leave base out" in text
    text = refused(tmp_path / "tau", shipped, {"quantspec": {"tau": {"0.8": "warm"}}})
    assert "quantspec.tau must map temperatures to numbers above 0" in text
    assert 'hint: write it like {"0.8": 0.6, "1": 0.5}' in text


def mapped(**maps: Tensor) -> Change:
    return lambda tensors: tensors.update(maps)


def test_vocabulary_maps(tmp_path: Path) -> None:
    stored = load_file(resolve("default/eagle3-target") / "model.safetensors")
    raw = json.loads((resolve("default/eagle3-target") / "config.json").read_text())
    size, vocab = raw["draft_vocab_size"], raw["vocab_size"]
    d2t = stored.get("d2t", torch.zeros(size, dtype=torch.int64))
    text = refused(tmp_path / "float", "default/eagle3-target", {}, mapped(d2t=d2t.float()))
    assert f"d2t must be {size} whole numbers" in text
    assert "hint: store it as int64" in text
    wrong = torch.zeros(vocab, dtype=torch.bool)
    text = refused(tmp_path / "t2d", "default/eagle3-target", {}, mapped(d2t=d2t, t2d=wrong))
    assert "t2d and d2t name different tokens hint: t2d holds" in text


def test_token_map_out_of_range(tmp_path: Path) -> None:
    raw = json.loads((resolve("default/medusa-target") / "config.json").read_text())
    size = raw.get("truncated_vocab_size") or raw["vocab_size"]
    text = refused(tmp_path / "head", "default/medusa-target", {}, mapped(token_map=torch.arange(size) + 10**6))
    assert "token_map names tokens outside the target's" in text
    assert "hint: it holds target ids, not offsets" in text


def test_parallel_head_without_its_mask(tmp_path: Path) -> None:
    text = refused(tmp_path / "head", "default/peagle-target", {}, lambda tensors: tensors.pop("mask_hidden"))
    assert "has no tensor mask_hidden hint: a P-EAGLE head brings what stands for streams not seen yet" in text
