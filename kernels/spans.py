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
"""Rows of a tree that may be attended together: with one ``BLOCK`` they stay within 192 slots, where MKL breaks its sums."""


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Span:
    """Slots ``begin..end-1`` are looked at (``end - begin`` is a multiple of ``LANES``); ``mask [n, end - begin]`` is 0 where
    a row attends a slot and -inf elsewhere.

    ``blocks`` are ``(low, high, select)``: slots whose weighted values are summed together, in this order; ``select
    [high - low]`` of 0 and 1 (None: all) picks those whose logical position, which for a node is its depth, lies in the block.
    """

    begin: int
    end: int
    mask: Tensor
    blocks: tuple[tuple[int, int, Tensor | None], ...]

    def path(self, row: int) -> Tensor:
        """The slots that a row attends, in depth order."""
        return (self.mask[row] == 0).nonzero()[:, 0] + self.begin


def make_span(cached: int, parents: Sequence[int], window: int | None, device: torch.device) -> Span:
    """For rows with ``parents`` (see ``Batch``) after ``cached`` slots; ``window`` keeps the last so many tokens of a path."""
    n = len(parents)
    begin = 0 if window is None else max(cached + 1 - window, 0) // BLOCK * BLOCK
    end = begin + round_up(cached + n - begin, LANES)
    slot = torch.arange(begin, end)
    if is_chain(parents):
        position, query = slot, torch.arange(cached, cached + n)[:, None]
        attends = position <= query
        blocks = tuple((low, min(low + BLOCK, end), None) for low in range(begin, end, BLOCK))
    else:
        position, attends = _tree(slot, cached, parents)
        query = position[cached - begin : cached - begin + n, None]
        blocks = _tree_blocks(begin, end, cached, position, int(query.max()), device)
    if window is not None:
        attends = attends & (position > query - window)
    mask = torch.zeros(n, end - begin).masked_fill_(~attends, float("-inf"))
    return Span(begin, end, mask.to(device), blocks)


def is_chain(parents: Sequence[int]) -> bool:
    return all(parent == i - 1 for i, parent in enumerate(parents))


def _tree(slot: Tensor, cached: int, parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logical position of each slot, and ``attends [n, slots]``: the prefix, ancestors and itself."""
    n, first = len(parents), cached - int(slot[0])
    position, attends = slot.clone(), (slot < cached).repeat(n, 1)
    for i, parent in enumerate(parents):
        position[first + i] = position[first + parent] + 1 if parent >= 0 else cached
        if parent >= 0:
            attends[i] = attends[parent]
        attends[i, first + i] = True
    return position, attends


def _tree_blocks(
    begin: int, end: int, cached: int, position: Tensor, deepest: int, device: torch.device
) -> tuple[tuple[int, int, Tensor | None], ...]:
    """Blocks that hold prefix slots alone as in a chain; the slots after those once per logical block they reach into."""
    tail = max(cached // BLOCK * BLOCK, begin)
    blocks: list[tuple[int, int, Tensor | None]] = [(low, low + BLOCK, None) for low in range(begin, tail, BLOCK)]
    for low in range(tail, deepest + 1, BLOCK):
        inside = (position[tail - begin :] // BLOCK == low // BLOCK).float()
        blocks.append((tail, end, inside.to(device)))
    return tuple(blocks)
