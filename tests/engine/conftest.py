"""A family small enough to hold: random native models with one tokenizer. Drafts are sometimes right, often wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantspec
from quantspec.engine.llm import LLM
from quantspec.models.tokenizer import Tokenizer

VOCABULARY = 320
TEXT = (
    "Natalia sold 48 clips in April, and half as many in May. How many did she sell? She sold 48 / 2 = 24 in May: 72.\n"
    "def total(values): return sum(value for value in values if value > 0)\nZürich – naïve café, 東京 😀😀 ok.\n"
)


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer as Native
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Native(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _target(folder: Path, architecture: str) -> None:
    import transformers

    shape: dict[str, Any] = dict(  # noqa: C408 - reads like the config
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(5)
    if architecture == "qwen2":
        config = transformers.Qwen2Config(**shape, tie_word_embeddings=True)
    else:
        config = transformers.LlamaConfig(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Peaked rows, a few likely tokens each, as in a trained model.
    model.model.norm.weight.data.mul_(4)
    model.save_pretrained(folder)


def _perturbed(source: Path, folder: Path, noise: float) -> None:
    """A copy whose weights are off by ``noise`` of their own spread: right on part of the tokens."""
    generator = torch.Generator().manual_seed(11)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())


def _eagle_head(source: Path, folder: Path) -> None:
    """An EAGLE-1/2 head that mostly repeats its input feature and is otherwise random."""
    config = json.loads((source / "config.json").read_text())
    config.update(architectures=["LlamaForCausalLMEagle"], model_type="llama", num_hidden_layers=1)
    generator = torch.Generator().manual_seed(13)
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]

    def random(rows: int, columns: int) -> torch.Tensor:
        return 0.05 * torch.randn(rows, columns, generator=generator)

    fc = random(hidden, 2 * hidden)
    fc[:, hidden:] += torch.eye(hidden)
    tensors = {
        "fc.weight": fc,
        "layers.0.self_attn.q_proj.weight": random(hidden, hidden),
        "layers.0.self_attn.k_proj.weight": random(kv, hidden),
        "layers.0.self_attn.v_proj.weight": random(kv, hidden),
        "layers.0.self_attn.o_proj.weight": random(hidden, hidden),
        "layers.0.mlp.gate_proj.weight": random(middle, hidden),
        "layers.0.mlp.up_proj.weight": random(middle, hidden),
        "layers.0.mlp.down_proj.weight": random(hidden, middle),
        "layers.0.post_attention_layernorm.weight": torch.ones(hidden),
    }
    config["bias"] = False
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def make_family(root: Path, architecture: str = "llama") -> dict[str, Path]:
    """Folders ``target``, ``intermediate``, ``target_head`` and ``intermediate_head``."""
    folders = {name: root / name for name in ("target", "intermediate", "target_head", "intermediate_head")}
    for folder in folders.values():
        folder.mkdir()
    _target(folders["target"], architecture)
    _tokenizer(folders["target"])
    _perturbed(folders["target"], folders["intermediate"], 0.07)
    _tokenizer(folders["intermediate"])
    _eagle_head(folders["target"], folders["target_head"])
    _eagle_head(folders["intermediate"], folders["intermediate_head"])
    return folders


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def qwen_family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_family(tmp_path_factory.mktemp("qwen"), "qwen2")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    _tokenizer(folder)
    return Tokenizer(folder)


def load_all(folders: dict[str, Path], **options: Any) -> dict[str, LLM]:
    """The family's target with each method, drafts small enough for a test."""
    parts: dict[str, dict[str, str]] = {
        "none": {},
        "lookup": {},
        "draft": {"draft_model": str(folders["intermediate"])},
        "eagle": {"head": str(folders["target_head"])},
        "cascade": {"draft_model": str(folders["intermediate"]), "head": str(folders["intermediate_head"])},
    }
    small = {"tree_depth": 2, "tree_top_k": 2, "tree_nodes": 4, "min_draft": 4, "prompt_lookup_min": 1, "max_batch": 3}
    torch.set_num_threads(1)
    return {
        method: quantspec.load(str(folders["target"]), method=method, **small, **named, **options)
        for method, named in parts.items()
    }


@pytest.fixture(scope="session")
def llms(family: dict[str, Path]) -> dict[str, LLM]:
    return load_all(family)


@pytest.fixture(scope="session")
def qwen_llms(qwen_family: dict[str, Path]) -> dict[str, LLM]:
    return load_all(qwen_family)
