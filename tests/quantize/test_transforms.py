"""AWQ, SmoothQuant and rotation: no logit changes before anything is rounded, in any architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_transform import write_transformed

from quantspec.calibrate.quantize.config import Event, MethodOptions, QuantizeConfig
from quantspec.calibrate.quantize.methods.registry import METHODS
from quantspec.calibrate.quantize.observe import Statistics
from quantspec.calibrate.quantize.run import run
from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.calibrate.quantize.transforms import awq
from quantspec.calibrate.quantize.transforms.awq import activation_factors
from quantspec.calibrate.quantize.transforms.sites import magnitude
from quantspec.calibrate.quantize.transforms.smooth import smoothing_factors
from quantspec.errors import Interrupted, ModelError, UsageError
from quantspec.models import atomic
from quantspec.models.load import load_model
from quantspec.models.tensors import TensorStore
from quantspec.numerics.affine import dequantize
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch

Configure = Callable[..., QuantizeConfig]
HIDDEN, WIDE, HEADS, HEAD_DIM, VOCAB, LAYERS = 48, 96, 4, 16, 40, 2
IDS = torch.randint(VOCAB, (4, 24), generator=torch.Generator().manual_seed(5))
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama with biases, untied, no shared values": {
        "model_type": "llama", "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True,
    },
    "mistral with a window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "awq": {"method": "awq"},
    "smooth": {"method": "rtn", "options": MethodOptions(smooth=0.5)},
    "rotate": {"method": "rtn", "rotate": True},
    "rotate, awq, key factors": {"method": "awq", "rotate": True, "kv_cache_dtype": "int8"},
}


def write_shape(folder: Path, shape: str) -> Path:
    """A random fp32 model of that shape, with norms, biases and activations that are far from even."""
    raw = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": HEAD_DIM, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **SHAPES[shape],
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    kind, kv, q = raw["model_type"], raw["num_key_value_heads"] * HEAD_DIM, HEADS * HEAD_DIM
    sizes = {"self_attn.q_proj": (q, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN)}
    sizes |= {"self_attn.o_proj": (HIDDEN, q), "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN)}
    sizes |= {"mlp.down_proj": (HIDDEN, WIDE)}
    biased = set(sizes) if raw.get("mlp_bias") else set(list(sizes)[:3]) if kind == "qwen2" else set()
    g = torch.Generator().manual_seed(0)

    def norm(size: int) -> torch.Tensor:
        return torch.exp(0.7 * torch.randn(size, generator=g))

    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=g), "model.norm.weight": norm(HIDDEN)}
    if not raw["tie_word_embeddings"]:
        tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN, generator=g)
    for i in range(LAYERS):
        stem = f"model.layers.{i}."
        for name, (rows, columns) in sizes.items():
            tensors[f"{stem}{name}.weight"] = torch.randn(rows, columns, generator=g) * columns**-0.5
            if name in biased:
                tensors[f"{stem}{name}.bias"] = torch.randn(rows, generator=g)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}{name}.weight"] = norm(HIDDEN)
        if kind == "qwen3":
            tensors |= {f"{stem}self_attn.{x}_norm.weight": norm(HEAD_DIM) for x in "qk"}
    atomic.save_tensors(folder / "model.safetensors", tensors)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, backend="reference-fast")
    ids = IDS[0].tolist()
    return model.forward(Batch.chain(ids, num_logits=len(ids)), [model.new_cache(len(ids), 0)]).logits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_logits_stay(tmp_path: Path, shape: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The search may find that nothing is best; here something is to be folded.
    monkeypatch.setattr(
        awq, "search_exponent", lambda layer, site, *_: (0.5, activation_factors(magnitude(_[-1], site).mean, 0.5))
    )
    source = write_shape(tmp_path / "source", shape)
    said = write_transformed(source, tmp_path / "out", IDS, group_size=16, **OPTIONS[options])
    before, after = logits(source), logits(tmp_path / "out")
    # Logits up to 20; a few hundred fp32 operations on numbers of that size, factors of 1e-4 to 1e4 among them.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    stored = TensorStore(tmp_path / "out")
    assert not torch.equal(stored.get("model.layers.0.mlp.up_proj.weight"),
                           TensorStore(source).get("model.layers.0.mlp.up_proj.weight"))  # fmt: skip
    if "rotate" in options:
        assert "lm_head.weight" in stored
        assert torch.equal(stored.get("model.norm.weight"), torch.ones(HIDDEN))
    if options in ("awq", "smooth"):
        for sites in said:
            assert len(sites) == 7
            shared = "no shared values" not in shape
            assert isinstance(sites["self_attn.o_proj"], str if shared else float)
            assert all(isinstance(found, float) for name, found in sites.items() if name != "self_attn.o_proj")


def test_rotation_spreads_outliers(tmp_path: Path) -> None:
    """One channel of the residual stream towers over the others, as trained models have them."""
    source = write_shape(tmp_path / "source", "llama")
    tensors = {name: TensorStore(source).get(name) for name in TensorStore(source)}
    tensors["model.embed_tokens.weight"][:, 7] *= 30
    atomic.save_tensors(source / "model.safetensors", tensors)
    write_transformed(source, tmp_path / "out", IDS, method="rtn", rotate=True)
    for folder, low, high in ((source, 20, 1e9), (tmp_path / "out", 0, 3)):
        channels = StreamedModel(folder, "cpu").embed(IDS).flatten(0, 1).square().mean(0).sqrt()
        assert low < channels.max() / channels.median() < high


def test_awq_beats_plain_rounding_where_activations_differ(tmp_path: Path) -> None:
    """Inputs of some channels are ten times those of others, and their weights as large as all."""
    model = StreamedModel(write_shape(tmp_path / "source", "llama"), "cpu")
    layer, hidden, scheme = model.layer(0), model.embed(IDS), Scheme(3, 16, True, "float32")
    layer.weights["input_layernorm.weight"] = torch.ones(HIDDEN).index_fill(0, torch.arange(0, HIDDEN, 6), 10.0)

    def error() -> float:
        inputs = layer.attention_input(hidden)
        exact, kept = layer.attend(inputs), dict(layer.weights)
        seen = Statistics.of({"hessian"}, HIDDEN).add_all([inputs])
        for name in (f"self_attn.{x}_proj" for x in "qkv"):
            solution = METHODS["mse"].quantize_linear(name, kept[f"{name}.weight"], scheme, seen, MethodOptions())
            layer.weights[f"{name}.weight"] = dequantize(solution.quantized)
        rounded = layer.attend(inputs)
        layer.weights |= kept
        return float((rounded - exact).square().mean())

    plain = error()
    folded = awq.scale_by_activations(layer, hidden, lambda name: scheme, MethodOptions())
    assert 0 < float(folded.sites["self_attn.q_proj"]) < 1
    assert error() < 0.95 * plain  # 0.80 here


def test_factors() -> None:
    mean = torch.tensor([0.0, 0.01, 1.0, 4.0])
    factors = activation_factors(mean, 0.5)
    assert factors.isfinite().all()
    assert float(factors.max() * factors.min()) == pytest.approx(1)
    assert float(factors[3] / factors[2]) == pytest.approx(2)
    assert torch.equal(activation_factors(mean, 0.0), torch.ones(4))
    assert torch.equal(activation_factors(torch.zeros(3), 0.5), torch.ones(3))
    weights = torch.tensor([1.0, 1.0, 4.0, 0.0])
    smooth = smoothing_factors(mean, weights, 0.5)
    assert smooth.isfinite().all()
    assert float(smooth[2] / smooth[1]) == pytest.approx(5)  # sqrt(100 / 4)
    assert torch.equal(smoothing_factors(torch.zeros(4), torch.zeros(4), 0.5), torch.ones(4))


def test_the_report_names_the_sites(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    monkeypatch.setattr(awq, "_GRID", 5)
    config = configure("awq", method="awq", ignore=("model.layers.1.mlp.down_proj",))
    report = run(config, events.append)
    found = {layer.name: layer.scaled for layer in report.layers}
    assert all(isinstance(found[f"model.layers.{i}.mlp.up_proj"]["awq"], float) for i in range(3))
    assert "query heads" in str(found["model.layers.0.self_attn.o_proj"]["awq"])
    notes = [event.message for event in events if "awq leaves" in event.message]
    assert len(notes) == 1  # not once for every layer
    assert "model.layers.0.self_attn.o_proj" in notes[0]
    assert run(config).layers == report.layers  # read back from the finished output
    assert found["model.layers.1.self_attn.q_proj"]["awq"] == found["model.layers.1.self_attn.v_proj"]["awq"]
    before, after = (TensorStore(folder) for folder in (config.model, config.out))
    for i in range(3):
        for norm, reader in (("input", "self_attn.q_proj"), ("post_attention", "mlp.up_proj")):
            name = f"model.layers.{i}.{norm}_layernorm.weight"
            scaled = found[f"model.layers.{i}.{reader}"]["awq"] != 0
            assert torch.equal(before.get(name), after.get(name)) != scaled
    assert any(layer["awq"] for name, layer in found.items() if name.endswith("mlp.down_proj"))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_rotated_run(configure: Configure, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation goes with every method; what comes out loads like any checkpoint, and says that it was rotated."""
    monkeypatch.setattr(awq, "_GRID", 3)
    config = replace(configure("rotated", method=method, bits=8), rotate=True)
    report = run(config)
    assert report.perplexity_before is not None
    # bf16 embeddings and 8-bit weights of a random model; a wrong rotation gives a perplexity near the vocabulary's 64.
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=0.02)
    assert report.top1_agreement is not None
    assert report.top1_agreement > 0.9
    raw = json.loads((config.out / "config.json").read_text())
    assert raw["tie_word_embeddings"] is False
    assert "lm_head.weight" in TensorStore(config.out)
    rotation = load_model(config.out).rotation  # type: ignore[attr-defined]
    assert rotation is not None
    assert rotation.name == raw["quantspec_rotation"]
    assert torch.equal(rotation.final_norm, TensorStore(config.model).get("model.norm.weight").float())
    with pytest.raises(UsageError, match="exists already"):
        run(replace(config, rotate=False))


