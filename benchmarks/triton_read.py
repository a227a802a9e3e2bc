"""A kernel that does nothing but read: what bandwidth is there for any other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _ROUNDS = 4096, 8


@triton.jit
def _read(data: tl.tensor, sums: tl.tensor, ROUNDS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    start = tl.program_id(0).to(tl.int64) * (ROUNDS * BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(ROUNDS):
        total += tl.load(data + start + i * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def reader(data: Tensor) -> Callable[[], Tensor]:
    """A call that reads ``data`` (fp32, of a multiple of 32768 numbers) and returns the sums of its parts."""
    programs = data.numel() // (_BLOCK * _ROUNDS)
    assert programs * _BLOCK * _ROUNDS == data.numel()
    sums = torch.empty(programs, device=data.device)

    def read() -> Tensor:
        _read[programs,](data, sums, _ROUNDS, _BLOCK, num_warps=8)
        return sums

    return read
