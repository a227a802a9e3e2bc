"""Round-to-nearest (RTN): with min-max scales, which looks at no inputs, or with scales searched for the least output
error."""

from __future__ import annotations

from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.methods.base import Solution, all_finite, check_finite
from quantspec.calibrate.quantize.methods.scales import search_scale_on_outputs
from quantspec.calibrate.quantize.observe import Statistics
from quantspec.numerics.affine import QuantizedWeight, dequantize, min_max_scale, quantize, quantize_codes
from quantspec.numerics.measures import relative_mse, relative_output_mse
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
    reason = None
    if all_finite(hessian):
        scale, zero_point = search_scale_on_outputs(weight, hessian, scheme)
    else:
        reason = "the calibration inputs overflow"
        scale, zero_point = min_max_scale(weight, scheme)
    quantized = QuantizedWeight(quantize_codes(weight, scale, zero_point, scheme), scale, zero_point, scheme)
    if reason:
        return Solution(quantized, "rtn", relative_mse(dequantize(quantized), weight), fallback_reason=reason)
    return Solution(quantized, "mse", relative_output_mse(dequantize(quantized), weight, hessian))
