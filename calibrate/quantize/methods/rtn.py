"""Round-to-nearest (RTN): with min-max scales, which looks at no inputs, or with scales searched for the least output
error."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.methods.base import Solution, all_finite, check_finite
from quantspec.calibrate.quantize.methods.scales import search_scale_on_outputs
from quantspec.calibrate.quantize.observe import Statistics
from quantspec.numerics.affine import QuantizedWeight, dequantize, quantize, quantize_codes
from quantspec.numerics.measures import output_power, relative_mse
from quantspec.numerics.scheme import Scheme


def quantize_linear(
    name: str, weight: Tensor, scheme: Scheme, statistics: Statistics, options: MethodOptions
) -> Solution:
    """Min-max scales: the largest value of a group meets the last code."""
    check_finite(name, weight)
    quantized = quantize(weight, scheme)
    return Solution(quantized, "rtn", relative_mse(dequantize(quantized), weight))


def quantize_linear_mse(
    name: str, weight: Tensor, scheme: Scheme, statistics: Statistics, options: MethodOptions
) -> Solution:
    """Scales searched for the least squared error of the layer's outputs; each weight still goes to its nearest
    code."""
    assert statistics.hessian is not None
    check_finite(name, weight)
    hessian = statistics.hessian.matrix
    if not all_finite(hessian):
        reason = "the calibration inputs overflow"
        return replace(quantize_linear(name, weight, scheme, statistics, options), fallback_reason=reason)
    scale, zero_point, error = search_scale_on_outputs(weight, hessian, scheme)
    quantized = QuantizedWeight(quantize_codes(weight, scale, zero_point, scheme), scale, zero_point, scheme)
    return Solution(quantized, "mse", error / (output_power(weight, hessian) or 1.0))
