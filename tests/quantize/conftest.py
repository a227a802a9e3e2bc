"""A tiny Llama folder with a tokenizer and texts, made in milliseconds without transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from quantspec.calibrate.quantize.config import QuantizeConfig
from quantspec.models import atomic

HIDDEN, WIDE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 128, 4, 2, 16, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": WIDE, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits may depend on the number of threads; and two busy cores are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_weights(layers: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=g) * columns**-0.5).bfloat16()

    tensors = {"model.embed_tokens.weight": weight(VOCAB, HIDDEN), "model.norm.weight": torch.ones(HIDDEN).bfloat16()}
    for i in range(layers):
        stem = f"model.layers.{i}."
        for name, rows in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
            tensors[f"{stem}self_attn.{name}_proj.weight"] = weight(rows, HIDDEN)
        tensors[f"{stem}self_attn.o_proj.weight"] = weight(HIDDEN, HEADS * HEAD_DIM)
        tensors[f"{stem}mlp.gate_proj.weight"] = weight(WIDE, HIDDEN)
        tensors[f"{stem}mlp.up_proj.weight"] = weight(WIDE, HIDDEN)
        tensors[f"{stem}mlp.down_proj.weight"] = weight(HIDDEN, WIDE)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}{norm}.weight"] = (1 + 0.3 * torch.randn(HIDDEN, generator=g)).bfloat16()
    return tensors


def write_model(folder: Path, layers: int = 3) -> Path:
    """A Llama folder of random bf16 weights with a 64-word tokenizer."""
    folder.mkdir(parents=True)
    atomic.save_tensors(folder / "model.safetensors", random_weights(layers))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    vocabulary = {"<s>": 0, "</s>": 1, "?": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """40 documents of a loosely predictable word sequence."""
    rng, documents = random.Random(0), []
    for _ in range(40):
        words = [rng.randrange(3, VOCAB)]
        words += [words[-1] for _ in range(60)]
        for i in range(1, len(words)):
            words[i] = 3 + (words[i - 1] * 7 + rng.randrange(4)) % (VOCAB - 3)
        documents.append(" ".join(f"w{word}" for word in words))
    path = tmp_path / "text.txt"
    path.write_text("\n<|doc|>\n".join(documents))
    return path


@pytest.fixture
def configure(model: Path, text: Path, tmp_path: Path) -> Callable[..., QuantizeConfig]:
    def make(out: str = "out", **options: Any) -> QuantizeConfig:
        options = {"model": model, "calibration": text, "held_out": text, "group_size": 32} | options
        return QuantizeConfig(out=tmp_path / out, num_samples=24, eval_samples=4, seq_len=64, **options)

    return make
