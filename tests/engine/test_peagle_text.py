"""P-EAGLE heads through ``quantspec.load``: how one is named, by vLLM's users too, and text equal to plain decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_text import assert_plain_text

import quantspec
from quantspec.drafters.eagle3_head import Eagle3Config
from quantspec.drafters.head_keys import LAYER_KEYS
from quantspec.drafters.peagle_files import PEagleConfig, save_flat, save_speculators
from quantspec.engine.config import EngineConfig
from quantspec.engine.llm import LLM
from quantspec.errors import ModelError, UsageError
from quantspec.models.config import ModelConfig


def random_head(target: Path, folder: Path, nested: bool = False) -> Path:
    """A head of random weights and two layers that knows half of its target's tokens."""
    raw = json.loads((target / "config.json").read_text())
    layer = {key: value for key, value in raw.items() if key in LAYER_KEYS} | {"num_hidden_layers": 2}
    model = ModelConfig.of({**layer, "model_type": "llama"})
    ids = torch.arange(0, model.vocab_size, 2)
    head = Eagle3Config(model, layer, model.hidden_size, len(ids), (0, raw["num_hidden_layers"] - 1))
    config, generator = PEagleConfig(head, 1), torch.Generator().manual_seed(13)
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else 0.1 * torch.randn(shape, generator=generator)
        for name, shape in config.shapes().items()
    }
    if nested:
        save_speculators(folder, config, tensors, ids, verifier="a/target", verifier_architectures=["LlamaForCausalLM"])
    else:
        save_flat(folder, config, tensors, ids)
    return folder


@pytest.fixture(scope="module")
def heads(family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("heads")
    made = {name: str(random_head(family[name], root / name)) for name in ("target", "intermediate")}
    return made | {"nested": str(random_head(family["target"], root / "nested", nested=True))}


@pytest.mark.parametrize("kind", ["peagle", "eagle", "vllm", "cascade"])
def test_text_is_that_of_plain_decoding(family, heads, llms: dict[str, LLM], kind: str) -> None:
    """However the head is named: ``eagle`` takes any, and a cascade's too says itself of which kind it is."""
    vllm = {"method": "eagle3", "model": heads["nested"], "num_speculative_tokens": 7, "parallel_drafting": True}
    options: dict[str, Any] = {
        "peagle": {"method": "peagle", "head": heads["target"]},
        "eagle": {"head": heads["target"], "tree_depth": 3},
        "vllm": {"speculative_config": vllm},
        "cascade": {"draft_model": str(family["intermediate"]), "head": heads["intermediate"], "min_draft": 4},
    }
    llm = quantspec.load(str(family["target"]), **options[kind])
    texts, drafted = assert_plain_text(llm, llms["none"]), {"peagle": 15, "eagle": 15, "vllm": 7}
    if kind in drafted:
        counts = [(each.stats.drafted_tokens, each.stats.target_forwards) for each in texts]
        assert all(tokens <= drafted[kind] * forwards for tokens, forwards in counts)
        assert any(tokens > (drafted[kind] - 2) * forwards for tokens, forwards in counts)
    if kind != "cascade":
        assert "P-EAGLE head" in llm.describe()


def test_a_head_of_another_kind_is_refused(family, heads) -> None:
    model = str(family["target"])
    with pytest.raises(ModelError, match="is no P-EAGLE head"):
        quantspec.load(model, method="peagle", head=str(family["target_head"]))
    with pytest.raises(ModelError, match="is a P-EAGLE head") as refused:
        quantspec.load(model, speculative_config={"method": "eagle3", "model": heads["target"]})
    assert "parallel_drafting" in str(refused.value.hint)


@pytest.mark.parametrize("method", ["eagle3", "peagle"])
def test_parallel_drafting_is_peagle(method: str) -> None:
    speculative = {"method": method, "model": "org/head", "num_speculative_tokens": 6, "parallel_drafting": True}
    config = EngineConfig.from_mapping({"speculative_config": speculative})
    assert (config.method, config.head, config.max_nodes) == ("peagle", "org/head", 6)
    config = EngineConfig.from_mapping({"speculative_config": speculative | {"parallel_drafting": False}})
    assert config.method == method


@pytest.mark.parametrize(
    ("speculative", "message"),
    [
        ({"method": "draft_model", "model": "a", "parallel_drafting": True}, "does not go with method draft_model"),
        ({"method": "eagle3", "model": "a", "parallel_drafting": "yes"}, "true or false, not 'yes'"),
        ({"method": "eagle3", "model": "a", "parallel_draft": True}, "parallel_draft"),
    ],
)
def test_wrong_uses_of_it_are_told(speculative: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineConfig.from_mapping({"speculative_config": speculative})
