"""Linear layers whose weights are not quantized. Every n goes through one kernel, on tiles of 64 rows, the last one
filled up with zeros, and K is gone through from end to end: a row of the result depends on that row alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from quantspec.kernels.triton.rows import check_layout

ROWS, COLUMNS = 64, 32
"""The tile of the output that a thread block computes: narrow, so that 4096 columns still keep a large GPU busy."""
_DEPTH_BYTES = 128


@triton.jit(do_not_specialize=["n"])  # or n = 1 and multiples of 16 would get kernels of their own
def _dense(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor, n: int, k: int, columns: int,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, depth = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    x_rows, weight_rows = x + row.to(tl.int64)[:, None] * k, weight + column.to(tl.int64)[None, :] * k
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, k, DEPTH):
        at = start + depth
        part = tl.load(x_rows + at[None, :], mask=(row < n)[:, None] & (at < k)[None, :], other=0.0)
        # Each weight is read once in a forward, each activation by every tile.
        inside = (at < k)[:, None] & (column < columns)[None, :]
        theirs = tl.load(weight_rows + at[:, None], mask=inside, other=0.0, eviction_policy="evict_first")
        total = tl.dot(part, theirs, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    place = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(row < n)[:, None] & (column < columns)[None, :])


class TritonDense:
    """``x [n, K] @ weight [N, K].T + bias [N]`` in one floating type, with sums in fp32.

    Returns ``out_dtype`` (None: the type of x). ``weight`` must lie on the device that computes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> None:
        self.weight = weight.contiguous()
        self._bias = None if bias is None else bias.to(weight.device, torch.float32).contiguous()
        self._out_dtype = out_dtype or weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """``[n, K]`` to ``[n, N]``."""
        (n, k), columns = x.shape, self.weight.shape[0]
        assert k == self.weight.shape[1], "rows of the weight's width"
        assert x.dtype == self.weight.dtype, "x and weight of one dtype"
        bias = self.weight if self._bias is None else self._bias  # an unused pointer must still be one
        check_layout(x, self.weight, bias)
        out = x.new_empty(n, columns, dtype=self._out_dtype)
        if n:
            _dense[triton.cdiv(n, ROWS), triton.cdiv(columns, COLUMNS)](
                x, self.weight, bias, out, n, k, columns, self._bias is not None,
                ROWS, COLUMNS, _DEPTH_BYTES // x.element_size(), num_warps=4,
            )  # fmt: skip
        return out


def eager_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``TritonDense`` by torch."""
    return F.linear(x.float(), weight.float(), bias).to(x.dtype)
