"""The eager backend: plain torch operations, and the oracle of every fused kernel.

Exact mode gives a row the same bits at any width, tree, chunking and batch, because each operation is used only where
torch's result for a row depends on that row alone. A CPU matmul (MKL) computes each output as a chain of fused
multiply-adds over K, broken at fixed K, as long as the row count is a multiple of 4 and the column count one of 16.
``invariance.py`` checks it on the machine at hand; where it fails, rows go through one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.kernels.spans import ROWS, Span, make_span, round_up


@dataclass(frozen=True, slots=True)
class Tiling:
    """How exact matmuls take their rows: ``block`` rows a call (0: all at once, padded to ``ROWS``), of which the first
    ``used`` carry data."""

    block: int = 0
    used: int = 0


WHOLE, BLOCKS, SINGLE = Tiling(), Tiling(16, 16), Tiling(ROWS, 1)
"""From fast to sure: any number of rows, blocks of one shape, one row a call."""


class Linear:
    """``x [n, K] @ weight [N, K].T + bias [N]``; the weight is kept transposed, the faster order for few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, tiling: Tiling = WHOLE) -> None:
        self.weight, self.bias, self.tiling = weight.t().contiguous(), bias, tiling

    def __call__(self, x: Tensor) -> Tensor:
        """In exact mode n must be a multiple of ``ROWS``."""
        y = torch.mm(x, self.weight) if self.tiling is WHOLE else self._tiled(x)
        return y if self.bias is None else y.add_(self.bias)

    def _tiled(self, x: Tensor) -> Tensor:
        block, used = self.tiling.block, self.tiling.used
        y = x.new_empty(x.shape[0], self.weight.shape[1])
        for first in range(0, x.shape[0], used):
            rows = x.new_zeros(block, x.shape[1])
            count = min(used, x.shape[0] - first)
            rows[:count] = x[first : first + count]
            y[first : first + count] = torch.mm(rows, self.weight)[:count]
        return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension (arXiv 1910.07467)."""
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x [n, heads, d]`` with ``cos, sin [n, 1, d]``, the first half of sin negated."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[n, 2 I]``. By exp and division, since torch's silu rounds vector tails differently."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (gate / gate.neg().exp_().add_(1)).mul_(up)


def attend_fast(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """``attend`` through torch's fused attention: equal up to rounding, and the rounding depends on the width."""
    keys, values = keys[None, :, span.begin : span.end], values[None, :, span.begin : span.end]
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, attn_mask=span.mask, enable_gqa=True)
    return out[0].transpose(0, 1).reshape(q.shape[0], -1)


def attend(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """Attention of one sequence's rows ``q [n, heads, d]`` over cache slots ``keys, values [kv_heads, S, d]``: ``[n, heads * d]``.

    Slots that a row does not attend get weight zero, which changes no bit of a chain of multiply-adds; sums are broken
    at the same *logical* positions (see ``Span``) for a node of a tree and for its path decoded alone.
    """
    n, heads, d = q.shape
    kv_heads, width = keys.shape[0], span.end - span.begin
    queries = n * heads // kv_heads  # of one key-value head, in the order (group, row): the mask repeats over the group
    rows = q.new_zeros(kv_heads, round_up(queries, ROWS), d)
    rows[:, :queries] = (q * d**-0.5).view(n, kv_heads, -1, d).permute(1, 2, 0, 3).reshape(kv_heads, queries, d)
    scores = torch.bmm(rows, keys[:, span.begin : span.end].transpose(1, 2))
    weights = scores[:, :queries].view(kv_heads, -1, n, width) + span.mask
    weights = weights.sub_(weights.amax(-1, keepdim=True)).exp_()
    total = weights.cumsum(-1)[..., -1:]
    out = rows.zero_()
    for low, high, select in span.blocks:
        part = weights[..., low - span.begin : high - span.begin]
        part = (part if select is None else part * select).reshape(kv_heads, queries, high - low)
        padded = F.pad(part, (0, 0, 0, rows.shape[1] - queries))
        out += torch.bmm(padded, values[:, low:high])
    mixed = out[:, :queries].view(kv_heads, -1, n, d) / total
    return mixed.permute(2, 0, 1, 3).reshape(n, heads * d)


def attend_singly(q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """``attend`` one row at a time over that path's gathered keys: the same bits where torch keeps the rules above, and
    row-invariant where it does not."""
    out = []
    for i in range(q.shape[0]):
        slots = span.path(i)
        alone = make_span(len(slots) - 1, (-1,), None, q.device)
        gathered = [F.pad(kv.index_select(1, slots), (0, 0, 0, alone.end - len(slots))) for kv in (keys, values)]
        out.append(attend(q[i : i + 1].clone(), gathered[0], gathered[1], alone))
    return torch.cat(out)
