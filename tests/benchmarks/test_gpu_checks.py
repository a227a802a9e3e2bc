"""The GPU checks' judgement, with stand-ins for what only a GPU runs, and Triton's kernels under its interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.benchmarks import gpu_kernels, gpu_triton
from quantspec.benchmarks.gpu_kernels import Case
from quantspec.errors import UsageError, VerificationError
from quantspec.numerics.affine import QuantizedWeight, dequantize

CPU = torch.device("cpu")


def stand_in(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Products that are exact, and whose rows are the same at every width, but for ``change``."""

    def product(
        kernels: str, weight: QuantizedWeight, bias: Tensor, device: torch.device
    ) -> Callable[[Tensor], Tensor]:
        if weight.zero_point is not None:
            raise UsageError("it has no zero points")
        exact = dequantize(weight).double()
        return lambda x: change(torch.stack([exact @ row.double() + bias for row in x])).to(x.dtype)

    monkeypatch.setattr(gpu_kernels, "product", product)


def check(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> float:
    stand_in(monkeypatch, change)
    return gpu_kernels.check_case("cuda", Case(70, 128), torch.float16, CPU, range(1, 65))


def test_right_kernels_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # One rounding to half: at most 2^-11 of each value.
    assert 0 < check(monkeypatch, lambda y: y) < 2**-11


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda y: y * 1.01, "relative error"),
        (lambda y: torch.where(torch.arange(70) == 69, float("nan"), y), "relative error nan"),
        (lambda y: y * (1 + 2**-10 * (len(y) == 37)), "rows change between n = 37 and n = 64"),
    ],
    ids=["wrong", "not written", "width"],
)
def test_wrong_kernels_do_not(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(VerificationError, match=said):
        check(monkeypatch, change)


def test_what_kernels_do_not_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda y: y)
    cases = Case(40, 128), Case(30, 256), Case(30, 128, symmetric=False)
    found = gpu_kernels.check("cuda", CPU, (torch.float16,), cases, widths=(1, 3))
    assert found["w4 g128 with zero points float16"] == "it has no zero points"
    assert isinstance(found["w4 g128 float16"], float)
    assert len(found) == 2


@pytest.mark.usefixtures("triton_device")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_products(triton_device: torch.device) -> None:
    cases = Case(40, 64, group_size=32, symmetric=False), Case(40, 128, bits=8)
    found = gpu_kernels.check("triton", triton_device, (torch.float16,), cases, widths=(3,))
    assert found.keys() == {"w4 g32 with zero points float16", "w8 g128 float16"}


@pytest.mark.usefixtures("triton_device")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rope", "commit", "draw", "attention over 8 and 4 bits"])
def test_triton_kernels(name: str, triton_device: torch.device) -> None:
    small = {"rms_norm": (37,), "swiglu": (37,), "rope": (3, 1, 16), "commit": (), "draw": (300,)}.get(name, (1, 7))
    error_of: Callable[..., float] = gpu_triton.CHECKS[name]
    assert error_of(triton_device, torch.float32, *small) <= gpu_kernels.BOUNDS[torch.float32]


@pytest.mark.usefixtures("triton_device")
def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch, triton_device: torch.device) -> None:
    monkeypatch.setattr(gpu_triton, "CHECKS", {"rope": lambda device, dtype: 0.1})
    with pytest.raises(VerificationError, match="rope in float16"):
        gpu_triton.check(triton_device)
