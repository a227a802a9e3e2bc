"""Checkpoints in every scheme through the runtime: held to the dense checkpoint that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantspec.errors import ModelError, UsageError
from quantspec.kernels import dispatch
from quantspec.kernels.cpu import library
from quantspec.models.load import load_model
from quantspec.models.quantization import EMBEDDING_MODULE, HEAD_MODULE, Format
from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.packing import byte_weight, pack_weight
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch

from .conftest import Pair, change_config

GetPair = Callable[[str], Pair]
TEXT = list(range(40))
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STORED: dict[Format, Any] = {"pack-quantized": pack_weight, "int-quantized": byte_weight}
# fp32 sums of a few hundred terms in another order differ by about 1e-6 here; a wrong code by 1e-2.
TOLERANCE = 1e-4
native = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))


def logits(folder: Path, **kernels: Any) -> torch.Tensor:
    model = load_model(folder, **kernels)
    return model.forward(Batch.chain(TEXT), [model.new_cache(64, 4)]).logits


def write(
    source: Path, out: Path, scheme_of: Callable[[str], Scheme | None], form: Format = "pack-quantized",
    activation_bits: int = 16,
) -> tuple[Path, Path]:  # fmt: skip
    """A checkpoint whose modules are quantized as ``scheme_of`` says by name, and the dense one that it stands for."""
    packed, dense = {}, {}
    names: dict[Scheme, list[str]] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        scheme = scheme_of(module) if name.endswith(".weight") and tensor.dim() == 2 else None
        if scheme is None:
            packed[name] = dense[name] = tensor
            continue
        quantized = quantize(tensor, scheme)
        dense[name] = dequantize(quantized)
        packed |= {f"{module}.{suffix}": part for suffix, part in STORED[form](quantized).items()}
        names.setdefault(scheme, []).append(module)
    folders = []
    for name, tensors in (("packed", packed), ("dense", dense)):
        folders.append(Path(shutil.copytree(source, out / name)))
        save_file(tensors, folders[-1] / "model.safetensors", {"format": "pt"})
    groups = {
        f"group_{i}": {
            "targets": modules,
            "weights": {
                "num_bits": scheme.bits,
                "symmetric": scheme.symmetric,
                **_strategy(scheme),
            },
            "input_activations": INT8 if activation_bits == 8 else None,
        }
        for i, (scheme, modules) in enumerate(names.items())
    }
    quantization = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    change_config(folders[0], quantization_config=quantization)
    return folders[0], folders[1]


def _strategy(scheme: Scheme) -> Mapping[str, Any]:
    if scheme.group_size == -1:
        return {"strategy": "channel"}
    return {"strategy": "group", "group_size": scheme.group_size}


def projections(scheme: Scheme) -> Callable[[str], Scheme | None]:
    return lambda module: scheme if module.endswith("_proj") else None


@pytest.mark.parametrize("bits,group", [(4, 32), (4, -1), (8, -1), (3, 32)])
def test_one_byte_codes_are_the_dequantized_weights(pair: GetPair, tmp_path: Path, bits: int, group: int) -> None:
    packed, dense = write(
        pair("qwen2").folder, tmp_path, projections(Scheme(bits, group)), "int-quantized", activation_bits=8
    )
    kernels = {"backend": "reference-exact", "activations": "fp32"}
    assert torch.equal(logits(packed, **kernels), logits(dense, backend="reference-exact"))


@native
@pytest.mark.parametrize("bits,group", [(4, 32), (8, -1)])
def test_int8_activations_meet_the_native_kernels(pair: GetPair, tmp_path: Path, bits: int, group: int) -> None:
    packed, dense = write(
        pair("llama").folder, tmp_path, projections(Scheme(bits, group)), "int-quantized", activation_bits=8
    )
    assert load_model(packed).backend == "cpu-int8"
    expected = logits(dense, backend="reference-exact")
    exact = logits(packed, activations="fp32")
    assert float((exact - expected).abs().max()) <= TOLERANCE
    # Int8 activations cost a few steps of 1/127; wrong codes give errors of the values' own size.
    assert float((logits(packed) - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("backend", ["reference-exact", "cpu-fp32"])
def test_a_backend_without_int8_activations_refuses_them(pair: GetPair, tmp_path: Path, backend: str) -> None:
    packed, _ = write(pair("llama").folder, tmp_path, projections(Scheme(8, -1)), "int-quantized", activation_bits=8)
    with pytest.raises(UsageError, match=f"backend {backend} cannot run this model here: computes with fp32") as caught:
        load_model(packed, backend=backend)
    assert "\n" not in str(caught.value)
    assert load_model(packed, backend="reference-exact", activations="fp32").backend == "reference-exact"


def test_without_int8_kernels_a_line_says_that_activations_stay(
    pair: GetPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, dense = write(
        pair("llama").folder, tmp_path, projections(Scheme(8, -1)), "int-quantized", activation_bits=8
    )
    without = tuple(
        replace(each, missing=lambda: "no compiler") if each.name in dispatch.NATIVE else each
        for each in dispatch.BACKENDS
    )
    monkeypatch.setattr(dispatch, "BACKENDS", without)
    model = load_model(packed)
    assert any("meant for int8 activations, which no kernel here has" in note for note in model.notes)
    assert torch.equal(logits(packed), logits(dense, backend="reference-exact"))
    with pytest.raises(UsageError, match="no kernel for 8-bit weights with int8 activations on cpu"):
        load_model(packed, activations="int8")


def mixed(module: str) -> Scheme | None:
    """Fused layers that agree, that differ in bits, and that are in part dense."""
    if "layers.0" in module:
        return Scheme(4, 32) if module.endswith("_proj") else None
    if "layers.1" in module:
        return Scheme(8 if "q_proj" in module or "down" in module else 3, 32) if module.endswith("_proj") else None
    return Scheme(5, -1) if "k_proj" in module or "o_proj" in module else None


@native
def test_layers_of_several_schemes(pair: GetPair, tmp_path: Path) -> None:
    packed, dense = write(pair("llama").folder, tmp_path, mixed)
    expected = logits(dense, backend="reference-exact")
    assert torch.equal(logits(packed, backend="reference-exact"), expected)
    assert float((logits(packed, backend="cpu-fp32") - expected).abs().max()) <= TOLERANCE
    assert float((logits(packed) - expected).norm() / expected.norm()) < 0.05
    stored = sum(tensor.nbytes for tensor in load_file(packed / "model.safetensors").values())
    assert load_model(packed).weight_bytes == stored


def test_a_backend_must_hold_every_width(pair: GetPair, tmp_path: Path) -> None:
    packed, _ = write(pair("llama").folder, tmp_path, mixed)
    with pytest.raises(UsageError, match=r"backend torch-int4 cannot run this model here: has no .-bit weights"):
        load_model(packed, backend="torch-int4", mode="fast")


@native
@pytest.mark.parametrize("name", ["llama", "qwen2"], ids=["untied", "tied"])
@pytest.mark.parametrize("form", STORED)
def test_vocabulary_of_8_bits(pair: GetPair, tmp_path: Path, name: str, form: Format) -> None:
    def scheme_of(module: str) -> Scheme | None:
        if module in (EMBEDDING_MODULE, HEAD_MODULE):
            return Scheme(8, 32)
        return Scheme(4, 32) if module.endswith("_proj") else None

    packed, dense = write(pair(name).folder, tmp_path, scheme_of, form)
    assert json.loads((packed / "config.json").read_text())["tie_word_embeddings"] == (name == "qwen2")
    expected = logits(dense, backend="reference-exact")
    assert torch.equal(logits(packed, backend="reference-exact"), expected)
    assert float((logits(packed, backend="cpu-fp32") - expected).abs().max()) <= TOLERANCE
    assert float((logits(packed) - expected).norm() / expected.norm()) < 0.05


def test_codes_beyond_their_bits_are_refused(pair: GetPair, tmp_path: Path) -> None:
    packed, _ = write(pair("llama").folder, tmp_path, projections(Scheme(4, 32)), "int-quantized", activation_bits=8)
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 9
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj: codes from -8 to 9 are not of 4 bits"):
        load_model(packed)
