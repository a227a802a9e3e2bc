"""GPTQ against a slow oracle, on Hessians whose columns correlate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.methods.gptq import factorize, quantize_linear, solve
from quantspec.calibrate.quantize.observe import Hessian, Statistics
from quantspec.errors import ModelError
from quantspec.numerics.affine import QuantizedWeight, dequantize, min_max_scale, quantize
from quantspec.numerics.measures import relative_output_mse
from quantspec.numerics.scheme import Scheme


def correlated_inputs(rows: int, k: int, seed: int) -> Tensor:
    """Inputs [rows, k] whose columns mix few factors, with powers that differ a hundredfold: nothing like the
    identity."""
    g = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g)
    noise = 0.3 * torch.randn(rows, k, generator=g)
    return (factors + noise) * torch.logspace(-1, 1, k)[torch.randperm(k, generator=g)]


OPTIONS = MethodOptions()


def on(hessian: Tensor) -> Statistics:
    """Statistics with that Hessian."""
    statistics = Statistics.of({"hessian"}, len(hessian))
    assert statistics.hessian is not None
    statistics.hessian.matrix.copy_(hessian)
    return statistics


def oracle(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: Scheme,
    damping: float,
    act_order: bool,
) -> Tensor:
    """Optimal brain quantization by its formula: the inverse Hessian of the columns still free is computed anew each
    time."""
    n, k = weight.shape
    weight, codes = weight.clone(), torch.zeros(n, k, dtype=torch.int8)
    power = [float(hessian[i, i]) for i in range(k)]
    damped = hessian + damping * sum(power) / k * torch.eye(k, dtype=hessian.dtype)
    free = sorted(range(k), key=lambda i: -power[i]) if act_order else list(range(k))
    while free:
        inverse = torch.linalg.inv(damped[free][:, free])
        j, group = free[0], free[0] // scheme.group(k)
        for row in range(n):
            step = float(scale[row, group])
            zero = 0 if zero_point is None else int(zero_point[row, group])
            code = min(max(round(float(weight[row, j]) / step + zero), scheme.q_min), scheme.q_max)
            error = float(weight[row, j]) - (code - zero) * step
            codes[row, j] = code
            weight[row, free] -= error / inverse[0, 0] * inverse[0]
        free = free[1:]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(3, 48), Scheme(4, 64, symmetric=False), Scheme(2, -1)], ids=str
)
def test_equals_the_oracle(scheme: Scheme, act_order: bool) -> None:
    # K = 160: more than one solver block of 128, several groups, and ragged last groups at 48 and 64.
    x = correlated_inputs(400, 160, seed=1).double()
    hessian = x.T @ x / len(x)
    weight = torch.randn(6, 160, generator=torch.Generator().manual_seed(2)).double()
    scale, zero_point = min_max_scale(weight, scheme)
    factor = factorize(hessian, 0.01, act_order)
    assert factor is not None
    codes, _ = solve(weight, factor, scale, zero_point, scheme)
    # In fp64 the two orders of summation differ by 1e-12 of a step: equal codes, all of them.
    assert torch.equal(codes, oracle(weight, hessian, scale, zero_point, scheme, 0.01, act_order))
    assert not torch.equal(codes, quantize(weight, scheme).codes)


def recursion(weight: Tensor, hessian: Tensor, scale: Tensor, scheme: Scheme, damping: float) -> Tensor:
    """The paper's own recursion, in fp64: the inverse Hessian, from which each solved column is eliminated."""
    k = weight.shape[1]
    weight, codes = weight.double(), torch.zeros(weight.shape, dtype=torch.int8)
    power = hessian.diagonal().double()
    inverse = torch.linalg.inv(hessian.double() + damping * power.mean() * torch.eye(k))
    for j in power.argsort(descending=True, stable=True).tolist():
        step = scale[:, j // scheme.group(k)].double()
        code = (weight[:, j] / step).round().clamp(scheme.q_min, scheme.q_max)
        codes[:, j] = code
        weight -= torch.outer((weight[:, j] - code * step) / inverse[j, j], inverse[j])
        inverse.addr_(inverse[:, j] / -inverse[j, j], inverse[j].clone())
        inverse[j, :] = inverse[:, j] = 0.0
        inverse[j, j] = 1.0  # solved: whatever is pushed onto it is not read again
    return codes


def test_output_error_equals_the_recursion_on_a_wide_layer() -> None:
    """From fp32 statistics, as in a real run: a tie that falls otherwise changes one row of 256 by 2%."""
    scheme, hessian = Scheme(4, 128), Hessian(1024)
    for chunk in correlated_inputs(4096, 1024, seed=12).split(1000):
        hessian.add(chunk)
    weight = 0.02 * torch.randn(256, 1024, generator=torch.Generator().manual_seed(13))
    solution = quantize_linear("w", weight, scheme, Statistics(hessian), OPTIONS)
    scale = solution.quantized.scale  # searched, and stored: the codes must be the recursion's for it
    codes = recursion(weight, hessian.matrix, scale, scheme, OPTIONS.damping)
    oracle_error = relative_output_mse(
        dequantize(QuantizedWeight(codes, scale, None, scheme)).double(), weight.double(), hessian.matrix.double()
    )
    assert solution.error == pytest.approx(oracle_error, rel=1e-4)
    assert (solution.quantized.codes == codes).float().mean() > 0.999
    assert oracle_error < 0.3 * relative_output_mse(dequantize(quantize(weight, scheme)), weight, hessian.matrix)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_rounding_by_far_on_correlated_inputs(bits: int) -> None:
    x, scheme = correlated_inputs(2000, 256, seed=3), Scheme(bits, 64)
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(4))
    hessian = Hessian(256)
    for chunk in x.split(300):
        hessian.add(chunk)
    solution = quantize_linear("w", weight, scheme, Statistics(hessian), OPTIONS)
    rtn = relative_output_mse(dequantize(quantize(weight, scheme)), weight, hessian.matrix)
    assert (solution.method, solution.damping) == ("gptq", OPTIONS.damping)
    assert solution.error < 0.5 * rtn
    # The recorded error is the layer's true output error on those inputs (fp32 Hessian: three digits).
    exact, approximate = x @ weight.T, x @ dequantize(solution.quantized).T
    assert solution.error == pytest.approx(float((approximate - exact).square().sum() / exact.square().sum()), rel=1e-2)


