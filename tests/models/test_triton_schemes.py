"""Layers of several schemes, one-byte codes and a quantized vocabulary on Triton's kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantspec.models.config import ModelConfig
from quantspec.models.quantization import EMBEDDING_MODULE
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch

from .conftest import make_pair
from .test_load_schemes import logits, write

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.models.load_triton import load_triton_decoder

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 1, "vocab_size": 160, "tie_word_embeddings": True,
}  # fmt: skip
TEXT = list(range(6))


def scheme_of(module: str) -> Scheme | None:
    """Fused layers that agree and that do not; embedding and LM head in one matrix."""
    if module == EMBEDDING_MODULE or "up_proj" in module:
        return Scheme(8, 32)
    return Scheme(3 if "down" in module else 4, 32) if module.endswith("_proj") else None


def test_near_the_dense_model(tmp_path: Path, triton_device: torch.device) -> None:
    pair = make_pair(tmp_path / "source", "llama", **SMALL)
    packed, dense = write(pair.folder, tmp_path, scheme_of, "int-quantized", activation_bits=8)
    model = load_triton_decoder(packed, ModelConfig.load(packed), triton_device, torch.float32)
    found = model.forward(Batch.chain(TEXT), [model.new_cache(16, 4)]).logits.cpu()
    expected = logits(dense, backend="reference-exact")[: len(TEXT)]
    # fp32 sums of up to 48 terms in another order; a wrong code shows as 1e-2.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
