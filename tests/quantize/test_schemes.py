"""Quantizing to other schemes: 8-bit activations, LM head and embedding in few bits, widths under a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantspec.calibrate.quantize.config import Event, QuantizeConfig, Sensitivity
from quantspec.calibrate.quantize.estimate import estimate
from quantspec.calibrate.quantize.layer import STAGES
from quantspec.calibrate.quantize.methods import nf4
from quantspec.calibrate.quantize.plan import Plan
from quantspec.calibrate.quantize.run import run
from quantspec.calibrate.quantize.sensitivity import (
    linear_sizes,
    mean_bits,
    measure,
    narrowest,
    solve,
)
from quantspec.calibrate.quantize.stream import StreamedModel
from quantspec.errors import Unavailable, UsageError
from quantspec.models import atomic
from quantspec.models.config import ModelConfig
from quantspec.models.load import load_model
from quantspec.models.tensors import TensorStore
from quantspec.numerics.activations import round_activations
from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.packing import unpack_weight
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch

Configure = Callable[..., QuantizeConfig]
TOKENS = torch.randint(3, 64, (48,), generator=torch.Generator().manual_seed(1)).tolist()


def logits(folder: Path, **kernels: Any) -> torch.Tensor:
    model = load_model(folder, **kernels)
    return model.forward(Batch.chain(TOKENS), [model.new_cache(64, 4)]).logits


def untied(model: Path) -> Path:
    """The model with an LM head of its own."""
    tensors = {name: TensorStore(model).get(name) for name in TensorStore(model)}
    head = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)).bfloat16() / 8
    atomic.save_tensors(model / "model.safetensors", tensors | {"lm_head.weight": head})
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    return model


@pytest.mark.parametrize("bits,group", [(4, 32), (8, -1)], ids=["w4a8", "w8a8"])
def test_8_bit_activations(configure: Configure, model: Path, bits: int, group: int) -> None:
    config = configure(bits=bits, group_size=group, activation_bits=8, method="rtn")
    report = run(config)
    found = json.loads((config.out / "config.json").read_text())["quantization_config"]
    assert (found["format"], found["ignore"], list(found["config_groups"])) == (
        "int-quantized",
        ["lm_head"],
        ["group_0"],
    )
    strategy = {"strategy": "group", "group_size": 32} if group == 32 else {"strategy": "channel"}
    assert found["config_groups"]["group_0"] == {
        "targets": ["Linear"],
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        "output_activations": None,
        "weights": {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **strategy},
    }
    before, after = TensorStore(model), TensorStore(config.out)
    name = "model.layers.1.mlp.down_proj"
    expected = quantize(before.get(f"{name}.weight").float(), Scheme(bits, group))
    assert torch.equal(after.get(f"{name}.weight"), expected.codes)
    assert torch.equal(after.get(f"{name}.weight_scale"), expected.scale)
    assert {key.removeprefix(name) for key in after if key.startswith(name)} == {".weight", ".weight_scale"}
    # The streamed model rounds activations as engines do, so it is near the runtime, which has finer scales.
    assert report.perplexity_before is not None
    assert report.perplexity_after is not None
    assert abs(report.perplexity_after / report.perplexity_before - 1) < 0.1
    assert load_model(config.out).row_invariant


def test_the_streamed_model_rounds_what_quantized_layers_read(configure: Configure) -> None:
    config = configure(bits=8, group_size=-1, activation_bits=8, method="rtn", ignore=("*.mlp.*",))
    run(config)
    layer = StreamedModel(config.out, "cpu").layer(1)
    assert set(layer.rounded) == {f"self_attn.{name}_proj" for name in "qkvo"}
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    rounded = layer.linear("self_attn.q_proj", x)
    assert torch.equal(
        rounded, torch.nn.functional.linear(round_activations(x), layer.weights["self_attn.q_proj.weight"])
    )
    assert torch.equal(
        layer.linear("mlp.up_proj", x), torch.nn.functional.linear(x, layer.weights["mlp.up_proj.weight"])
    )


def test_rounded_activations_are_within_half_a_step_of_their_row() -> None:
    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 40, 1e4, 0])[:, None]
    rounded = round_activations(x)
    step = x.abs().amax(1, keepdim=True) / 127
    assert ((rounded - x).abs() <= 0.5001 * step).all()  # fp32's own rounding on top
    assert torch.equal(rounded[4], x[4])
    assert all(len(row.unique()) <= 255 for row in rounded)


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_head_and_embedding_of_their_own_bits(configure: Configure, model: Path, form: str) -> None:
    untied(model)
    more = {} if form == "pack-quantized" else {"activation_bits": 8}
    config = configure(method="rtn", head_bits=8, embedding_bits=6, **more)
    report = run(config)
    found = json.loads((config.out / "config.json").read_text())["quantization_config"]
    assert (found["format"], found["ignore"]) == (form, [])
    groups = {tuple(group["targets"]): group for group in found["config_groups"].values()}
    assert {targets: group["weights"]["num_bits"] for targets, group in groups.items()} == {
        ("Linear",): 4, ("model.embed_tokens",): 6, ("lm_head",): 8,
    }  # fmt: skip
    assert groups["model.embed_tokens",]["input_activations"] is None
    before, after = TensorStore(model), TensorStore(config.out)
    quantization = ModelConfig.load(config.out).quantization
    assert quantization is not None
    for module, bits in (("lm_head", 8), ("model.embed_tokens", 6)):
        scheme = Scheme(bits, 32)
        assert quantization.scheme_of(module) == scheme
        parts = {key.removeprefix(f"{module}."): after.get(key) for key in after if key.startswith(module)}
        expected = quantize(before.get(f"{module}.weight").float(), scheme)
        assert torch.equal(dequantize(unpack_weight(parts, scheme)), dequantize(expected))
    assert report.perplexity_after is not None
    streamed = StreamedModel(config.out, "cpu")
    ids = torch.tensor([[5, 9], [60, 3]])
    assert torch.equal(
        streamed.embed(ids), dequantize(quantize(before.get("model.embed_tokens.weight").float(), Scheme(6, 32)))[ids]
    )
    exact = logits(config.out, backend="reference-exact", activations="fp32")
    # Nibbles and bytes times int8 activations: a few steps of 1/127.
    assert float((logits(config.out) - exact).norm() / exact.norm()) < 0.05


def test_a_tied_matrix_has_one_width(configure: Configure, model: Path) -> None:
    with pytest.raises(UsageError, match=r"embedding and LM head of .* are one matrix"):
        run(configure(head_bits=8, embedding_bits=4))
    config = configure(method="rtn", head_bits=8)
    run(config)
    store = TensorStore(config.out)
    assert "model.embed_tokens.weight_packed" in store
    assert not any("lm_head" in name for name in store)
    assert store.nbytes() < TensorStore(model).nbytes() / 3


def test_budget_is_kept_and_spent_where_it_pays(configure: Configure, model: Path) -> None:
    """W8 layers go where measured KL is largest, fused layers stay together, and the config names them."""
    config = configure(method="rtn", bits_per_weight=5.0, widths=(4, 8))
    report = run(config)
    assert report.bits_per_weight is not None
    assert 4.6 < report.bits_per_weight <= 5.0  # 4.5 is 4 bits in groups of 32
    bits = {layer.name: layer.bits for layer in report.layers}
    assert set(bits.values()) == {4, 8}
    for found in report.sensitivity:
        assert len({bits[name] for name in found.names}) == 1
    wide = [found.kl for found in report.sensitivity if bits[found.names[0]] == 8]
    assert max(wide) == max(found.kl for found in report.sensitivity)
    groups = json.loads((config.out / "config.json").read_text())["quantization_config"]["config_groups"]
    named = {name: group["weights"]["num_bits"] for group in groups.values() for name in group["targets"]}
    assert named == bits  # and no class among them, see Plan.quantization
    assert load_model(config.out).weight_bytes == TensorStore(config.out).nbytes()
    exact, native = logits(config.out, backend="reference-exact"), logits(config.out)
    assert float((native - exact).norm() / exact.norm()) < 0.05
    assert not (config.out / ".quantspec_sensitivity.json").exists()


def test_more_bits_per_weight_give_less_divergence(configure: Configure) -> None:
    kl = [run(configure(str(budget), method="mse", bits_per_weight=budget)).kl for budget in (3.6, 4.5, 6.5)]
    assert kl[0] > 1.5 * kl[1] > 4 * kl[2] > 0  # type: ignore[operator]


def plan_of(config: QuantizeConfig) -> tuple[StreamedModel, Plan]:
    model = StreamedModel(config.model, "cpu")
    return model, Plan.of(config, model)


def test_sensitivity_is_the_kl_of_one_stage_rounded_alone(configure: Configure, tmp_path: Path) -> None:
    """Against a whole model of which nothing else is quantized."""
    config = configure(bits_per_weight=4.5)
    model, plan = plan_of(config)
    ids = torch.randint(3, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    found = measure(model, plan, ids, 3)
    assert [one.names[0] for one in found] == [f"model.layers.{i}.{stage[0]}" for i in range(3) for stage in STAGES]
    one = found[6]  # gate and up of the second layer
    tensors = {name: model.store.get(name) for name in model.store}
    for name in one.names:
        tensors[f"{name}.weight"] = dequantize(quantize(tensors[f"{name}.weight"].float(), Scheme(3, 32)))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((config.model / "config.json").read_bytes())
    atomic.save_tensors(alone / "model.safetensors", tensors)
    divergence = []
    for row in ids:
        logs = []
        for folder in (config.model, alone):
            runs = load_model(folder, backend="reference-exact")
            batch = Batch.chain(row.tolist())
            logs.append(runs.forward(batch, [runs.new_cache(40, 1)]).logits[::4].double().log_softmax(-1))
        divergence.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
    expected = float(torch.cat(divergence).mean())
    assert expected > 1e-4
    assert abs(one.kl - expected) < 0.01 * expected  # fp32 against fp64: differences of logs near 1e-3


def test_the_rule(configure: Configure) -> None:
    config = configure(bits_per_weight=4.9, widths=(4, 8, 6))
    model, plan = plan_of(config)
    sizes = linear_sizes(model)
    assert narrowest(config, plan, sizes) == 4
    stages = [[name for name in plan.schemes if any(name.endswith(short) for short in stage) and f".{i}." in name]
              for i in range(3) for stage in STAGES]  # fmt: skip
    kl = [1.0] + [1e-9] * 11
    bits = solve(config, plan, [Sensitivity(names, each, 4) for names, each in zip(stages, kl, strict=True)], sizes)
    assert all(bits[name] == 8 for name in stages[0])  # at 6 bits its KL is 1/16, which still outweighs all others
    mean = mean_bits(plan.with_bits(bits).schemes, sizes)
    assert 4.85 < mean <= 4.9
    assert set(bits.values()) == {4, 6, 8}
    assert solve(config, plan, [Sensitivity(names, 0.0, 4) for names in stages], sizes)  # ties end too


def test_ignored_layers_count_16_bits(configure: Configure) -> None:
    config = configure(bits_per_weight=5.0, ignore=("model.layers.0.*",))
    with pytest.raises(UsageError, match="5 bits per weight cannot be reached: 2 bits take 7"):
        run(config)
    with pytest.raises(UsageError, match=r"3 bits per weight cannot be reached: 4 bits take 4\.5 with scales"):
        run(configure(bits_per_weight=3, widths=(4, 8)))


def test_a_resumed_run_keeps_the_measured_widths(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = configure("whole", bits_per_weight=4.7), configure("cut", bits_per_weight=4.7)
    run(whole)

    def stop(event: Event) -> None:
        if event.stage == "layer" and event.done == 9:
            raise KeyboardInterrupt

    with pytest.raises(Exception, match="interrupted"):
        run(cut, stop)
    file = cut.out.with_name("cut.partial") / ".quantspec_sensitivity.json"
    assert file.is_file()
    monkeypatch.setattr("quantspec.calibrate.quantize.sensitivity.measure", None)  # it must not be called
    run(cut)
    for path in sorted(whole.out.glob("*.safetensors")):
        assert path.read_bytes() == (cut.out / path.name).read_bytes()
    assert (whole.out / "config.json").read_bytes() == (cut.out / "config.json").read_bytes()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"activation_bits": 4}, "activation_bits must be 8 or 16, not 4"),
        ({"activation_bits": 8, "symmetric": False}, "8-bit activations go with symmetric weights"),
        ({"activation_bits": 8, "bits": 8}, "one scale per output channel"),
        ({"activation_bits": 8, "bits_per_weight": 4.25}, "--bits-per-weight goes with 16-bit activations"),
        ({"widths": (4, 9)}, "bits must be from 2 to 8, not 9"),
        ({"widths": (), "bits_per_weight": 4.25}, "no widths to choose among"),
    ],
)
def test_impossible_schemes(configure: Configure, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        configure(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"bits": 8}, "NF4 has bits 4 alone"),
        ({"symmetric": False}, "NF4 has symmetric True alone"),
        ({"head_bits": 8}, "head_bits does not go with NF4"),
        ({"bits_per_weight": 4.25}, "bits_per_weight does not go with NF4"),
    ],
)
def test_nf4_has_no_other_scheme(configure: Configure, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        configure(method="nf4", **options)


def test_nf4_without_its_package_is_one_line(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "the package bitsandbytes is not installed"
    monkeypatch.setattr(nf4, "lacking", lambda package, oldest: missing if package == "bitsandbytes" else None)
    config = configure(method="nf4")
    with pytest.raises(Unavailable, match=f"^NF4 is made by bitsandbytes: {missing}$") as caught:
        run(config)
    assert caught.value.hint == "pip install 'quantspec[bnb]'"
    assert not config.out.with_name("out.partial").exists()


def test_nf4_is_what_transformers_makes_of_it(configure: Configure, tmp_path: Path) -> None:
    """The same codes and scales as its own quantization at load, in a folder that HFModel runs."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra bnb)")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = configure(method="nf4", ignore=("model.layers.0.mlp.*",))
    report = run(config)
    assert report.bytes_after < 0.6 * report.bytes_before  # a 24th of which is dense, and tiny layers have large tables
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))],
    )
    module = AutoModelForCausalLM.from_pretrained(
        config.model, quantization_config=how, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    module.save_pretrained(tmp_path / "theirs")
    ours, theirs = TensorStore(config.out), TensorStore(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for name in ours:
        if "quant_state" not in name:  # JSON, whose keys may come in any order
            assert torch.equal(ours.get(name), theirs.get(name)), name
    model = load_model(config.out)
    assert model.backend == "transformers"
    a, b = logits(config.out), logits(tmp_path / "theirs")
    assert float((a - b).abs().max()) < 1e-5  # one model twice
    assert report.perplexity_after is not None


def test_a_rotation_parts_a_tied_matrix(configure: Configure) -> None:
    config = configure(method="rtn", rotate=True, head_bits=8, embedding_bits=6)
    run(config)
    quantization = ModelConfig.load(config.out).quantization
    assert quantization is not None
    assert (quantization.scheme_of("lm_head"), quantization.scheme_of("model.embed_tokens")) == (
        Scheme(8, 32),
        Scheme(6, 32),
    )
    exact = logits(config.out, backend="reference-exact")
    # Int8 activations and 8-bit products: a few steps of 1/127.
    assert float((logits(config.out) - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"activation_bits": 8},
        {"activation_bits": 8, "bits": 8, "group_size": -1},
        {"head_bits": 8},
        {"bits": 3, "symmetric": False},
    ],
)
def test_bytes_are_known_beforehand(configure: Configure, options: dict[str, Any]) -> None:
    config = configure(method="rtn", **options)
    report = run(config)
    # Shapes are stored beside packed weights, 16 bytes each, which a tiny model's bytes show.
    assert abs(report.bytes_after / estimate(config).bytes_after - 1) < 0.01