def test_hessian_is_the_mean_over_all_rows() -> None:
    x = correlated_inputs(1000, 32, seed=5)
    hessian = Hessian(32)
    for chunk in x.split(77):
        hessian.add(chunk.reshape(1, -1, 32))
    assert torch.allclose(hessian.matrix, x.T @ x / len(x), rtol=1e-4, atol=1e-4)  # fp32 running mean


def test_dead_inputs_are_rounded_and_disturb_nothing() -> None:
    x = correlated_inputs(500, 64, seed=8)
    x[:, 10:14] = 0
    weight, scheme = torch.randn(8, 64, generator=torch.Generator().manual_seed(9)), Scheme(4, 32)
    scale, _ = min_max_scale(weight, scheme)
    factor = factorize(x.T @ x / len(x), 0.01)
    assert factor is not None
    codes, _ = solve(weight, factor, scale, None, scheme)
    assert torch.equal(codes[:, 10:14], quantize(weight, scheme).codes[:, 10:14])


def test_damping_climbs_then_falls_back_with_a_reason() -> None:
    weight, scheme = torch.randn(8, 64, generator=torch.Generator().manual_seed(10)), Scheme(4, 32)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(11))
    hessian = x.T @ x / len(x)
    shifted = hessian - 0.6 * torch.eye(64)  # smallest eigenvalue about -0.2, mean diagonal 0.4
    climbed = quantize_linear("w", weight, scheme, on(shifted), OPTIONS)
    assert (climbed.method, climbed.damping) == ("gptq", 1.0)
    fallen = quantize_linear("w", weight, scheme, on(hessian - 20 * torch.eye(64)), OPTIONS)
    assert fallen.method == "rtn"
    assert "Cholesky" in str(fallen.fallback_reason)
    assert torch.equal(fallen.quantized.codes, quantize(weight, scheme).codes)
    overflowed = quantize_linear("w", weight, scheme, on(hessian * torch.inf), OPTIONS)
    assert overflowed.method == "rtn"
    assert "overflow" in str(overflowed.fallback_reason)


def test_refuses_nan_weights() -> None:
    weight = torch.ones(4, 32)
    weight[1, 3] = float("nan")
    with pytest.raises(ModelError, match=r"mlp\.up_proj\.weight holds NaN"):
        quantize_linear("mlp.up_proj", weight, Scheme(4, 32), on(torch.eye(32)), OPTIONS)
