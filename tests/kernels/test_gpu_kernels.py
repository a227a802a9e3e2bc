"""The GPU benchmark's judgement, with stand-ins for the layers that only a GPU runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantspec.benchmarks import gpu, gpu_kernels
from quantspec.errors import Unavailable, VerificationError
from quantspec.kernels.cuda.packed import PackedWeight, unpack

CPU = torch.device("cpu")


def stand_in(change: Callable[[Tensor], Tensor]) -> type:
    """A layer that is exact, and whose rows are the same at every width, but for ``change``."""

    class Layer:
        def __init__(self, weight: PackedWeight, workspace: object, bias: Tensor | None = None) -> None:
            codes, scales = unpack(weight)
            width = weight.cols // scales.shape[1]
            self.weight = codes.double() * scales.double().repeat_interleave(width, dim=1)
            self.bias = bias

        def __call__(self, x: Tensor) -> Tensor:
            rows = [self.weight @ row.double() + self.bias for row in x]
            return change(torch.stack(rows)).to(x.dtype)

    return Layer


def check(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> float:
    monkeypatch.setattr(gpu_kernels, "CudaLinear", stand_in(change))
    return gpu_kernels._check_matrix(70, 128, 4, torch.float16, None, CPU)  # type: ignore[arg-type]


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_kernels_on_this_gpu() -> None:
    try:
        assert len(gpu_kernels.check(torch.device("cuda", 0))) == 4
    except Unavailable as error:
        pytest.skip(str(error))


def test_random_weights_use_every_code() -> None:
    for bits in (4, 8):
        weight = gpu_kernels.random_weight(256, 256, bits, torch.bfloat16, CPU)
        assert weight.codes.unique().tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
        assert (weight.scheme.dtype, weight.scale.dtype) == ("bfloat16", torch.bfloat16)


ROW = {
    "matrix": "8b o", "dtype": "float16", "n": 1, "seconds": 4e-6, "least": 3e-6, "gbps": 2163.0,
    "read_fraction": 0.5, "v": 1.0, "tflops": 8.4, "dense_ratio": 2.0,
}  # fmt: skip


def test_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"errors": {"w4 float16": 1e-4}, "read_gbps": 4300.0, "products": [ROW]}
    monkeypatch.setattr(gpu_kernels, "measure", lambda: measured)
    assert gpu.kernels({"device": "some GPU", "torch": "2"}, tmp_path) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert "| 8b o | float16 | 1 | 4.0 | 2163 | 50% | 1.00 | 8 | 2.00 |" in page
    assert page in capsys.readouterr().out


def test_kernels_that_do_not_run_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails() -> None:
        raise Unavailable("no CUDA compiler found")

    monkeypatch.setattr(gpu_kernels, "measure", fails)
    report = {"device": "some GPU", "torch": "2"}
    assert gpu.kernels(report, tmp_path) == Unavailable.exit_code
    assert json.loads(json.dumps(report))["kernels"] == {"error": "no CUDA compiler found"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out")])
    assert gpu.main() == 4
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
