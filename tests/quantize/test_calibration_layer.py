"""The calibration layer gives what transformers' layers give, for every native architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantspec.calibrate.quantize.stream import StreamedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
        ("Llama", {"rope_parameters": YARN, "tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": 9, "head_dim": 32}),
        ("Qwen2", WINDOW),
        ("Qwen3", {"head_dim": 32}),
    ],
)
def test_equals_transformers(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    reference = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**SHAPE, **options)
    ).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # norms away from one, biases away from zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        expected = reference(ids, output_hidden_states=True)

    model = StreamedModel(tmp_path, "cpu")
    hidden = model.embed(ids)
    for index in range(3):
        hidden = model.layer(index).forward(hidden)
    logits = model.final_norm(hidden) @ model.head().T
    assert (logits - expected.logits).abs().max() < 1e-4
