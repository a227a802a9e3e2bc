"""Which slots a P-EAGLE head learns from, and what each of them sees (arXiv 2602.01469).

An element (a, d) drafts at depth d (from 0) from anchor a: it stands at slot a + d and says the token two further on.
Depth 0 reads the base's streams at slot a, as EAGLE-3 does; deeper ones read a mask. It is written as one number, a * K
+ d for K depths, so that the elements of a short text are the first of those of a long one.
"""

from __future__ import annotations

import torch

MOST_ENTRIES = 2**26
"""Of a table that is made once, a byte each."""


class AnchoredMask:
    """Which elements see which others, made once for the longest text: `table` bool [length * depths, same], or None
    where that would have more than `MOST_ENTRIES`: then each part's mask is made of its own elements.

    An element sees all of depth 0 up to its anchor, and those of its own anchor up to itself. The rule speaks of
    anchors alone, so a shorter text's mask is the table's top left corner, and a sample's are some of its rows.
    """

    def __init__(self, length: int, depths: int) -> None:
        self.length, self.depths = length, depths
        fits = (length * depths) ** 2 <= MOST_ENTRIES
        self.table = _sees(torch.arange(length * depths), depths) if fits else None

    def of(self, elements: torch.Tensor) -> torch.Tensor:
        """Bool [B, R, R] of elements [B, R], -1 for padding, which nobody sees and which sees element 0."""
        rows, seen = elements.clamp_min(0), (elements >= 0)[:, None]
        if self.table is None:
            return _sees(rows, self.depths) & seen
        self.table = self.table.to(elements.device)
        return self.table[rows[:, :, None], rows[:, None]] & seen


def _sees(elements: torch.Tensor, depths: int) -> torch.Tensor:
    """Bool [.., R, R]: row i is what element i of [.., R] sees."""
    anchor, depth = elements // depths, elements % depths
    own = anchor[..., None, :] == anchor[..., None]
    sees = (depth[..., None, :] <= depth[..., None]).logical_and_(own)
    return sees.logical_or_((anchor[..., None, :] <= anchor[..., None]).logical_and_(depth[..., None, :] == 0))


def sample(
    wanted: torch.Tensor, slots: int, depths: int, keep: float, keep_least: float, generator: torch.Generator
) -> torch.Tensor:
    """Conditional drop-token: the elements, ascending, that are learned of a text of `slots` slots.

    Depth 0 keeps all; depth d about `max(keep^d, keep_least)` of the `wanted` slots (bool [slots or more]), drawn among
    those next to what depth d - 1 kept: so of every anchor a first run of depths is there.
    """
    slot = torch.arange(slots)
    elements, total = [slot * depths], int(wanted[:slots].sum())
    for depth in range(1, depths):
        slot = slot[slot + 1 < slots] + 1
        slot = slot[wanted[slot]]
        count = int((total - depth) * max(keep**depth, keep_least))
        slot = slot[torch.randperm(len(slot), generator=generator)[: max(count, 0)]].sort().values
        elements.append((slot - depth) * depths + depth)
    return torch.cat(elements).sort().values


def parts(elements: torch.Tensor, slots: int, depths: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A text's elements in `count` parts that can be learned one after the other: the elements [r] that a part computes
    and which of them [r] are its own; the rest are those of depth 0 in the parts before, which its own see.

    No chain of depths is cut: all past depth 0 stand in the part of the slot after their anchor.
    """
    anchor, depth = elements // depths, elements % depths
    part = ((anchor + (depth > 0)) * count // slots).clamp(max=count - 1)
    result = []
    for number in range(count):
        own = part == number
        chosen = own | (depth == 0) & (part < number)
        result.append((elements[chosen], own[chosen]))
    return result


def padded(rows: list[torch.Tensor], fill: int) -> torch.Tensor:
    """Rows as one tensor [B, R], `fill` behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
