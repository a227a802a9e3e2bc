"""A draft that only the device knows, taken over into the inputs of a forward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quantspec.kernels.triton.rows import Rows


@triton.jit(do_not_specialize=["lag", "capacity", "max_depth", "width"])
def _graft(
    record: tl.tensor, tokens: tl.tensor, depths: tl.tensor, paths: tl.tensor,
    lag: int, capacity: int, max_depth: int, width: int,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    node = tl.arange(0, BLOCK)
    mine = node < capacity
    parents = record + 1 + capacity
    tl.store(tokens + lag + node, tl.load(record + 1 + node, mask=mine), mask=mine)
    # Up from every node at once, first to count its ancestors and then to name them, itself last.
    at, depth = node, node * 0
    for _ in range(max_depth):
        inside = mine & (at >= 0)
        depth += inside.to(tl.int32)
        at = tl.load(parents + at, mask=inside, other=-1)
    tl.store(depths + lag + node, lag - 1 + depth, mask=mine)
    path = paths + (lag + node) * width
    for i in range(lag):
        tl.store(path + i, node * 0 + i, mask=mine)
    at = node
    for i in range(max_depth):
        inside = mine & (at >= 0)
        tl.store(path + lag + depth - 1 - i, lag + at, mask=inside)
        at = tl.load(parents + at, mask=inside, other=-1)


def graft(record: Tensor, capacity: int, max_depth: int, lag: int, tokens: Tensor, rows: Rows) -> None:
    """Of one sequence's rows those behind the first ``lag``, which stand in for a ``types.PendingDraft``, become its
    nodes below the last of these. ``tokens [n]`` and ``rows``, all on the device, are changed in place."""
    assert 0 < lag <= len(rows) - capacity, "a draft hangs on a row of this forward"
    assert record.shape == (1 + 3 * capacity,), "the record of another draft"
    block = triton.next_power_of_2(capacity)
    _graft[1,](record, tokens, rows.depths, rows.paths, lag, capacity, max_depth, rows.paths.shape[1], block)
