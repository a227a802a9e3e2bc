"""Group scales that are searched for, not taken from the largest value. All are rounded to their stored type before
anything is measured with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantspec.numerics.affine import QuantizedWeight, dequantize, group_slices, min_max_scale, scale_of_range
from quantspec.numerics.scheme import Scheme

_STEPS = 10
_FLOOR = {2: 0.3, 3: 0.4, 4: 0.6}  # below these shares of the range clipping never won on trained layers
_FLOOR_WIDE = 0.8
_NEAR = (0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0, 3.0, -3.0)  # steps from what the columns' own errors chose


def search_scale(weight: Tensor, importance: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Stored scale and zero point ``[N, G]`` of the clipped range with the least rounding error in each group of
    ``weight [N, K]``, where column k's squared error counts ``importance[k]``."""
    scale, zero_point, _, _ = _search_columns(weight, importance, scheme)
    return scale, zero_point


def search_scale_on_outputs(weight: Tensor, hessian: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None, float]:
    """Stored scale and zero point ``[N, G]`` of clipped ranges for the least output error ``tr(E H E^T)`` of plain
    rounding, and that error: group by group, each on top of the errors that the others make. Looks near what
    ``search_scale`` finds."""
    scale, zero_point, clip, error = _search_columns(weight, hessian.diagonal(), scheme)
    step, total = _step(scheme), 0.0
    for group, part in enumerate(group_slices(weight.shape[1], scheme)):
        block = hessian[part, part].contiguous()
        settled = error[:, : part.start] @ hessian[: part.start, part]
        others = (settled + error[:, part.stop :] @ hessian[part.stop :, part]).mul_(2)

        def cost(own: Tensor, block: Tensor = block, others: Tensor = others) -> Tensor:
            return (own @ block).add_(others).mul_(own).sum(1)

        search = _GroupSearch(weight[:, part], cost, scheme, clip[:, group])
        for steps in _NEAR:
            search.attempt(clip[:, group] + steps * step)
        error[:, part] = search.store(scale, zero_point, group)
        total += float(cost(error[:, part], others=settled.mul_(2)).sum(dtype=torch.float64))
    return scale, zero_point, max(total, 0.0)  # rounding can push a tiny quadratic form below zero


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


def _step(scheme: Scheme) -> float:
    return (1.0 - _FLOOR.get(scheme.bits, _FLOOR_WIDE)) / _STEPS


def _search_columns(weight: Tensor, importance: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """``search_scale``, and the share of each group's range that was kept ``[N, G]``, and the errors ``[N, K]``."""
    scale, zero_point = min_max_scale(weight, scheme)
    clip, error = torch.ones_like(scale, dtype=weight.dtype), torch.empty_like(weight)
    for group, part in enumerate(group_slices(weight.shape[1], scheme)):

        def cost(error: Tensor, power: Tensor = importance[part]) -> Tensor:
            return error.square() @ power

        search = _GroupSearch(weight[:, part], cost, scheme, clip[:, group])
        for steps in range(1, _STEPS + 1):
            search.attempt(clip.new_full((len(clip),), 1.0 - steps * _step(scheme)))
        error[:, part], clip[:, group] = search.store(scale, zero_point, group), search.clip
    return scale, zero_point, clip, error


class _GroupSearch:
    """The best of the clipped ranges tried for a group's ``columns [N, g]``, row by row: ``clip [N]`` is the share of
    the range that is kept. ``cost`` gives an error's price per row."""

    def __init__(self, columns: Tensor, cost: Callable[[Tensor], Tensor], scheme: Scheme, clip: Tensor) -> None:
        self.columns, self.cost, self.scheme, self.clip = columns.contiguous(), cost, scheme, clip.clone()
        self._low, self._high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
        self._best = cost(self._error(*self._range(clip)))

    def attempt(self, clip: Tensor) -> None:
        price = self.cost(self._error(*self._range(clip)))
        better = price < self._best
        self._best, self.clip = torch.where(better, price, self._best), torch.where(better, clip, self.clip)

    def store(self, scale: Tensor, zero_point: Tensor | None, group: int) -> Tensor:
        """Put the best into ``scale`` and ``zero_point`` (``[N, G]``); the error that remains, ``[N, g]``."""
        scale[:, group : group + 1], zero = self._range(self.clip)
        if zero_point is not None and zero is not None:
            zero_point[:, group : group + 1] = zero
        return self._error(scale[:, group : group + 1], zero)

    def _range(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stored scale and zero point ``[N, 1]``."""
        return scale_of_range((self._low * clip)[:, None], (self._high * clip)[:, None], self.scheme)

    def _error(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        return _rounded(self.columns, scale, zero, self.scheme).sub_(self.columns)


def _rounded(columns: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Nearest representable values of a group's ``columns [N, g]`` with ``scale`` and ``zero_point`` ``[N, 1]``."""
    step = scale.float()
    values = columns / step
    if zero_point is None:
        return values.round_().clamp_(scheme.q_min, scheme.q_max).mul_(step)
    zero = zero_point.float()
    return values.add_(zero).round_().clamp_(scheme.q_min, scheme.q_max).sub_(zero).mul_(step)
