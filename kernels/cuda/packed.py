"""Weights in the CUDA kernels' tiles (layout: ``src/layout.h``), made where the weight is, and taken apart again."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantspec.errors import ModelError, UsageError
from quantspec.numerics.affine import QuantizedWeight
from quantspec.numerics.scheme import CHANNEL, Scheme

TILE_ROWS = 256
CODE_BYTES = 16384
TILE_BYTES = CODE_BYTES + 2 * TILE_ROWS
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight k in a row is in nibble i of a word."""


class Params(ctypes.Structure):
    """``struct Params`` of ``src/layout.h``."""

    _fields_ = (
        ("weights", c_void_p), ("x", c_void_p), ("y", c_void_p), ("bias", c_void_p), ("workspace", c_void_p),
        ("arrivals", c_void_p), ("x_stride", c_int64), ("y_stride", c_int64), ("n", c_int32), ("rows", c_int32),
        ("row_blocks", c_int32), ("k_tiles", c_int32), ("bfloat_scales", c_int32), ("float_y", c_int32),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """``tiles [row_blocks, k_tiles, TILE_BYTES]`` uint8 of a weight ``[rows, cols]`` in 4 or 8 bits; ``scale_dtype`` is
    float16 or bfloat16."""

    tiles: Tensor
    rows: int
    cols: int
    bits: int
    scale_dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """What one product reads."""
        return self.tiles.numel()


def tile_k(bits: int) -> int:
    """k per tile: each tile has the same number of bytes."""
    return CODE_BYTES * 8 // (TILE_ROWS * bits)


def stored_bits(scheme: Scheme) -> int:
    return 4 if scheme.bits <= 4 else 8


def refusal(scheme: Scheme) -> str | None:
    """Why a weight of this scheme cannot be packed; None if it can."""
    width = tile_k(stored_bits(scheme))
    if not scheme.symmetric:
        return "has no zero points"
    if scheme.group_size != CHANNEL and scheme.group_size % width:
        return f"has groups of multiples of {width} alone, not of {scheme.group_size}"
    if scheme.dtype == "float32":
        return "has scales of 16 bits alone, not of float32"
    return None


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Codes ``[N, K]`` of up to 4 bits as nibbles, of 5 to 8 as bytes, where the weight is.

    N is filled up to a multiple of ``TILE_ROWS`` with zeros. Raises ``ModelError`` for scales that are not finite,
    ``UsageError`` for a scheme or a K that the kernels do not have.
    """
    (n, k), scheme = weight.codes.shape, weight.scheme
    bits = stored_bits(scheme)
    width = tile_k(bits)
    why = refusal(scheme) or (None if k and k % width == 0 else f"has inputs of multiples of {width} alone")
    if why is not None:
        raise UsageError(f"the CUDA kernels cannot hold a weight [{n}, {k}]: {why}")
    if n == 0 or weight.scale.shape != (n, scheme.num_groups(k)) or weight.codes.dtype != torch.int8:
        raise UsageError(
            f"codes [{n}, {k}] of {weight.codes.dtype} with scales {list(weight.scale.shape)} are not a weight of "
            f"{scheme.bits} bits in groups of {scheme.group(k)}"
        )
    if not torch.isfinite(weight.scale).all():
        raise ModelError(f"a weight [{n}, {k}] has scales that are not finite", hint="quantize the model again")
    missing = -n % TILE_ROWS
    codes = _arrange_codes(pad(weight.codes, (0, 0, 0, missing)), bits)
    per_tile = weight.scale.repeat_interleave(scheme.group(k) // width, dim=1)[:, : k // width]
    scales = _arrange_scales(pad(per_tile, (0, 0, 0, missing)).contiguous())
    return PackedWeight(torch.cat([codes, scales], dim=-1), n, k, bits, weight.scale.dtype)


def unpack(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """The inverse: codes ``[N, K]`` int8 and scales ``[N, K / tile_k]``, one for each tile."""
    row_blocks, k_tiles, _ = packed.tiles.shape
    data, stored = packed.tiles[..., :CODE_BYTES], packed.tiles[..., CODE_BYTES:]
    rows = row_blocks * TILE_ROWS
    if packed.bits == 4:
        nibbles = torch.stack([data & 15, data >> 4], dim=-1).view(row_blocks, k_tiles, 8, 4, 8, 4, 4, 8)
        eights = nibbles[..., torch.tensor(NIBBLES, device=data.device).argsort()]
        codes = (eights.to(torch.int8) - 8).permute(0, 2, 6, 4, 1, 3, 5, 7)
    else:
        codes = (data ^ 0x80).view(torch.int8).view(row_blocks, k_tiles, 8, 2, 2, 8, 4, 2, 8)
        codes = codes.permute(0, 2, 4, 7, 5, 1, 3, 6, 8)
    scales = stored.contiguous().view(packed.scale_dtype).view(row_blocks, k_tiles, 8, 8, 4).permute(0, 2, 4, 3, 1)
    return (
        codes.reshape(rows, packed.cols)[: packed.rows].contiguous(),
        scales.reshape(rows, k_tiles)[: packed.rows].contiguous(),
    )


def _arrange_codes(codes: Tensor, bits: int) -> Tensor:
    """``[N, K]`` int8 to ``[row_blocks, k_tiles, CODE_BYTES]`` uint8: a row is (row block, warp, slot, g), a column
    (k tile, chunk, t, one of eight)."""
    (n, k), width = codes.shape, tile_k(bits)
    row_blocks, k_tiles = n // TILE_ROWS, k // width
    axes = codes.view(row_blocks, 8, 4, 8, k_tiles, width // 32, 4, 8)
    if bits == 4:
        eights = (axes.permute(0, 4, 1, 5, 3, 6, 2, 7) + 8).to(torch.uint8)[..., list(NIBBLES)]
        data = eights[..., 0::2] | eights[..., 1::2] << 4
    else:  # slots in two parts
        parts = axes.view(row_blocks, 8, 2, 2, 8, k_tiles, width // 32, 4, 8).permute(0, 5, 1, 6, 2, 4, 7, 3, 8)
        data = parts.contiguous().view(torch.uint8) ^ 0x80
    return data.reshape(row_blocks, k_tiles, CODE_BYTES)


def _arrange_scales(scales: Tensor) -> Tensor:
    """``[N, k_tiles]`` to bytes ``[row_blocks, k_tiles, 2 * TILE_ROWS]``, in order (warp, g, slot)."""
    n, k_tiles = scales.shape
    axes = scales.view(n // TILE_ROWS, 8, 4, 8, k_tiles).permute(0, 4, 1, 3, 2)
    return axes.contiguous().view(torch.uint8).view(n // TILE_ROWS, k_tiles, 2 * TILE_ROWS)
