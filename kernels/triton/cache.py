"""The move of accepted rows into place, for all layers of a cache at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantspec.kernels.triton.rows import check_layout

MAX_ROWS = 1024
_COLUMNS = 32


@triton.jit(do_not_specialize=["slots", "count"])
def _commit(
    kv: tl.tensor, length: tl.tensor, rows: tl.tensor, slots: int, count: int,
    D: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    i, column = tl.arange(0, BLOCK), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(rows + i, mask=i < count, other=-1)
    moves = ((row >= 0) & (row != i))[:, None] & (column < D)[None, :]
    start = kv + (tl.program_id(0).to(tl.int64) * slots + tl.load(length)) * D
    moved = tl.load(start + row[:, None] * D + column[None, :], mask=moves)
    # A row may be written where another, which belongs to other threads, is read.
    tl.debug_barrier()
    tl.store(start + i[:, None] * D + column[None, :], moved, mask=moves)


def commit(kv: Tensor, length: Tensor, rows: Tensor) -> None:
    """Slot ``length + i`` of every layer and head gets what slot ``length + rows[i]`` held, for all i at once.

    ``kv [layers, 2 kv_heads, slots, d]``, ``length [1]`` and ``rows [m]`` int32, on the device; entries of -1 (those
    behind the accepted path) move nothing. Source and target may overlap.
    """
    if kv.dtype == torch.uint8:  # quantized rows, of a multiple of 4 bytes
        kv = kv.view(torch.int32)
    planes, slots, d, m = kv.shape[0] * kv.shape[1], kv.shape[2], kv.shape[3], rows.shape[0]
    assert m <= MAX_ROWS, f"at most {MAX_ROWS} rows"
    check_layout(kv, length, rows)
    if m:
        grid = planes, triton.cdiv(d, _COLUMNS)
        _commit[grid](kv, length, rows, slots, m, d, triton.next_power_of_2(m), _COLUMNS)


def eager_commit(kv: Tensor, length: Tensor, rows: Tensor) -> None:
    """``commit`` by torch."""
    start, kept = int(length), rows >= 0
    source = start + rows[kept].long()
    kv[:, :, start + kept.nonzero()[:, 0]] = kv.index_select(2, source)
