"""Which cache slots each row of one sequence attends, worked out once per forward for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 4
"""Row counts of exact matmuls are padded to a multiple of this."""
LANES = 16
"""Slot counts are padded to a multiple of this."""
BLOCK = 128
"""Logical positions whose weighted values are summed in one matmul."""
MAX_TREE = 64
"""Rows of a tree that are attended together: with one ``BLOCK`` they stay within 192 slots, where MKL breaks sums."""
TILE = 128
"""Rows of a chain that are attended together: bounds memory for scores, and skips most of what lies ahead of a row."""

Block = tuple[int, int, Tensor | None]


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def is_chain(parents: Sequence[int]) -> bool:
    return all(parent == i - 1 for i, parent in enumerate(parents))


@dataclass(frozen=True, slots=True)
class Span:
    """``rows`` of the sequence look at cache slots ``begin..end-1`` (a multiple of ``LANES``).

    ``mask [m, end - begin]`` is 0 where a row attends a slot and -inf elsewhere, each row repeated ``group`` times, for
    the query heads that share a key-value head; m is padded to ``ROWS``, and pad rows attend all slots. ``blocks`` are
    ``(low, high, select)``: slots whose weighted values are summed together, in this order; ``select [high - low]`` of
    0 and 1 (None: all) picks those whose logical position, which for a node is its depth, lies in the block.
    """

    rows: slice
    group: int
    begin: int
    end: int
    mask: Tensor
    blocks: tuple[Block, ...]

    def path(self, row: int) -> Tensor:
        """The slots that a row attends, in depth order."""
        return (self.mask[row * self.group] == 0).nonzero()[:, 0] + self.begin


def make_spans(
    cached: int, parents: Sequence[int], window: int | None, group: int, device: torch.device
) -> tuple[Span, ...]:
    """Spans of rows with ``parents`` (see ``Batch``) after ``cached`` slots; a ``window`` keeps the last of a path."""
    n = len(parents)
    if is_chain(parents):
        tiles = [slice(first, min(first + TILE, n)) for first in range(0, n, TILE)]
        return tuple(_chain(cached, tile, window, group, device) for tile in tiles)
    return (_tree(cached, parents, window, group, device),)


def _range(cached: int, n: int, window: int | None) -> tuple[int, int]:
    begin = 0 if window is None else max(cached + 1 - window, 0) // BLOCK * BLOCK
    return begin, begin + round_up(cached + n - begin, LANES)


def _chain(cached: int, rows: slice, window: int | None, group: int, device: torch.device) -> Span:
    first, n = cached + rows.start, rows.stop - rows.start
    begin, end = _range(first, n, window)
    query = torch.arange(first, first + n)[:, None]
    mask = _mask(torch.arange(begin, end) <= query, torch.arange(begin, end), query, window, group)
    blocks = tuple((low, min(low + BLOCK, end), None) for low in range(begin, end, BLOCK))
    return Span(rows, group, begin, end, mask.to(device), blocks)


def _tree(cached: int, parents: Sequence[int], window: int | None, group: int, device: torch.device) -> Span:
    n = len(parents)
    begin, end = _range(cached, n, window)
    position, first = torch.arange(begin, end), cached - begin
    attends = (position < cached).repeat(n, 1)
    for i, parent in enumerate(parents):
        position[first + i] = position[first + parent] + 1 if parent >= 0 else cached
        if parent >= 0:
            attends[i] = attends[parent]
        attends[i, first + i] = True
    query = position[first : first + n, None]

    # Blocks of the prefix alone are those of a chain. The slots after them are gone through once per block of logical
    # positions that they reach into, so that a node's sum breaks where its path decoded alone would break it.
    tail = max(cached // BLOCK * BLOCK, begin)
    blocks: list[Block] = [(low, low + BLOCK, None) for low in range(begin, tail, BLOCK)]
    for low in range(tail, int(query.max()) + 1, BLOCK):
        blocks.append((tail, end, (position[tail - begin :] // BLOCK == low // BLOCK).float().to(device)))
    mask = _mask(attends, position, query, window, group)
    return Span(slice(0, n), group, begin, end, mask.to(device), tuple(blocks))


def _mask(attends: Tensor, position: Tensor, query: Tensor, window: int | None, group: int) -> Tensor:
    if window is not None:
        attends = attends & (position > query - window)
    n, slots = attends.shape
    mask = torch.zeros(round_up(n * group, ROWS), slots)
    mask[: n * group].view(n, group, slots).masked_fill_(~attends[:, None], float("-inf"))
    return mask
