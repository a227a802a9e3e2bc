"""Activations in 8 bits, as engines round them in front of an int8 product: the oracle, in fp32."""

from __future__ import annotations

from torch import Tensor

MOST = 127
"""Codes are symmetric: -128 is not used."""


def round_activations(x: Tensor) -> Tensor:
    """Rows ``[.., K]`` with each value at its nearest int8 code, under one scale per row: ``absmax / 127``."""
    scale = x.abs().amax(-1, keepdim=True) / MOST
    return (x / scale.where(scale > 0, 1.0)).round_().mul_(scale)
