"""What all rounding methods share: their signature, and what they hand back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import LayerResult, MethodOptions
from quantspec.calibrate.quantize.observe import Need, Statistics
from quantspec.errors import ModelError
from quantspec.numerics.affine import QuantizedWeight
from quantspec.numerics.scheme import Scheme


@dataclass(frozen=True)
class Solution:
    """A quantized linear layer and how it was reached (fields as in ``LayerResult``)."""

    quantized: QuantizedWeight
    method: str
    error: float
    damping: float | None = None
    fallback_reason: str | None = None

    def result(self, name: str, seconds: float) -> LayerResult:
        bits = self.quantized.scheme.bits
        return LayerResult(name, self.method, self.error, self.damping, round(seconds, 3), self.fallback_reason, bits)


@dataclass(frozen=True)
class ForeignSolution:
    """A linear layer in another package's format: what it stands for, ``dense [N, K]`` in fp32, and the tensors that
    hold it, by their suffix."""

    dense: Tensor
    tensors: dict[str, Tensor]
    bits: int
    method: str
    error: float

    def result(self, name: str, seconds: float) -> LayerResult:
        return LayerResult(name, self.method, self.error, seconds=round(seconds, 3), bits=self.bits)


QuantizeLinear = Callable[[str, Tensor, Scheme, Statistics, MethodOptions], Solution | ForeignSolution]
"""Quantize the linear layer of that name, ``weight [N, K]`` in fp32, which must not be changed. Raises ``ModelError``
when the weight holds NaN or Inf."""


@dataclass(frozen=True)
class Method:
    """A rounding method and what it must know of the inputs; nothing means that it reads no calibration text."""

    quantize_linear: QuantizeLinear
    needs: frozenset[Need] = frozenset()
    max_samples: int | None = None
    """Calibration rows that are enough for it."""


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no Inf, in one pass: ``isfinite`` makes temporaries of more than twice the size."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(values))


def check_finite(name: str, weight: Tensor) -> None:
    """Raises ``ModelError`` when ``weight`` holds NaN or Inf."""
    if not all_finite(weight):
        raise ModelError(f"{name}.weight holds NaN or Inf", hint="the checkpoint is damaged; get it again")
