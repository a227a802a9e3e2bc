"""torch's int4 operator against the dequantized weight; the operator is present (if slow) on AVX2 too."""

from __future__ import annotations

import pytest
import torch

from quantspec.kernels.torch_int4 import TorchInt4Linear
from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.scheme import Scheme


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
        expected = (x.double() @ dequantize(weight).double().T + bias).float()
        actual = linear(x)
        assert actual.shape == (rows, n)
        # fp32 sums of up to 512 products of size 1 in another order: 512 * 2^-24 * sqrt(512) at the worst is 7e-4, in
        # practice 1e-5. A code, scale or zero point that is off by one step shows as 0.1.
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-4)


def test_without_bias_and_with_a_group_of_zeros() -> None:
    dense = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    dense[3, 32:] = 0
    weight = quantize(dense, Scheme(4, 32))
    x = torch.zeros(2, 64)
    x[:, 32:] = 1
    assert torch.equal(TorchInt4Linear(weight)(x)[:, 3], torch.zeros(2))
