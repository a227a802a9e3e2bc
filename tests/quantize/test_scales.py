"""Searched and fitted scales: never worse than what they start from, and stored before anything is chosen with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.methods import rtn
from quantspec.calibrate.quantize.methods.scales import refit_scale, search_scale, search_scale_on_outputs
from quantspec.calibrate.quantize.observe import Hessian, Statistics
from quantspec.numerics.affine import QuantizedWeight, dequantize, min_max_scale, quantize, quantize_codes
from quantspec.numerics.measures import output_power, relative_output_mse
from quantspec.numerics.scheme import Scheme

SCHEMES = (Scheme(3, 32), Scheme(4, 64, symmetric=False), Scheme(4, 48), Scheme(2, -1))
"""Over 100 input features: ragged last groups but for the last."""


def layer() -> tuple[Tensor, Hessian]:
    """A weight [16, 100] with outliers and the Hessian of correlated inputs."""
    g = torch.Generator().manual_seed(6)
    weight = torch.randn(16, 100, generator=g)
    weight[:, 7] *= 6  # clipping pays
    hessian = Hessian(100)
    hessian.add(
        torch.randn(600, 20, generator=g) @ torch.randn(20, 100, generator=g) + torch.randn(600, 100, generator=g)
    )
    return weight, hessian


def rounded(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    return dequantize(QuantizedWeight(quantize_codes(weight, scale, zero_point, scheme), scale, zero_point, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_search_is_never_worse_than_min_max(scheme: Scheme) -> None:
    weight, hessian = layer()
    power = hessian.matrix.diagonal()

    def weighted(scale: Tensor, zero_point: Tensor | None) -> float:
        return float(((rounded(weight, scale, zero_point, scheme) - weight) ** 2 * power).sum())

    def output(scale: Tensor, zero_point: Tensor | None) -> float:
        return relative_output_mse(rounded(weight, scale, zero_point, scheme), weight, hessian.matrix)

    plain, searched = min_max_scale(weight, scheme), search_scale(weight, power, scheme)
    assert searched[0].dtype == torch.bfloat16
    assert weighted(*searched) < weighted(*plain)
    *on_outputs, error = search_scale_on_outputs(weight, hessian.matrix, scheme)
    assert output(*on_outputs) < output(*searched)
    # Sums in fp32 of as many products as the oracle's, in another order.
    assert error == pytest.approx(output(*on_outputs) * output_power(weight, hessian.matrix), rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_refit_lowers_the_output_error_of_given_codes(scheme: Scheme) -> None:
    weight, hessian = layer()
    before = quantize(weight, scheme)
    scale = refit_scale(weight, hessian.matrix, before)
    after = QuantizedWeight(before.codes, scale, before.zero_point, scheme)
    assert scale.dtype == before.scale.dtype
    assert (scale > 0).all()
    error = [relative_output_mse(dequantize(one), weight, hessian.matrix) for one in (before, after)]
    assert error[1] < error[0]


def test_refit_leaves_groups_without_codes_or_inputs_alone() -> None:
    weight, scheme = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)), Scheme(4, 32)
    weight[0, :32] = 0
    before = quantize(weight, scheme)
    hessian = torch.eye(64)
    hessian[32:, 32:] = 0
    scale = refit_scale(weight, hessian, before)
    assert scale[0, 0] == before.scale[0, 0]
    assert torch.equal(scale[:, 1], before.scale[:, 1])


def test_mse_rounds_to_nearest_on_stored_scales() -> None:
    weight, hessian = layer()
    scheme = Scheme(4, 50)
    solution = rtn.quantize_linear_mse("w", weight, scheme, Statistics(hessian), MethodOptions())
    quantized = solution.quantized
    assert torch.equal(quantized.codes, quantize_codes(weight, quantized.scale, None, scheme))
    plain = relative_output_mse(dequantize(quantize(weight, scheme)), weight, hessian.matrix)
    assert solution.error < 0.75 * plain
    hessian.matrix[0, 0] = torch.inf
    fallen = rtn.quantize_linear_mse("w", weight, scheme, Statistics(hessian), MethodOptions())
    assert fallen.method == "rtn"
    assert "overflow" in str(fallen.fallback_reason)
    assert torch.equal(fallen.quantized.codes, quantize(weight, scheme).codes)
