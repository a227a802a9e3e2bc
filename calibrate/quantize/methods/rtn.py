"""Round-to-nearest (RTN), which looks at no inputs: with min-max scales, or with those of the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.methods.base import Solution, check_finite
from quantspec.calibrate.quantize.methods.scales import search_scale
from quantspec.calibrate.quantize.observe import Statistics
from quantspec.numerics.affine import QuantizedWeight, dequantize, quantize, quantize_codes
from quantspec.numerics.measures import relative_mse
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
    """Scales searched for the least squared error of each group's weights: clipping a few pays for the rest."""
    check_finite(name, weight)
    scale, zero_point = search_scale(weight, torch.ones_like(weight[0]), scheme)
    quantized = QuantizedWeight(quantize_codes(weight, scale, zero_point, scheme), scale, zero_point, scheme)
    return Solution(quantized, "mse", relative_mse(dequantize(quantized), weight))
