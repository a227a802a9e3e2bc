"""SwiGLU (arXiv 2002.05202): the gated half of a feed-forward layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantspec.kernels.triton.rows import check_layout

_BLOCK = 1024


@triton.jit
def _swiglu(gate_up: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = gate_up + row * 2 * WIDTH + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + column, gated.to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[n, 2 I]``, all gates before all ups. Computed in fp32; returns ``[n, I]``."""
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape == (n, 2 * width), "as many gates as ups"
    assert width > 0, "no columns"
    check_layout(gate_up)
    out = gate_up.new_empty(n, width)
    if n:
        _swiglu[n, triton.cdiv(width, _BLOCK)](gate_up, out, width, _BLOCK)
    return out


def eager_swiglu(gate_up: Tensor) -> Tensor:
    """``swiglu`` by torch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)
