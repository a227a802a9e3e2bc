"""Group scales that are searched for, not taken from the largest value. All are rounded to their stored type before
anything is measured with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantspec.numerics.affine import QuantizedWeight, dequantize, group_slices, min_max_scale, scale_of_range
from quantspec.numerics.scheme import Scheme

_STEPS = 20
_FLOOR = {2: 0.3, 3: 0.4, 4: 0.6}  # below these shares of the range clipping never won on trained layers
_FLOOR_WIDE = 0.8


def search_scale(weight: Tensor, importance: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Stored scale and zero point ``[N, G]`` of the clipped range with the least rounding error in each group of
    ``weight [N, K]``, where column k's squared error counts ``importance[k]``."""
    scale, zero_point = min_max_scale(weight, scheme)
    for group, part in enumerate(group_slices(weight.shape[1], scheme)):

        def cost(error: Tensor, power: Tensor = importance[part]) -> Tensor:
            return error.square() @ power

        _search_group(weight[:, part], cost, scale, zero_point, group, scheme)
    return scale, zero_point


def search_scale_on_outputs(weight: Tensor, hessian: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Stored scale and zero point ``[N, G]`` of clipped ranges for the least output error ``tr(E H E^T)`` of plain
    rounding: group by group, each on top of the errors that the others make. Starts from ``search_scale``."""
    scale, zero_point = search_scale(weight, hessian.diagonal(), scheme)
    error = round_error(weight, scale, zero_point, scheme)
    for group, part in enumerate(group_slices(weight.shape[1], scheme)):
        block = hessian[part, part].contiguous()
        others = (error @ hessian[:, part]).sub_(error[:, part] @ block).mul_(2)

        def cost(own: Tensor, block: Tensor = block, others: Tensor = others) -> Tensor:
            return (own @ block).add_(others).mul_(own).sum(1)

        error[:, part] = _search_group(weight[:, part], cost, scale, zero_point, group, scheme)
    return scale, zero_point


def refit_scale(weight: Tensor, hessian: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Stored scales ``[N, G]`` for the least output error with the codes as they are: least squares, group by
    group."""
    scheme, stored = quantized.scheme, quantized.scale.clone()
    error = dequantize(quantized).sub_(weight)
    for group, part in enumerate(group_slices(weight.shape[1], scheme)):
        steps = quantized.codes[:, part].float()
        if quantized.zero_point is not None:
            steps -= quantized.zero_point[:, group, None]
        slope = (error @ hessian[:, part]).mul_(steps).sum(1)
        curvature = (steps @ hessian[part, part]).mul_(steps).sum(1)
        old = stored[:, group].float()
        new = (old - slope / curvature).to(stored.dtype)
        new = torch.where((new > 0) & torch.isfinite(new), new, stored[:, group])
        error[:, part] += steps * (new.float() - old)[:, None]
        stored[:, group] = new
    return stored


def round_error(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """What rounding to the nearest code adds to ``weight``: ``[N, K]``."""
    error = torch.empty_like(weight)
    for group, part in enumerate(group_slices(weight.shape[1], scheme)):
        zero = None if zero_point is None else zero_point[:, group, None]
        error[:, part] = _rounded(weight[:, part], scale[:, group, None], zero, scheme) - weight[:, part]
    return error


def _rounded(columns: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Nearest representable values of a group's ``columns [N, g]`` with ``scale`` and ``zero_point`` ``[N, 1]``."""
    step = scale.float()
    values = columns / step
    if zero_point is None:
        return values.round_().clamp_(scheme.q_min, scheme.q_max).mul_(step)
    zero = zero_point.float()
    return values.add_(zero).round_().clamp_(scheme.q_min, scheme.q_max).sub_(zero).mul_(step)


def _search_group(
    columns: Tensor,
    cost: Callable[[Tensor], Tensor],
    scale: Tensor,
    zero_point: Tensor | None,
    group: int,
    scheme: Scheme,
) -> Tensor:
    """Put the best found scale and zero point of one group into ``scale`` and ``zero_point`` (``[N, G]``); the error
    that remains, ``[N, g]``. ``cost`` gives an error's price per row."""
    low, high = columns.amin(1, keepdim=True).clamp(max=0), columns.amax(1, keepdim=True).clamp(min=0)
    zero = None if zero_point is None else zero_point[:, group, None]
    error = _rounded(columns, scale[:, group, None], zero, scheme) - columns
    best = cost(error)
    floor = _FLOOR.get(scheme.bits, _FLOOR_WIDE)
    for step in range(_STEPS + 1):
        shrink = 1.0 - (1.0 - floor) * step / _STEPS
        tried, zero = scale_of_range(low * shrink, high * shrink, scheme)
        tried_error = _rounded(columns, tried, zero, scheme).sub_(columns)
        price = cost(tried_error)
        better = price < best
        best = torch.where(better, price, best)
        torch.where(better[:, None], tried_error, error, out=error)
        scale[:, group] = torch.where(better, tried[:, 0], scale[:, group])
        if zero_point is not None and zero is not None:
            zero_point[:, group] = torch.where(better, zero[:, 0], zero_point[:, group])
    return error
