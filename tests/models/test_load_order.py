"""Checkpoints whose weights have activation orders, through every backend: held to their own dequantization."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gptqmodel_stand_in import install
from torch import Tensor

from quantspec.kernels.cpu import library
from quantspec.kernels.torch_int4 import TorchInt4Linear
from quantspec.models.base import CausalModel
from quantspec.models.config import ModelConfig
from quantspec.models.load import load_decoder, load_model
from quantspec.models.weights import Weights, fold_order, fuse, to_dense
from quantspec.numerics.affine import QuantizedWeight, dequantize, quantize
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch

from .conftest import Pair, make_pair, packed_and_dense

GetPair = Callable[[str], Pair]
Linears = Callable[[Weights, str, tuple[int, int]], Tensor | QuantizedWeight]
TEXT = list(range(40))
# fp32 sums of a few hundred terms in another order differ by about 1e-6 here; a wrong column by 1e-2.
TOLERANCE = 1e-4
UNFUSED = "fused layers run dequantized: their parts have schemes or activation orders of their own"
native = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))


def order_of(name: str, k: int, shared: bool) -> Tensor:
    """The same for all that read one input, or one for each."""
    layer, _, module = name.rpartition(".")
    key = f"{layer} {k}" if shared and module not in ("o_proj", "down_proj") else name
    return torch.randperm(k, generator=torch.Generator("cpu").manual_seed(zlib.crc32(key.encode())), device="cpu")


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Gives the quantized layers of whatever is loaded an order; ``shared`` as in ``order_of``."""
    stored: Linears = Weights.linear

    def install_orders(shared: bool) -> None:
        def linear(weights: Weights, name: str, shape: tuple[int, int]) -> Tensor | QuantizedWeight:
            weight = stored(weights, name, shape)
            return weight if isinstance(weight, Tensor) else replace(weight, order=order_of(name, shape[1], shared))

        monkeypatch.setattr(Weights, "linear", linear)

    return install_orders


def logits(model: CausalModel, n: int = len(TEXT)) -> Tensor:
    return model.forward(Batch.chain(TEXT[:n]), [model.new_cache(64, 4)]).logits.cpu()


def reference(folder: Path) -> Tensor:
    """What the weights say once they are dequantized."""
    return logits(load_model(folder, backend="reference-exact"))


@native
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["llama-biases-wide-heads", "qwen2", "qwen3"])
def test_native_kernels(pair: GetPair, tmp_path: Path, orders: Callable[[bool], None], name: str, shared: bool) -> None:
    packed = packed_and_dense(pair(name).folder, tmp_path, Scheme(4, 32, symmetric=False))["packed"]
    plain = reference(packed)
    orders(shared)
    expected = reference(packed)
    assert float((plain - expected).norm() / plain.norm()) > 0.1  # the order counts
    exact, fast = load_model(packed, backend="cpu-fp32"), load_model(packed)
    assert fast.backend == "cpu-int8"
    assert float((logits(exact) - expected).abs().max()) <= TOLERANCE
    assert float((logits(fast) - expected).norm() / expected.norm()) < 0.05
    # Three layers' q, k and v, and two layers' gate and up: one MLP is stored dense.
    assert [note for note in fast.notes if UNFUSED in note] == ([] if shared else [f"5 {UNFUSED}"])


@native
@pytest.mark.parametrize("activations", ["int8", "fp32"])
def test_rows_are_equal_at_any_width(
    pair: GetPair, tmp_path: Path, orders: Callable[[bool], None], activations: Any
) -> None:
    packed = packed_and_dense(pair("llama").folder, tmp_path, Scheme(4, 32))["packed"]
    orders(True)
    model = load_model(packed, activations=activations)
    text = [7 * i % model.vocab_size for i in range(64)]
    cache = model.new_cache(64, 64)
    alone = []
    for i, token in enumerate(text):
        alone.append(model.forward(Batch.chain([token], i), [cache]).logits)
        cache.commit([0])
    for width in range(1, 65):
        cache.truncate(0)
        found = model.forward(Batch.chain(text[:width]), [cache]).logits
        assert torch.equal(found, torch.cat(alone[:width])), width


