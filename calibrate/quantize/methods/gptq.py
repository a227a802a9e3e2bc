"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, push each column's error onto the ones not yet
rounded.

Columns are solved in order of falling input power (static act-order): the group scales are fixed on the weight before
solving, and the codes are stored in the original order, so that a checkpoint needs no ``g_idx``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.methods.base import Solution, all_finite, check_finite
from quantspec.calibrate.quantize.methods.scales import refit_scale, search_scale
from quantspec.calibrate.quantize.observe import Statistics
from quantspec.numerics.affine import QuantizedWeight, dequantize, quantize
from quantspec.numerics.measures import output_power, relative_mse
from quantspec.numerics.scheme import Scheme

DAMPING_LADDER = (1, 10, 100)
"""Multiples of the damping asked for, tried in turn until the factorization is sound and the result good."""
_REFITS = 2  # take 3% and then 1% off the output error of 3 and 4-bit layers
_BLOCK = 128  # columns solved between two updates of all the rest


def quantize_linear(
    name: str, weight: Tensor, scheme: Scheme, statistics: Statistics, options: MethodOptions
) -> Solution:
    """GPTQ on the inputs' Hessian, or round-to-nearest with a reason where that fails."""
    assert statistics.hessian is not None
    check_finite(name, weight)
    hessian = statistics.hessian.matrix
    rtn = quantize(weight, scheme)
    if not all_finite(hessian):
        reason = "the calibration inputs overflow"
        return Solution(rtn, "rtn", relative_mse(dequantize(rtn), weight), fallback_reason=reason)
    power = output_power(weight, hessian) or 1.0
    rtn_error = output_power(dequantize(rtn).sub_(weight), hessian) / power
    reason = ""
    for damping in (options.damping * factor for factor in DAMPING_LADDER):
        factor = factorize(hessian, damping)
        solved = None if factor is None else solve_with_searched_scales(weight, hessian, factor, scheme)
        if solved is None:
            reason = f"the Hessian has no Cholesky factor up to damping {damping:g}"
            continue
        error = output_power(dequantize(solved).sub_(weight), hessian) / power
        if error <= rtn_error:
            return Solution(solved, "gptq", error, damping)
        reason = (
            f"GPTQ's output error {error:.3g} is above round-to-nearest's {rtn_error:.3g} up to damping {damping:g}"
        )
    return Solution(rtn, "rtn", rtn_error, fallback_reason=reason)


@dataclass(frozen=True)
class Factor:
    """The damped Hessian as ``L diag(curvature) L^T`` over columns in ``order [K]``, of which the last is solved first.

    ``lower [K, K]`` has ones on its diagonal. ``curvature [K]``, in the weight's own order, is what a column's squared
    error costs once the columns after it have made up for what they can.
    """

    lower: Tensor
    order: Tensor
    curvature: Tensor


def factorize(hessian: Tensor, damping: float, act_order: bool = True) -> Factor | None:
    """Factor ``H + damping * mean(diag H) I``; None where that is not positive definite."""
    diagonal = hessian.diagonal()
    columns = torch.arange(len(hessian), device=hessian.device)
    first = torch.argsort(diagonal, descending=True, stable=True) if act_order else columns
    order = first.flip(0)
    matrix = hessian[order[:, None], order]  # gathered at once: one more [K, K] matrix stands, and not two
    diagonal = matrix.diagonal()
    mean = diagonal.mean()
    # An input that never fires has no curvature: any value does, and plain rounding is what it gets.
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    diagonal += damping * mean
    # The factor comes in LAPACK's order, column by column: the upper one's columns are the lower one's rows.
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix.T, upper=True, out=(matrix.T, failed))  # symmetric, so in place
    root = matrix.diagonal().clone()
    if failed or not all_finite(matrix):
        return None
    curvature = torch.empty_like(root)
    curvature[order] = root.square()
    return Factor(matrix.div_(root), order, curvature)


def solve_with_searched_scales(
    weight: Tensor, hessian: Tensor, factor: Factor, scheme: Scheme
) -> QuantizedWeight | None:
    """Search scales, solve, and a few times fit the scales to the codes and solve anew; each row keeps the round that
    cost least. Every row's codes are GPTQ's for the scales that are stored with them."""
    scale, zero_point = search_scale(weight, factor.curvature, scheme)
    codes, cost = solve(weight, factor, scale, zero_point, scheme)
    for _ in range(_REFITS):
        scale_now = refit_scale(weight, hessian, QuantizedWeight(codes, scale, zero_point, scheme))
        codes_now, cost_now = solve(weight, factor, scale_now, zero_point, scheme)
        better = (cost_now < cost)[:, None]
        codes, scale = torch.where(better, codes_now, codes), torch.where(better, scale_now, scale)
        cost = torch.minimum(cost, cost_now)
    return QuantizedWeight(codes, scale, zero_point, scheme) if torch.isfinite(cost).all() else None


def solve(
    weight: Tensor, factor: Factor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """GPTQ codes ``[N, K]`` int8 for fixed group scales ``[N, G]``, and each row's damped output error ``[N]``.

    Works in the factor's dtype, without an inverse. Rounding errors e cost ``|e^T L|^2`` weighted by the curvature, and
    term j of ``e^T L`` holds only the errors of column j and of those solved before it: rounding
    ``w_j + sum_i e_i L_ij`` makes it least. These are the codes of GPTQ's own recursion (arXiv 2507.18553).
    """
    lower, order, k = factor.lower, factor.order, weight.shape[1]
    # All lies transposed, so that the column in hand is contiguous: errors and targets [K, N], scales and zeros [G, N].
    errors = weight.T[order].to(lower.dtype)  # weights until their column is solved
    targets = errors.clone()
    scales = scale.T.to(lower.dtype).contiguous()
    zeros = torch.zeros_like(scales) if zero_point is None else zero_point.T.to(lower.dtype).contiguous()
    groups = (order // scheme.group(k)).tolist()
    codes = torch.empty_like(errors, dtype=torch.int8)
    for end in range(k, 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        for column in reversed(range(start, end)):
            step, zero = scales[groups[column]], zeros[groups[column]]
            code = (targets[column] / step).add_(zero).round_().clamp_(scheme.q_min, scheme.q_max)
            codes[column] = code
            value = code.sub_(zero).mul_(step)
            errors[column] -= value
            targets[column] -= value
            targets[start:column].addr_(lower[column, start:column], errors[column])
        targets[:start].addmm_(lower[start:end, :start].T, errors[start:end])
    original = torch.empty_like(codes)
    original[order] = codes
    return original.T.contiguous(), factor.curvature[order] @ targets.square_()
