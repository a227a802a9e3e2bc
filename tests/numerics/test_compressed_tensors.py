"""Bit for bit what the compressed-tensors package packs and unpacks, where it is installed (``make test-interop``)."""

from __future__ import annotations

import pytest
import torch

from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.packing import byte_weight, pack_weight
from quantspec.numerics.scheme import Scheme

pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_same_bits_both_ways(bits: int, group_size: int, symmetric: bool) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = {"strategy": "group", "group_size": group_size} if group_size > 0 else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    theirs = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(bits))
    quantized = quantize(weight, Scheme(bits, group_size, symmetric))
    packed = pack_weight(quantized)

    unpacked = Compressor.decompress(dict(packed), theirs)["weight"]
    assert torch.equal(unpacked, dequantize(quantized).to(unpacked.dtype))
    given = {"weight": weight, "weight_scale": quantized.scale}
    given |= {} if quantized.zero_point is None else {"weight_zero_point": quantized.zero_point}
    again = Compressor.compress(given, theirs)
    assert again.keys() == packed.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in packed.items())


@pytest.mark.parametrize("bits,group_size", [(4, 32), (4, -1), (8, -1)])
def test_codes_of_one_byte(bits: int, group_size: int) -> None:
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = {"strategy": "group", "group_size": group_size} if group_size > 0 else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, **strategy)
    rounded = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    theirs = QuantizationScheme(targets=["Linear"], weights=args, input_activations=rounded)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(bits))
    quantized = quantize(weight, Scheme(bits, group_size))
    stored = byte_weight(quantized)
    unpacked = Compressor.decompress(dict(stored), theirs)["weight"]
    assert torch.equal(unpacked, dequantize(quantized).to(unpacked.dtype))
    again = Compressor.compress({"weight": weight, "weight_scale": quantized.scale}, theirs)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