def test_what_does_not_go_together_is_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="scale the same channels"):
        configure(method="awq", options=MethodOptions(smooth=0.5))
    with pytest.raises(UsageError, match="from 0 to 1"):
        MethodOptions(smooth=1.5)


def test_inputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = write_shape(tmp_path / "source", "llama")
    tensors = {name: TensorStore(source).get(name) for name in TensorStore(source)}
    tensors["model.layers.1.input_layernorm.weight"][3] = float("inf")
    atomic.save_tensors(source / "model.safetensors", tensors)
    with pytest.raises(ModelError, match=r"inputs of self_attn\.q_proj are NaN or Inf"):
        write_transformed(source, tmp_path / "out", IDS, group_size=16, method="awq")


def test_smoothing_helps_8_bit_activations(configure: Configure, model: Path) -> None:
    """Four channels of each norm tower over the others, and would set the scale of every token."""
    tensors = {name: TensorStore(model).get(name) for name in TensorStore(model)}
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::16] *= 40
    for i in range(3):  # what reads them makes up for it, so that the logits stay what they were
        for linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            tensors[f"model.layers.{i}.{linear}.weight"][:, ::16] /= 40
    atomic.save_tensors(model / "model.safetensors", tensors)
    options = {"method": "rtn", "bits": 8, "group_size": -1, "activation_bits": 8}
    plain = run(configure("plain", **options))
    smooth = run(configure("smooth", **options, options=MethodOptions(smooth=0.5)))
    assert plain.kl is not None
    assert smooth.kl is not None
    assert smooth.kl < 0.5 * plain.kl
    assert {found for layer in smooth.layers for found in layer.scaled.values() if isinstance(found, float)} == {0.5}


def test_a_rotated_run_that_was_cut_goes_on(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "_GRID", 3)

    def stop(event: Event) -> None:
        if event.done == 8:
            raise KeyboardInterrupt

    whole, cut = (replace(configure(name, method="awq"), rotate=True) for name in ("whole", "cut"))
    report = run(whole)
    with pytest.raises(Interrupted):
        run(cut, stop)
    assert [layer.scaled for layer in run(cut).layers] == [layer.scaled for layer in report.layers]
    for file in (*whole.out.glob("*.safetensors"), whole.out / "config.json"):
        assert file.read_bytes() == (cut.out / file.name).read_bytes()
