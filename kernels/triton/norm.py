"""RMSNorm (arXiv 1910.07467), with the residual addition before it. One program per row: its sum has one order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantspec.kernels.triton.rows import check_layout

MAX_WIDTH = 32768
"""A row must fit the registers of one program."""


@triton.jit
def _rms_norm(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, normed: tl.tensor, total: tl.tensor, eps: float,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    inside = column < WIDTH
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        row += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        # The stream goes on rounded, and the norm is of what goes on.
        rounded = row.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        row = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / WIDTH + eps)
    out = row * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, out.to(normed.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The norm of ``x + residual``, and that sum itself (``x`` where there is no residual), both ``[n, H]``.

    ``x, residual [n, H]`` of one dtype, ``weight [H]``. Computed in fp32.
    """
    n, width = x.shape
    added = x if residual is None else residual
    assert added.shape == x.shape, "x and residual must have one shape"
    assert added.dtype == x.dtype, "x and residual must have one dtype"
    assert weight.shape == (width,), "one weight per column"
    assert 0 < width <= MAX_WIDTH, f"rows of 1 to {MAX_WIDTH} columns"
    check_layout(x, added, weight)
    normed, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    if n:
        block = triton.next_power_of_2(width)
        warps = min(max(block // 1024, 1), 16)
        _rms_norm[n,](x, added, weight, normed, total, eps, width, block, residual is not None, num_warps=warps)
    return normed, total


def eager_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``rms_norm`` by torch."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    row = total.float()
    scale = (row.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (row * scale * weight.float()).to(x.dtype), total
