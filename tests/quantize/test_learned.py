"""Learned rounding on Hessians whose columns correlate: below GPTQ, hard at the end, and what it does with bad ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions, QuantizeConfig
from quantspec.calibrate.quantize.methods import gptq, learned
from quantspec.calibrate.quantize.observe import Statistics
from quantspec.calibrate.quantize.run import run
from quantspec.errors import ModelError, UsageError
from quantspec.models.tensors import TensorStore
from quantspec.numerics.affine import QuantizedWeight, dequantize, quantize
from quantspec.numerics.measures import relative_output_mse
from quantspec.numerics.scheme import Scheme

OPTIONS = MethodOptions(learn_steps=200)


def inputs(k: int, seed: int) -> Tensor:
    """Inputs [1000, k] that mix few factors, with powers that differ a hundredfold."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(1000, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g)
    noise = 0.3 * torch.randn(1000, k, generator=g)
    return (mixed + noise) * torch.logspace(-1, 1, k)[torch.randperm(k, generator=g)]


def on(hessian: Tensor) -> Statistics:
    statistics = Statistics.of({"hessian"}, len(hessian))
    assert statistics.hessian is not None
    statistics.hessian.matrix.copy_(hessian)
    return statistics


def layer(n: int = 24, k: int = 160, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight [n, k] and Hessian [k, k]."""
    x = inputs(k, seed)
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed + 1)), x.T @ x / len(x)


# K = 160: a ragged last group at 64.
@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(3, 64), Scheme(3, 64, symmetric=False), Scheme(2, -1)], ids=str
)
def test_is_far_below_rounding_and_below_gptq(scheme: Scheme) -> None:
    weight, hessian = layer()
    solution = learned.quantize_linear("w", weight, scheme, on(hessian), OPTIONS)
    assert solution.method == "learned"
    assert solution.error < 0.97 * gptq.quantize_linear("w", weight, scheme, on(hessian), OPTIONS).error
    assert solution.error < 0.4 * relative_output_mse(dequantize(quantize(weight, scheme)), weight, hessian)
    quantized = solution.quantized
    assert (quantized.codes.dtype, quantized.scale.dtype) == (torch.int8, torch.bfloat16)
    assert scheme.q_min <= int(quantized.codes.min())
    assert int(quantized.codes.max()) <= scheme.q_max
    # The recorded error is that of the hard codes under the stored scales, recomputed in fp64 (fp32: four digits).
    exact = relative_output_mse(dequantize(quantized).double(), weight.double(), hessian.double())
    assert solution.error == pytest.approx(exact, rel=1e-3)


def test_no_row_is_worse_than_gptq_however_little_it_may_work() -> None:
    weight, hessian = layer(seed=3)
    scheme, starved = Scheme(3, 32), MethodOptions(learn_teraflops=1e-9)
    start = gptq.quantize_linear("w", weight, scheme, on(hessian), starved).quantized
    ended = learned.quantize_linear("w", weight, scheme, on(hessian), starved).quantized

    def rows(quantized: QuantizedWeight) -> Tensor:
        error = (dequantize(quantized) - weight).double()
        return ((error @ hessian.double()) * error).sum(1)

    assert (rows(ended) <= rows(start) * (1 + 1e-4)).all()  # compared in fp32 there
    assert (rows(ended) < 0.999 * rows(start)).any()


def test_settled_codes_gain_by_no_single_step() -> None:
    weight, hessian = layer(n=4, k=48, seed=5)
    start = quantize(weight, Scheme(3, 16))
    codes = learned.settle(weight, hessian, start)

    def cost(codes: Tensor) -> float:
        error = (dequantize(QuantizedWeight(codes, start.scale, None, start.scheme)) - weight).double()
        return float(((error @ hessian.double()) * error).sum())

    settled = cost(codes)
    assert settled < cost(start.codes)
    for row in range(4):
        for column in range(48):
            for step in (-1, 1):
                moved = codes.clone()
                moved[row, column] += step
                if start.scheme.q_min <= int(moved[row, column]) <= start.scheme.q_max:
                    assert cost(moved) > settled * (1 - 1e-5)  # steps that gain less are left alone


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(seed=7)
    whole = learned.quantize_linear("w", weight, Scheme(4, 32), on(hessian), OPTIONS)
    monkeypatch.setattr(learned, "_BLOCK", 160 * 7)
    parts = learned.quantize_linear("w", weight, Scheme(4, 32), on(hessian), OPTIONS)
    # A product of fewer rows may be summed in another order: a weight in a hundred may settle otherwise.
    assert (whole.quantized.codes == parts.quantized.codes).float().mean() > 0.95
    assert parts.error == pytest.approx(whole.error, rel=0.02)


def test_dead_inputs_and_singular_hessians() -> None:
    x = inputs(64, seed=8)[:20]  # rank 20 of 64
    x[:, 10:14] = 0
    weight, hessian = torch.randn(8, 64, generator=torch.Generator().manual_seed(9)), x.T @ x / len(x)
    solution = learned.quantize_linear("w", weight, Scheme(4, 32), on(hessian), OPTIONS)
    rtn = quantize(weight, Scheme(4, 32))
    assert 0 <= solution.error < 0.3 * relative_output_mse(dequantize(rtn), weight, hessian)
    assert torch.isfinite(dequantize(solution.quantized)).all()
    silent = learned.quantize_linear("w", weight, Scheme(4, 32), on(torch.zeros(64, 64)), OPTIONS)
    assert torch.isfinite(dequantize(silent.quantized)).all()


def test_falls_back_with_a_reason_and_refuses_nan_weights() -> None:
    weight, hessian = layer(n=4, k=32)
    overflowed = learned.quantize_linear("w", weight, Scheme(4, 32), on(hessian * torch.inf), OPTIONS)
    assert (overflowed.method, "overflow" in str(overflowed.fallback_reason)) == ("rtn", True)
    unsound = learned.quantize_linear("w", weight, Scheme(4, 32), on(hessian - 1e4 * torch.eye(32)), OPTIONS)
    assert (unsound.method, "Cholesky" in str(unsound.fallback_reason)) == ("rtn", True)
    weight[1, 3] = float("nan")
    with pytest.raises(ModelError, match="holds NaN"):
        learned.quantize_linear("w", weight, Scheme(4, 32), on(hessian), OPTIONS)
    with pytest.raises(UsageError, match="learn_steps must be above 0"):
        MethodOptions(learn_steps=0)


def test_hardness_ends_hard() -> None:
    assert learned.hardness(0.5) == 0.0
    assert 0 < learned.hardness(0.85) < learned.hardness(0.95) < 1
    assert learned.hardness(1.0) == pytest.approx(1.0)


def test_resumed_run_is_the_same_bytes(configure: Callable[..., QuantizeConfig]) -> None:
    options = MethodOptions(learn_steps=20)
    run(configure("whole", method="learned", options=options))
    stopped = configure("cut", method="learned", options=options)
    seen = 0

    def stop(event: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 10:  # in the second of three layers
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(stopped, stop)
    run(stopped)

    def tensors(folder: Path) -> dict[str, Tensor]:
        store = TensorStore(folder)
        return {name: store.get(name) for name in store}

    whole, resumed = (tensors(stopped.out.parent / name) for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
