"""torch's int4 operator against the dequantized weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantspec.kernels.torch_int4 import TorchInt4Linear
from quantspec.numerics.affine import QuantizedWeight, quantize
from quantspec.numerics.scheme import Scheme


def rounded(weight: QuantizedWeight) -> Tensor:
    """``[N, K]`` in fp64, with scales, and scales times zero points, in bf16, as the operator takes them."""
    group = weight.scheme.group_size
    scale, zero = weight.scale.float(), torch.zeros_like(weight.scale, dtype=torch.float32)
    if weight.zero_point is not None:
        zero = -scale * weight.zero_point
    wide = (each.bfloat16().double().repeat_interleave(group, 1)[:, : weight.codes.shape[1]] for each in (scale, zero))
    factor, offset = wide
    return weight.codes * factor + offset


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "n,k,group",
    [(48, 128, 32), (64, 128, 64), (80, 256, 128), (32, 512, 256), (37, 100, 32), (16, 64, 128)],
)
def test_equals_the_dequantized_weight(n: int, k: int, group: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(n + k)
    weight = quantize(torch.randn(n, k, generator=generator) + 0.3, Scheme(4, group, symmetric))
    bias = torch.randn(n, generator=generator)
    linear = TorchInt4Linear(weight, bias)
    for rows in (1, 2, 5, 33):
        x = torch.randn(rows, k, generator=generator)
        product = x.bfloat16().double() @ rounded(weight).T
        actual = linear(x)
        assert actual.shape == (rows, n)
        # What is left is the output's rounding to bf16, at most 2^-8 of it, and fp32 sums of up to 512 products of
        # size 1 in another order: 1e-4. A code, scale or zero point that is off by one step shows as 0.1.
        assert ((actual - (product + bias)).abs() <= product.abs() * 2**-8 + 1e-3).all()


def test_without_bias_and_with_a_group_of_zeros() -> None:
    dense = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    dense[3, 32:] = 0
    weight = quantize(dense, Scheme(4, 32))
    x = torch.zeros(2, 64)
    x[:, 32:] = 1
    assert torch.equal(TorchInt4Linear(weight)(x)[:, 3], torch.zeros(2))
