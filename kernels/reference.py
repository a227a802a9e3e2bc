"""The eager backend: plain torch operations, and the oracle of every fused kernel.

Exact mode gives a row the same bits at any width, tree, chunking and batch, because each operation is used only where
torch's result for a row depends on that row alone. A CPU matmul (MKL) computes each output as a chain of fused
multiply-adds over K, broken at fixed K, as long as the row count is a multiple of 4 and the column count one of 16;
elementwise operations are those that IEEE 754 rounds correctly, and exp. ``invariance.py`` checks this on the machine
at hand; where it fails, rows go through one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.kernels.spans import LANES, ROWS, Span, make_spans, round_up


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a matmul takes its rows: ``block`` rows a call, of which the first ``used`` carry data (0: all at once)."""

    block: int = 0
    used: int = 0


WHOLE, BLOCKS, SINGLE = Tiling(), Tiling(16, 16), Tiling(ROWS, 1)
"""From fast to sure: any number of rows, blocks of one shape, one row a call."""


class Linear:
    """``x [n, K] @ weight [N, K].T + bias [N]``; the weight is kept transposed, the faster order for few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias, self.tiling = weight.t().contiguous(), bias, WHOLE

    def __call__(self, x: Tensor) -> Tensor:
        """In exact mode n must be a multiple of ``ROWS``."""
        y = torch.mm(x, self.weight) if self.tiling.used == 0 else self._tiled(x)
        return y if self.bias is None else y.add_(self.bias)

    def _tiled(self, x: Tensor) -> Tensor:
        block, used = self.tiling.block, self.tiling.used
        y = x.new_empty(x.shape[0], self.weight.shape[1])
        for first in range(0, x.shape[0], used):
            rows = x[first : first + used]
            padded = F.pad(rows, (0, 0, 0, block - rows.shape[0]))
            y[first : first + used] = torch.mm(padded, self.weight)[: rows.shape[0]]
        return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension (arXiv 1910.07467)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * (length * length).mul_(1 / x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x [n, heads, d]`` by ``cos, sin [n, heads, d]``, the first half of sin negated."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[n, 2 I]``. By exp and division, since torch's silu rounds vector tails differently."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (gate / gate.neg().exp_().add_(1)).mul_(up)


def attend(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """Attention of the scaled queries ``q [n, heads, d]`` of a span over cache slots ``keys, values [kv_heads, S, d]``.
    Returns ``[n, heads * d]``.

    Slots that a row does not attend get weight zero, which changes no bit of a chain of multiply-adds; sums are broken
    at the same *logical* positions (see ``Span``) for a node of a tree and for its path decoded alone.
    """
    n, heads, d = q.shape
    kv_heads, queries, padded = keys.shape[0], n * span.group, span.mask.shape[0]
    rows = q.reshape(n, kv_heads, -1, d).transpose(0, 1).reshape(kv_heads, queries, d)
    rows = rows if queries == padded else F.pad(rows, (0, 0, 0, padded - queries))
    scores = torch.bmm(rows, keys[:, span.begin : span.end].transpose(1, 2)).add_(span.mask)
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    out = torch.zeros_like(rows)
    for low, high, select in span.blocks:
        part = weights[..., low - span.begin : high - span.begin]
        out.baddbmm_(part if select is None else part * select, values[:, low:high])
    # A sum in order, which zeros in between do not change; torch.sum would deal them out to vector lanes.
    out.div_(weights.cumsum(-1)[..., -1:])
    return out[:, :queries].view(kv_heads, n, -1, d).transpose(0, 1).reshape(n, heads * d)


def attend_singly(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """``attend`` one row at a time over that path's gathered keys: the same bits where torch keeps the rules above, and
    row-invariant where it does not."""
    out = []
    for i in range(q.shape[0]):
        slots = span.path(i)
        (alone,) = make_spans(len(slots) - 1, (-1,), None, span.group, q.device)
        missing = round_up(len(slots), LANES) - len(slots)
        gathered = [F.pad(kv.index_select(1, slots), (0, 0, 0, missing)) for kv in (keys, values)]
        out.append(attend(q[i : i + 1].clone(), gathered[0], gathered[1], alone))
    return torch.cat(out)


def attend_fast(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """``attend`` through torch's fused attention: equal up to rounding, which changes with the width."""
    n, heads, d = q.shape
    rows = q.reshape(n, keys.shape[0], -1, d).transpose(0, 1).reshape(1, keys.shape[0], -1, d)
    keys, values = keys[None, :, span.begin : span.end], values[None, :, span.begin : span.end]
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=span.mask[: rows.shape[2]], scale=1.0)
    return out.view(keys.shape[1], n, -1, d).transpose(0, 1).reshape(n, heads * d)
