"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, push each column's error onto the ones not yet
rounded.

Columns are solved in order of falling input power (static act-order): the group scales are fixed on the weight before
solving, and the codes are stored in the original order, so that a checkpoint needs no ``g_idx``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.methods.base import Solution, check_finite
from quantspec.calibrate.quantize.methods.scales import search_scale
from quantspec.calibrate.quantize.observe import Statistics
from quantspec.numerics.affine import QuantizedWeight, dequantize, quantize
from quantspec.numerics.measures import relative_mse, relative_output_mse
from quantspec.numerics.scheme import Scheme

DAMPING_LADDER = (1, 10, 100)
"""Multiples of the damping asked for, tried in turn until the factorization is sound and the result good."""
_BLOCK = 128  # columns solved between two updates of the whole rest


def quantize_linear(
    name: str, weight: Tensor, scheme: Scheme, statistics: Statistics, options: MethodOptions
) -> Solution:
    """GPTQ on the inputs' Hessian, or round-to-nearest with a reason where that fails."""
    assert statistics.hessian is not None
    check_finite(name, weight)
    hessian = statistics.hessian.matrix
    rtn = quantize(weight, scheme)
    if not torch.isfinite(hessian).all():
        reason = "the calibration inputs overflow"
        return Solution(rtn, "rtn", relative_mse(dequantize(rtn), weight), fallback_reason=reason)
    rtn_error = relative_output_mse(dequantize(rtn), weight, hessian)
    scale, zero_point = search_scale(weight, hessian.diagonal(), scheme)
    reason = ""
    for damping in (options.damping * factor for factor in DAMPING_LADDER):
        codes = solve(weight, hessian, scale, zero_point, scheme, damping)
        if codes is None:
            reason = f"the Hessian has no Cholesky factor up to damping {damping}"
            continue
        solved = QuantizedWeight(codes, scale, zero_point, scheme)
        error = relative_output_mse(dequantize(solved), weight, hessian)
        if error <= rtn_error:
            return Solution(solved, "gptq", error, damping)
        reason = f"GPTQ's output error {error:.3g} is above round-to-nearest's {rtn_error:.3g} up to damping {damping}"
    return Solution(rtn, "rtn", rtn_error, fallback_reason=reason)


def solve(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: Scheme,
    damping: float,
    act_order: bool = True,
) -> Tensor | None:
    """GPTQ codes ``[N, K]`` int8 for fixed group scales ``[N, G]``, or None where the damped Hessian is not sound.

    Works in the Hessian's dtype. The rows of the upper Cholesky factor U of the inverse Hessian hold what the inverse
    of the not yet solved columns' Hessian holds in its first row, over the square root of its corner: no inverse is
    recomputed.
    """
    k = weight.shape[1]
    diagonal = hessian.diagonal()
    order = (
        torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(k, device=weight.device)
    )
    factor = _inverse_factor(hessian, order, damping)
    if factor is None:
        return None
    # All lies transposed, so that the column in hand is contiguous: rest and codes [K, N], scales and zeros [G, N].
    rest = weight.T[order].to(hessian.dtype)
    scales = scale.T.to(hessian.dtype).contiguous()
    zeros = torch.zeros_like(scales) if zero_point is None else zero_point.T.to(hessian.dtype).contiguous()
    groups = (order // scheme.group(k)).tolist()
    codes = torch.empty_like(rest, dtype=torch.int8)
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        errors = torch.empty_like(rest[start:end])
        for column in range(start, end):
            step, zero = scales[groups[column]], zeros[groups[column]]
            code = (rest[column] / step + zero).round_().clamp_(scheme.q_min, scheme.q_max)
            error = (rest[column] - (code - zero) * step) / factor[column, column]
            rest[column:end] -= torch.outer(factor[column, column:end], error)
            codes[column], errors[column - start] = code, error
        rest[end:] -= factor[start:end, end:].T @ errors
    if not torch.isfinite(rest).all():
        return None
    original = torch.empty_like(codes)
    original[order] = codes
    return original.T.contiguous()


def _inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor of ``(H + damping * mean(diag H) I)^-1`` with columns in ``order``."""
    matrix = hessian[order][:, order]
    diagonal = matrix.diagonal()
    mean = diagonal.mean()
    # An input that never fires has no curvature: any value does, and plain rounding is what it gets.
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    diagonal += damping * mean
    # One name for every step, so that two [K, K] matrices stand at a time and not four.
    matrix, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    matrix = torch.cholesky_inverse(matrix)
    matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
    return None if failed or not torch.isfinite(matrix).all() else matrix
