"""Keys and values in 8 or 4 bits: symmetric codes with one scale per token, head and 64 channels.

A row, one key or value of one head, is its codes and then its scales, all in one run of bytes: so the rows of a cache
move as those of any other. A row's bytes depend on that row alone. This is the oracle of the native kernels, which
write and read the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 64
"""Channels that share a scale."""
STEP = 16
"""Codes are padded to a multiple of this."""


@dataclass(frozen=True, slots=True)
class KVFormat:
    """Rows of ``head_dim`` channels in ``bits`` (8 or 4) each.

    A code is stored plus ``2^(bits - 1)``. Of 4-bit codes, byte j of a block of 8 holds channel j in its low half and
    channel j + 8 in its high one. Scales are fp32: the largest magnitude over ``2^(bits - 1) - 1/2``, or NaN for a
    group with a value that is not finite, which must not look like a sound one.
    """

    bits: int
    head_dim: int

    @property
    def groups(self) -> int:
        return -(-self.head_dim // GROUP)

    @property
    def code_bytes(self) -> int:
        return -(-self.head_dim // STEP) * STEP * self.bits // 8

    @property
    def row_bytes(self) -> int:
        return self.code_bytes + 4 * self.groups

    def encode(self, rows: Tensor) -> Tensor:
        """fp32 ``[.., head_dim]`` to uint8 ``[.., row_bytes]``."""
        half, padded = 1 << (self.bits - 1), self.code_bytes * 8 // self.bits
        grouped = F.pad(rows, (0, self.groups * GROUP - self.head_dim)).unflatten(-1, (self.groups, GROUP))
        scale = grouped.abs().amax(-1) / (half - 0.5)
        scale = torch.where(scale.isfinite(), scale, torch.nan)
        step = torch.where(scale > 0, scale, 1.0)[..., None]
        codes = (grouped / step).round_().clamp_(-half, half - 1).nan_to_num_(nan=-half).add_(half)
        stored = codes.flatten(-2)[..., :padded].to(torch.uint8)
        if self.bits == 4:
            low, high = stored.unflatten(-1, (-1, 2, STEP // 2)).unbind(-2)
            stored = (low | high << 4).flatten(-2)
        return torch.cat((stored, scale.contiguous().view(torch.uint8)), -1)

    def decode(self, rows: Tensor) -> Tensor:
        """uint8 ``[.., row_bytes]`` to fp32 ``[.., head_dim]``."""
        stored, scale = rows[..., : self.code_bytes], rows[..., self.code_bytes :].contiguous().view(torch.float32)
        if self.bits == 4:
            blocks = stored.unflatten(-1, (-1, 1, STEP // 2))
            stored = torch.cat((blocks & 15, blocks >> 4), -2).flatten(-3)
        codes = stored[..., : self.head_dim].float().sub_(1 << (self.bits - 1))
        return codes.mul_(scale.repeat_interleave(GROUP, -1)[..., : self.head_dim])
