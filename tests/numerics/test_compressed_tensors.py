"""Bit for bit what the compressed-tensors package packs and unpacks, where it is installed (``make test-interop``)."""

from __future__ import annotations

import pytest
import torch

from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.packing import pack_weight
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
