"""Rows of keys and values in 8 or 4 bits, as kernels write and read them: the bytes of ``numerics.kv``."""

from __future__ import annotations

import triton
import triton.language as tl

from quantspec.numerics.kv import GROUP, STEP

_GROUP, _STEP = tl.constexpr(GROUP), tl.constexpr(STEP)
_ROUNDING, _ROUNDED = tl.constexpr(1.5 * 2.0**23), tl.constexpr(0x4B400000)
"""A small number plus this is rounded to an integer, ties to even, that its bits less ``_ROUNDED`` are."""


@triton.jit
def store_coded(at: tl.tensor, x: tl.tensor, D: tl.constexpr, CODE_BYTES: tl.constexpr, BITS: tl.constexpr) -> None:
    """The fp32 row ``x``, zero from column D on, to the bytes at ``at``."""
    BLOCK: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = _GROUP if BLOCK > _GROUP else BLOCK
    HALF: tl.constexpr = 1 << (BITS - 1)
    PER_BYTE: tl.constexpr = 8 // BITS
    grouped = tl.reshape(x, [BLOCK // WIDTH, WIDTH])
    sound = tl.min((tl.abs(grouped) < float("inf")).to(tl.int32), 1) > 0
    scale = tl.where(sound, tl.div_rn(tl.max(tl.abs(grouped), 1), HALF - 0.5), float("nan"))
    steps = tl.div_rn(grouped, tl.where(scale > 0, scale, 1.0)[:, None])
    steps = tl.where(steps > -HALF, steps, -HALF)  # NaN too
    steps = tl.where(steps < HALF - 1, steps, HALF - 1)
    codes = (steps + _ROUNDING).to(tl.int32, bitcast=True) - (_ROUNDED - HALF)
    codes = tl.reshape(codes, [BLOCK // _STEP, PER_BYTE, _STEP // PER_BYTE])
    stored = tl.sum(codes << (BITS * tl.arange(0, PER_BYTE))[None, :, None], 1)
    byte = tl.arange(0, BLOCK // _STEP)[:, None] * (_STEP // PER_BYTE) + tl.arange(0, _STEP // PER_BYTE)[None, :]
    tl.store(at + byte, stored.to(tl.uint8), mask=byte < CODE_BYTES)
    group = tl.arange(0, BLOCK // WIDTH)
    scales = (at + CODE_BYTES).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scales + group, scale, mask=group * _GROUP < D)


@triton.jit
def load_coded(
    at: tl.tensor, there: tl.tensor, d: tl.tensor, D: tl.constexpr, CODE_BYTES: tl.constexpr, BITS: tl.constexpr
) -> tl.tensor:
    """fp32 ``[rows, columns]``: the columns ``d`` of the rows whose bytes begin at ``at [rows]``. Rows that are not
    ``there``, and columns from D on, are zero (of either sign)."""
    byte, loaded = d, there[:, None] & (d < D)[None, :]
    if BITS == 4:  # read twice, the second time from the first-level cache: nothing has to change lanes
        byte = d // _STEP * (_STEP // 2) + d % (_STEP // 2)
    stored = tl.load(at[:, None] + byte[None, :], mask=loaded, other=0)
    if BITS == 4:
        stored = stored >> (d % _STEP // (_STEP // 2) * 4).to(tl.uint8)[None, :] & 15
    # Below the end of 2^23's mantissa a code takes no conversion, of which a processor makes few at a time.
    codes = (stored.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - (2.0**23 + (1 << (BITS - 1)))
    scales = (at + CODE_BYTES).to(tl.pointer_type(tl.float32), bitcast=True)
    scale = tl.load(scales, mask=there, other=0.0)[:, None]
    for group in tl.static_range(1, (D + _GROUP - 1) // _GROUP):
        others = tl.load(scales + group, mask=there, other=0.0)[:, None]
        scale = tl.where((d // _GROUP == group)[None, :], others, scale)
    rows = codes * scale
    return rows if d.shape[0] == D else tl.where((d < D)[None, :], rows, 0.0)  # a scale may be NaN