def test_torch_int4(pair: GetPair, tmp_path: Path, orders: Callable[[bool], None]) -> None:
    packed = packed_and_dense(pair("llama").folder, tmp_path, Scheme(4, 32))["packed"]
    for shared in (True, False):
        orders(shared)
        cpu, config = torch.device("cpu"), ModelConfig.load(packed)
        decoder = load_decoder(packed, config, cpu, exact=False, pack=TorchInt4Linear)
        # Inputs, scales and outputs in bf16, in layers of random weights: 0.8%; columns in another order give over 10%.
        expected = reference(packed)
        assert float((logits(decoder) - expected).norm() / expected.norm()) < 0.02
        assert decoder.notes == (() if shared else (f"5 {UNFUSED}",))


@pytest.mark.parametrize("kernels", ["triton", "gptqmodel-marlin"])
@pytest.mark.parametrize("shared", [True, False])
def test_triton_decoder(
    tmp_path: Path, orders: Callable[[bool], None], triton_device: torch.device, monkeypatch: pytest.MonkeyPatch,
    shared: bool, kernels: Any,
) -> None:  # fmt: skip
    pytest.importorskip("triton", reason="triton is not installed")
    from quantspec.models.load_triton import load_triton_decoder

    install(monkeypatch)
    marlin = kernels == "gptqmodel-marlin"
    size, dtype = (128, torch.float16) if marlin else (32, torch.float32)
    sizes = {"hidden_size": size, "intermediate_size": size, "head_dim": size // 2, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.device("cpu"):
        folder = make_pair(tmp_path / "source", "llama", **sizes).folder
        packed = packed_and_dense(folder, tmp_path, Scheme(4, size))["packed"]
        orders(shared)
        expected = reference(packed)[:6]
    config = ModelConfig.load(packed)
    model = load_triton_decoder(packed, config, triton_device, dtype, kernels=kernels, check=True)
    assert model.notes == (() if shared else (f"2 {UNFUSED}",))
    # fp32: sums in another order; fp16: a few roundings of values of size 1 to 4.
    assert float((logits(model, 6) - expected).abs().max()) <= (2e-2 if marlin else TOLERANCE)


def weight(n: int, k: int, seed: int, order_seed: int | None) -> QuantizedWeight:
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    order = None if order_seed is None else torch.randperm(k, generator=torch.Generator().manual_seed(order_seed))
    return replace(quantize(dense, Scheme(4, 32)), order=order)


@pytest.mark.parametrize("orders_of, packed", [((1, 1), True), ((1, 2), False), ((None, 1), False), ((1, None), False)])
def test_what_goes_together(orders_of: tuple[int | None, int | None], packed: bool) -> None:
    parts: list[Tensor | QuantizedWeight] = [weight(8, 70, seed, order) for seed, order in enumerate(orders_of)]
    whole = fuse(parts)
    assert isinstance(whole, QuantizedWeight) == packed
    assert torch.equal(to_dense(whole), torch.cat([to_dense(part) for part in parts]))


@pytest.mark.parametrize("dense", [True, False])
def test_an_order_of_down_goes_into_gate_and_up_for_nothing(dense: bool) -> None:
    gate_up, down = weight(2 * 70, 64, 0, 5), weight(9, 70, 1, 6)
    bias, x = torch.randn(140, generator=torch.Generator().manual_seed(2)), torch.randn(3, 64)
    first: Tensor | QuantizedWeight = dequantize(gate_up) if dense else gate_up

    def mlp(first: Tensor | QuantizedWeight, bias: Tensor | None, second: Tensor | QuantizedWeight) -> Tensor:
        gate, up = (x.double() @ to_dense(first).double().T + (0 if bias is None else bias)).chunk(2, dim=-1)
        return (gate * up) @ to_dense(second).double().T

    folded = fold_order(first, bias, down)
    assert isinstance(folded[2], QuantizedWeight)
    assert folded[2].order is None
    # Sums in fp64 in another order.
    torch.testing.assert_close(mlp(*folded), mlp(first, bias, down), rtol=1e-10, atol=1e-10)
