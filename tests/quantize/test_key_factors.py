"""Factors of key channels: the same attention, keys that are alike, and a checkpoint that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantspec.calibrate.quantize.config import MethodOptions, QuantizeConfig
from quantspec.calibrate.quantize.layer import DecoderLayer, rms_norm
from quantspec.calibrate.quantize.run import run
from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.calibrate.quantize.transforms.key_factors import fold_key_factors, key_factors
from quantspec.errors import ModelError
from quantspec.models.config import KV_CALIBRATED, ModelConfig
from quantspec.models.load import load_model
from quantspec.numerics.kv import KVFormat
from quantspec.types import Batch

Configure = Callable[..., QuantizeConfig]
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 32


def make_layer(architecture: str) -> DecoderLayer:
    """A layer with three key channels that tower over the others, as trained models have them."""
    raw: dict[str, Any] = {
        "model_type": architecture, "vocab_size": 8, "hidden_size": HIDDEN, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
    }  # fmt: skip
    g = torch.Generator().manual_seed(1)
    sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    weights = {f"self_attn.{n}_proj.weight": torch.randn(size, HIDDEN, generator=g) / 8 for n, size in sizes.items()}
    weights["input_layernorm.weight"] = torch.ones(HIDDEN)
    loud = torch.tensor([3, 20, 41])
    weights["self_attn.k_proj.weight"][loud] *= 30
    if architecture == "qwen2":
        weights |= {f"self_attn.{n}_proj.bias": torch.randn(size, generator=g) for n, size in sizes.items()}
        weights["self_attn.k_proj.bias"][loud] *= 30
    if architecture == "qwen3":
        weights |= {f"self_attn.{n}_norm.weight": 1 + 0.3 * torch.randn(HEAD_DIM, generator=g) for n in "qk"}
        weights["self_attn.k_norm.weight"][5] *= 30
    return DecoderLayer(ModelConfig.of(raw), 0, weights)


def keys_of(layer: DecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
    """``[rows, kv_heads, head_dim]`` before the rotation."""
    keys = layer.linear("self_attn.k_proj", layer.attention_input(hidden)).view(-1, KV_HEADS, HEAD_DIM)
    return rms_norm(keys, layer.weights["self_attn.k_norm.weight"], 1e-6) if layer.config.qk_norm else keys


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_attention_stays_and_4_bit_keys_gain(architecture: str) -> None:
    layer, hidden = make_layer(architecture), torch.randn(3, 40, HIDDEN, generator=torch.Generator().manual_seed(2))
    given, form = hidden.clone(), KVFormat(4, HEAD_DIM)
    before, keys = layer.attend(layer.attention_input(hidden)), keys_of(layer, hidden)
    stored = {name: weight.clone() for name, weight in layer.weights.items()}
    changed = fold_key_factors(layer, hidden, lambda name: None, MethodOptions()).changed
    assert torch.equal(hidden, given)
    # Weights times a factor and inputs by its inverse: fp32 rounds each once.
    torch.testing.assert_close(layer.attend(layer.attention_input(hidden)), before, rtol=1e-4, atol=1e-5)
    assert changed == {name for name in stored if not torch.equal(stored[name], layer.weights[name])}

    folded = keys_of(layer, hidden)
    factors = (keys / folded).mean(0)
    # Equal within a RoPE pair; a ratio of two sums that nearly cancel is off by more than its rounding.
    torch.testing.assert_close(factors[:, : HEAD_DIM // 2], factors[:, HEAD_DIM // 2 :], rtol=1e-3, atol=0)
    pairs = torch.hypot(*folded.chunk(2, -1)).amax(0)
    if not layer.config.qk_norm:  # there one factor serves all heads
        torch.testing.assert_close(pairs, pairs[:, :1].expand_as(pairs))
    # What counts is the error of a quiet channel, which loud ones drown: as a share of its own size.
    quiet = torch.ones(KV_HEADS * HEAD_DIM, dtype=torch.bool)
    quiet[[3, 20, 41, 5, 37, 19, 4, 36, 57]] = False
    plain, after = ((form.decode(form.encode(x)) - x).flatten(1)[:, quiet] for x in (keys, folded))
    share = (plain.norm() / keys.flatten(1)[:, quiet].norm(), after.norm() / folded.flatten(1)[:, quiet].norm())
    assert share[1] < 0.5 * share[0]


def test_silent_channels_and_heads_keep_their_scale() -> None:
    largest = torch.tensor([[0.0, 0.0, 0.0], [4.0, 1.0, 0.0]])
    factors = key_factors(largest)
    assert torch.equal(factors[0], torch.ones(3))
    assert factors.isfinite().all()
    torch.testing.assert_close(factors.log().mean(-1), torch.zeros(2))  # so that weights stay where they were
    assert factors[1, 0] / factors[1, 1] == pytest.approx(4)
    assert factors[1, 0] / factors[1, 2] == pytest.approx(1024)


def test_keys_that_are_not_finite_are_refused() -> None:
    layer = make_layer("llama")
    layer.weights["self_attn.k_proj.weight"][0, 0] = float("nan")
    with pytest.raises(ModelError, match="keys are NaN or Inf"):
        fold_key_factors(layer, torch.randn(1, 4, HIDDEN), lambda name: None, MethodOptions())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_checkpoint_with_factors_runs_with_int4(configure: Configure, method: str) -> None:
    """Also with a method that reads no text of its own, and for layers that stay dense."""
    config = replace(
        configure("kv", method=method, ignore=("model.layers.1.self_attn.[qkv]_proj",)), kv_cache_dtype="int4"
    )
    run(config)
    raw = json.loads((config.out / "config.json").read_text())
    assert raw[KV_CALIBRATED] is True
    assert raw["quantization_config"]["kv_cache_scheme"] is None  # other engines know no such thing
    source, out = (StreamedModel(folder, "cpu") for folder in (config.model, config.out))
    ratio = out.layer(1).weights["self_attn.q_proj.weight"] / source.layer(1).weights["self_attn.q_proj.weight"]
    assert (ratio.std(1) / ratio.mean(1)).nan_to_num().amax() < 0.01  # a row, one factor; stored in bf16
    assert ratio.mean(1).std() > 0.01
    model = load_model(config.out, kv_cache_dtype="int4")
    assert not [note for note in model.notes if "key factors" in note]
    assert model.forward(Batch.chain([3, 4, 5]), [model.new_cache(3, 0)]).logits.isfinite().all()


def test_factors_are_part_of_the_fingerprint(configure: Configure, tmp_path: Path) -> None:
    config = configure("kv", method="rtn")
    run(config)
    plain = (config.out / "config.json").read_text()
    assert KV_CALIBRATED not in plain
    other = replace(config, kv_cache_dtype="int8")
    with pytest.raises(Exception, match="exists already"):
        run(other)


def test_the_report_tells_what_the_cache_costs(configure: Configure) -> None:
    config = replace(configure("kv", method="rtn"), kv_cache_dtype="int4")
    report = run(config).kv_cache
    assert report is not None
    assert report.bytes_per_token == 3 * 2 * 2 * (8 + 4)  # layers, keys and values, heads; 16 codes and their scale
    assert report.kl > 0
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=0.2)
    assert run(config).kv_cache == report  # read back from the finished output
    assert run(configure("plain", method="rtn")).kv_cache is None
