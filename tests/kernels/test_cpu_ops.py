"""Single-row operations of the CPU kernels against torch in fp64, at every length of tail and at the ends of fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_float, c_int, c_void_p

import pytest
import torch
from torch import Tensor

from quantspec.kernels.cpu import library
from quantspec.kernels.cpu.forward import bind_rms_norm

pytestmark = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))

# A handful of roundings of fp32 (6e-8 each), and exp's own error of about 1e-7.
RELATIVE = 1e-6


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty_like(x)
    bind_rms_norm()(x.data_ptr(), weight.data_ptr(), x.shape[0], x.shape[1], 1e-5, out.data_ptr())
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate_up, out = torch.cat((gate, up)), torch.empty_like(gate)
    library.bind("qs_swiglu", None, [c_void_p, c_int, c_void_p])(gate_up.data_ptr(), len(gate), out.data_ptr())
    return out


def softmax(scores: Tensor) -> Tensor:
    weights = scores.clone()
    return weights * library.bind("qs_softmax", c_float, [c_void_p, c_int])(weights.data_ptr(), len(weights))


def random_row(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rms_norm(scale: float) -> None:
    for n in [*range(1, 71), 2048, 3001]:
        x, weight = random_row(3 * n).view(3, n) * scale, random_row(n, 1)
        exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
        torch.testing.assert_close(rms_norm(x, weight).double(), exact, rtol=RELATIVE, atol=1e-20)


def test_swiglu() -> None:
    for n in range(1, 40):
        gate, up = random_row(n) * 4, random_row(n, 1)
        exact = torch.nn.functional.silu(gate.double()) * up
        torch.testing.assert_close(swiglu(gate, up).double(), exact, rtol=RELATIVE, atol=1e-20)
    # Where e^-gate leaves fp32: silu is gate above, and within 1e-36 of 0 below.
    gate = torch.tensor([0.0, -0.0, 80.0, 100.0, 1e30, -87.0, -89.0, -1000.0])
    exact = torch.nn.functional.silu(gate.double())
    torch.testing.assert_close(swiglu(gate, torch.ones(8)).double(), exact, rtol=RELATIVE, atol=1e-34)
    assert math.isnan(swiglu(torch.tensor([math.nan]), torch.ones(1))[0])


def test_softmax() -> None:
    for n in [*range(1, 40), 1000]:
        for scale in (0.01, 1.0, 30.0):
            scores = random_row(n) * scale
            exact = scores.double().softmax(-1)
            # Weights far below the largest stop at e^-87.
            torch.testing.assert_close(softmax(scores).double(), exact, rtol=1e-5, atol=1e-37)
    far = softmax(torch.tensor([-3e38, 0.0, 3e38, -math.inf]))
    torch.testing.assert_close(far, torch.tensor([0.0, 0.0, 1.0, 0.0]), rtol=0, atol=1e-37)


def nan_at(n: int, i: int) -> Tensor:
    row = random_row(n)
    row[i] = math.nan
    return row


@pytest.mark.parametrize("operation", [softmax, lambda row: rms_norm(row[None], torch.ones(len(row)))])
def test_nan_is_not_lost(operation: Callable[[Tensor], Tensor]) -> None:
    for n in (1, 7, 8, 33):
        for i in range(n):
            assert operation(nan_at(n, i)).isnan().all()


def test_bits_do_not_depend_on_the_address() -> None:
    row, weight = random_row(77), random_row(77, 1)
    for offset in range(1, 8):
        moved = torch.zeros(100)
        moved[offset : offset + 77] = row
        view = moved[offset : offset + 77]
        assert torch.equal(rms_norm(view[None], weight), rms_norm(row[None], weight))
