"""Tiny random models made by transformers, one per architecture and feature, and helpers to compare with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.packing import pack_weight
from quantspec.numerics.scheme import Scheme

VOCAB = 160

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SLIDING_FIRST_AND_LAST = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-mha": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases-wide-heads": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 48, "num_key_value_heads": 1},
    ),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral-window": ("mistral", {"sliding_window": 9, "head_dim": 32}),
    "mistral-wide-window": ("mistral", {"sliding_window": 150}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-bias-layer-types": ("qwen3", {"head_dim": 16, "attention_bias": True, **SLIDING_FIRST_AND_LAST}),
}


class Pair:
    """A checkpoint folder and the transformers model that wrote it."""

    def __init__(self, folder: Path, module: Any) -> None:
        self.folder, self.module = folder, module

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """transformers' logits ``[n, V]`` of a whole text."""
        return self.module(torch.tensor([tokens]), use_cache=False).logits[0]


def make_pair(folder: Path, architecture: str, **options: Any) -> Pair:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **(BASE | options))
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # biases start at 0 and norms at 1, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    module.save_pretrained(folder)
    return Pair(folder, module)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def packed_and_dense(source: Path, out: Path, scheme: Scheme) -> dict[str, Path]:
    """A checkpoint quantized to ``scheme``, and the dense one that it stands for. One layer's MLP stays dense in both,
    as an ignore list would have it."""
    packed, dense = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_proj.weight" in name and "layers.1.mlp" not in name:
            quantized = quantize(tensor, scheme)
            dense[name] = dequantize(quantized)
            packed |= {name.removesuffix("weight") + suffix: part for suffix, part in pack_weight(quantized).items()}
        else:
            dense[name] = packed[name] = tensor
    folders = {}
    for name, tensors in (("packed", packed), ("dense", dense)):
        folders[name] = Path(shutil.copytree(source, out / name))
        save_file(tensors, folders[name] / "model.safetensors", {"format": "pt"})
    channel = scheme.group_size == -1
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric}
    weights |= {"strategy": "channel" if channel else "group", "group_size": None if channel else scheme.group_size}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    change_config(folders["packed"], quantization_config=quantization)
    return folders


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Name in ``MODELS`` to its pair, made once."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            architecture, options = MODELS[name]
            made[name] = make_pair(tmp_path_factory.mktemp(name), architecture, **options)
        return made[name]

    return get


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models gain nothing from threads, and lose much to them on a busy machine."""
    torch.set_num_threads(1)
