"""Checks, on the machine at hand, that the reference backend's rows keep their bits at any width.

What torch's libraries promise is accuracy, not equal bits: which code runs depends on the processor, the number of
threads and the shape. So exact mode is tested with the shapes of the model that is being loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantspec.kernels.reference import BLOCKS, SINGLE, WHOLE, Linear, Tiling, attend, attend_singly, rms_norm, swiglu
from quantspec.kernels.spans import BLOCK, LANES, ROWS, make_spans, round_up

_WIDTHS = (ROWS, 2 * ROWS, 3 * ROWS, 5 * ROWS, 64)
_TREE = (-1, -1, 0, 0, 1, 2, 2, 5, 7, 8)


def _random(*shape: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def choose_tiling(linear: Linear) -> Tiling:
    """The fastest tiling under which this linear layer's rows depend on their own input alone."""
    x = _random(132, linear.weight.shape[0], like=linear.weight)
    for tiling in (WHOLE, BLOCKS):
        linear.tiling = tiling
        whole = linear(x)
        pieces = [slice(first, first + m) for m in _WIDTHS for first in (0, 68)]
        if all(torch.equal(linear(x[piece].clone()), whole[piece]) for piece in pieces):
            return tiling
    return SINGLE


def elementwise_is_invariant(hidden: int, inner: int, like: Tensor) -> bool:
    """Whether norms over ``hidden`` and the gate over ``inner`` give a row the same bits at any width."""
    x, gate_up, weight = (_random(*shape, like=like) for shape in ((132, hidden), (132, 2 * inner), (hidden,)))
    normed, gated = rms_norm(x, weight, 1e-5), swiglu(gate_up)
    equal_norms = (torch.equal(rms_norm(x[:m].clone(), weight, 1e-5), normed[:m]) for m in _WIDTHS)
    equal_gates = (torch.equal(swiglu(gate_up[:m].clone()), gated[:m]) for m in _WIDTHS)
    return all(equal_norms) and all(equal_gates)


def attention_is_invariant(heads: int, kv_heads: int, head_dim: int, like: Tensor) -> bool:
    """Whether ``attend`` gives chains and trees, within one block and across its end, the bits of rows taken singly."""
    cached = 2 * BLOCK + LANES
    slots = round_up(cached + 2 * LANES, LANES)
    keys, values = _random(2, kv_heads, slots, head_dim, like=like)
    q = _random(2 * LANES, heads, head_dim, like=like)
    cases = (
        (cached, range(-1, 2 * LANES - 1)), (2 * BLOCK - 6, range(-1, 2 * LANES - 1)),
        (2 * BLOCK - 3, _TREE), (cached, _TREE), (5, _TREE), (BLOCK, (-1,)),
    )  # fmt: skip
    for length, parents in cases:
        (span,) = make_spans(length, tuple(parents), None, heads // kv_heads, like.device)
        rows = q[: len(parents)].clone()
        if not torch.equal(attend(rows, keys, values, span), attend_singly(rows, keys, values, span)):
            return False
    return True
