"""Rotary embedding (arXiv 2104.09864) of queries and keys, scaling of queries, and the write into the cache, in one:
as rows of its dtype, or in 8 or 4 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantspec.kernels.triton.kv import store_coded
from quantspec.kernels.triton.rows import Rows, check_layout, check_row
from quantspec.numerics.kv import STEP, KVFormat


@triton.jit(do_not_specialize=["slots"])
def _rope(
    qkv: tl.tensor, cos: tl.tensor, sin: tl.tensor, norm: tl.tensor, cached: tl.tensor, depths: tl.tensor,
    q: tl.tensor, kv: tl.tensor, slots: int, eps: float, scale: float,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    BITS: tl.constexpr, CODE_BYTES: tl.constexpr, ROW: tl.constexpr,
) -> None:  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside, partner = d < D, (d + D // 2) % D
    at = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * D
    x = tl.load(at + d, mask=inside, other=0.0).to(tl.float32)
    length = tl.load(cached).to(tl.int64)
    if head < HEADS + KV_HEADS:
        turned = tl.load(at + partner, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            rms = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
            x *= rms * tl.load(norm + head * D + d, mask=inside, other=0.0).to(tl.float32)
            turned *= rms * tl.load(norm + head * D + partner, mask=inside, other=0.0).to(tl.float32)
        angle = (length + tl.load(depths + row)) * D + d
        x *= tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        x += turned * tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS:
        tl.store(q + (row * HEADS + head) * D + d, (x * scale).to(q.dtype.element_ty), mask=inside)
    else:
        slot = (head - HEADS).to(tl.int64) * slots + length + row
        if BITS:
            store_coded(kv + slot * ROW, tl.where(inside, x, 0.0), D, CODE_BYTES, BITS)
        else:
            tl.store(kv + slot * ROW + d, x.to(kv.dtype.element_ty), mask=inside)


def rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: Rows, kv: Tensor, norm: Tensor | None = None, eps: float = 0.0,
    form: KVFormat | None = None,
) -> Tensor:  # fmt: skip
    """Queries ``[n, heads, d]``, rotated and multiplied by d^-1/2; keys (rotated) and values go into their cache slots.

    ``qkv [n, heads + 2 kv_heads, d]``; ``cos, sin [P, d]`` as in ``models.rope.RopeTable``, for every position that the
    cache can hold; ``kv [2 kv_heads, slots, d]``, one layer of a cache with room for all rows; with a ``form`` uint8
    ``[2 kv_heads, slots, row_bytes]``, and the rows, in fp32 until then, are quantized. ``norm [heads +
    kv_heads, d]`` are weights of an RMSNorm of every query and key head before the rotation (Qwen3). Computed in fp32.
    """
    n, heads, kv_heads, d = _sizes(qkv, kv, form)
    assert n == len(rows), "other rows than the tree has"
    assert d % 2 == 0, "columns are rotated in pairs"
    assert cos.shape == sin.shape == (cos.shape[0], d), "cos and sin have one column per head column"
    assert cos.shape[0] >= kv.shape[1], "a table shorter than the cache"
    weights = cos if norm is None else norm
    assert norm is None or norm.shape == (heads + kv_heads, d), "one norm per query and key head"
    check_layout(qkv, kv, cos, sin, weights, rows.cached, rows.depths)
    q = qkv.new_empty(n, heads, d)
    if n:
        _rope[n, heads + 2 * kv_heads](
            qkv, cos, sin, weights, rows.cached, rows.depths, q, kv, kv.shape[1], eps, d**-0.5,
            heads, kv_heads, d, max(STEP, triton.next_power_of_2(d)), norm is not None,
            form.bits if form else 0, form.code_bytes if form else 0, kv.shape[2], num_warps=1,
        )  # fmt: skip
    return q


def eager_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: Rows, kv: Tensor, norm: Tensor | None = None, eps: float = 0.0,
    form: KVFormat | None = None,
) -> Tensor:  # fmt: skip
    """``rope`` by torch."""
    n, heads, kv_heads, d = _sizes(qkv, kv, form)
    turning, values = qkv[:, : heads + kv_heads].float(), qkv[:, heads + kv_heads :]
    if norm is not None:
        turning = turning * (turning.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.float()
    angle = (rows.cached + rows.depths).long()
    turned = turning * cos[angle][:, None].float() + turning.roll(d // 2, -1) * sin[angle][:, None].float()
    start = int(rows.cached)
    written = torch.cat((turned[:, heads:], values.to(turned.dtype)), 1)
    written = written.to(kv.dtype) if form is None else form.encode(written)
    kv[:, start : start + n] = written.transpose(0, 1)
    return (turned[:, :heads] * d**-0.5).to(qkv.dtype)


def _sizes(qkv: Tensor, kv: Tensor, form: KVFormat | None) -> tuple[int, int, int, int]:
    n, planes, d = qkv.shape
    check_row(kv, d, form)
    assert kv.shape[0] % 2 == 0, "as many keys as values"
    assert planes > kv.shape[0], "no query heads"
    return n, planes - kv.shape[0], kv.shape[0] // 2, d
