"""How packed weights are stored, which is what CUDA kernels are compiled for. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

TILE_ROWS = 256
CODE_BYTES = 16384
GROUPS = (128, 64, 32)
"""k that share a scale in a tile: larger groups are stored as several of these."""


@dataclass(frozen=True, slots=True)
class TileFormat:
    """``Weights`` of ``src/layout.h``: codes of 4 or 8 ``bits``, of which ``group`` along k share a scale of 2 or 4
    bytes and, with ``zeros``, a zero point."""

    bits: int = 4
    group: int = 128
    zeros: bool = False
    scale_bytes: int = 2

    @property
    def k(self) -> int:
        """k of a tile: the codes of each have the same number of bytes."""
        return CODE_BYTES * 8 // (TILE_ROWS * self.bits)

    @property
    def groups(self) -> int:
        return self.k // self.group

    @property
    def scales_end(self) -> int:
        return CODE_BYTES + self.groups * TILE_ROWS * self.scale_bytes

    @property
    def nbytes(self) -> int:
        return self.scales_end + self.zeros * self.groups * TILE_ROWS

    def __str__(self) -> str:
        return f"w{self.bits}g{self.group}{'z' * self.zeros}s{8 * self.scale_bytes}"
