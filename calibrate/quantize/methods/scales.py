"""Group scales that are searched for, not taken from the largest value."""

from __future__ import annotations

import torch
from torch import Tensor

from quantspec.numerics.affine import QuantizedWeight, dequantize, group_range, quantize_codes, scale_of_range
from quantspec.numerics.scheme import Scheme


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
