"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, push each column's error onto the ones not yet
rounded.

Columns are solved in order of falling input power (static act-order): the group scales are fixed on the weight before
solving, and the codes are stored in the original order, so that a checkpoint needs no ``g_idx``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import LayerResult
from quantspec.errors import ModelError
from quantspec.numerics.affine import (
    QuantizedWeight,
    dequantize,
    group_range,
    quantize,
    quantize_codes,
    scale_of_range,
)
from quantspec.numerics.measures import relative_mse, relative_output_mse
from quantspec.numerics.scheme import Scheme

DAMPING_LADDER = (0.01, 0.1, 1.0)
"""Shares of the mean Hessian diagonal to add to it, tried in turn until the factorization is sound and the result
good."""
_BLOCK = 128  # columns solved between two updates of the whole rest


class Hessian:
    """``X^T X / rows`` of a linear layer's inputs ``[.., K]``, summed batch by batch: ``matrix [K, K]`` in fp32."""

    def __init__(self, k: int, device: str | torch.device = "cpu") -> None:
        self.matrix = torch.zeros(k, k, device=device)
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        self.rows += len(flat)
        # A running mean: the sum over many tokens of a large model would leave fp32's exact range.
        self.matrix += (flat.T @ flat - self.matrix * len(flat)) / self.rows


@dataclass(frozen=True)
class Solution:
    """A quantized linear layer and how it was reached (fields as in ``LayerResult``)."""

    quantized: QuantizedWeight
    method: str
    error: float
    damping: float | None = None
    fallback_reason: str | None = None

    def result(self, name: str, seconds: float) -> LayerResult:
        return LayerResult(name, self.method, self.error, self.damping, round(seconds, 3), self.fallback_reason)


def quantize_linear(name: str, weight: Tensor, scheme: Scheme, hessian: Tensor | None) -> Solution:
    """Quantize ``weight [N, K]`` by GPTQ on ``hessian [K, K]``, or by round-to-nearest where that is None or GPTQ
    fails.

    Raises ``ModelError`` when the weight holds NaN or Inf.
    """
    if not torch.isfinite(weight).all():
        raise ModelError(f"{name}.weight holds NaN or Inf", hint="the checkpoint is damaged; get it again")
    rtn = quantize(weight, scheme)
    if hessian is None:
        return Solution(rtn, "rtn", relative_mse(dequantize(rtn), weight))
    if not torch.isfinite(hessian).all():
        reason = "the calibration inputs overflow"
        return Solution(rtn, "rtn", relative_mse(dequantize(rtn), weight), fallback_reason=reason)
    rtn_error = relative_output_mse(dequantize(rtn), weight, hessian)
    scale, zero_point = search_scale(weight, hessian.diagonal(), scheme)
    reason = ""
    for damping in DAMPING_LADDER:
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


def search_scale(weight: Tensor, importance: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Stored scale and zero point ``[N, G]`` of the clipped range with the least rounding error in each group, where
    column k's squared error counts ``importance[k]`` (its mean squared input)."""
    low, high = group_range(weight, scheme)
    n, k = weight.shape
    groups, width = scheme.num_groups(k), scheme.group(k)
    best = torch.full((n, groups), torch.inf, device=weight.device)
    best_shrink = torch.ones_like(best)
    # Below these shares of the range clipping never won on trained layers; 2 bits clip the most.
    floor = {2: 0.3, 3: 0.4, 4: 0.6}.get(scheme.bits, 0.8)
    for step in range(21):
        shrink = 1.0 - (1.0 - floor) * step / 20
        scale, zero_point = scale_of_range(low * shrink, high * shrink, scheme)
        codes = quantize_codes(weight, scale, zero_point, scheme)
        error = (dequantize(QuantizedWeight(codes, scale, zero_point, scheme)) - weight).square_().mul_(importance)
        error = torch.nn.functional.pad(error, (0, groups * width - k)).view(n, groups, width).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_shrink[better] = shrink
    return scale_of_range(low * best_shrink, high * best_shrink, scheme)


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
