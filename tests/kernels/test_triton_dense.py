"""Unquantized linear layers in Triton: right products, and the same bits for every n."""

from __future__ import annotations

import pytest
import torch

dense = pytest.importorskip("quantspec.kernels.triton.dense", reason="triton is not installed")

pytestmark = pytest.mark.usefixtures("triton_device")

# Sums of 130 products of size 1, so of size 11: half a unit in the last place of the result, or all of it under the
# interpreter, which cuts to bf16; in fp32 the rounding of each addition.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 2.5e-1}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n,k,columns", [(1, 130, 33), (65, 96, 32), (3, 1, 5)])
def test_products(dtype: torch.dtype, n: int, k: int, columns: int) -> None:
    x, weight, bias = torch.randn(n, k).to(dtype), torch.randn(columns, k).to(dtype), torch.randn(columns)
    exact = x.double() @ weight.double().T
    out = dense.TritonDense(weight, bias)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact + bias.double(), rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(dense.eager_dense(x, weight, bias), out, rtol=0, atol=2 * TOLERANCE[dtype])
    wide = dense.TritonDense(weight, out_dtype=torch.float32)(x)
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_do_not_depend_on_their_number(dtype: torch.dtype) -> None:
    linear, x = dense.TritonDense(torch.randn(37, 130).to(dtype), torch.randn(37)), torch.randn(130, 130).to(dtype)
    together = linear(x)
    for n in (1, 2, 5, 17, 63, 64, 65):
        assert torch.equal(linear(x[:n].clone()), together[:n])
        assert torch.equal(linear(x[-n:].clone()), together[-n:])


def test_no_rows() -> None:
    assert dense.TritonDense(torch.randn(5, 7))(torch.randn(0, 7)).shape == (0, 5)
