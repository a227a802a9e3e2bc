"""Keys and values of one sequence on the device that Triton's kernels run on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantspec.errors import ResourceError
from quantspec.kernels.spans import round_up
from quantspec.kernels.triton.attention import CHUNK
from quantspec.kernels.triton.cache import MAX_ROWS, commit
from quantspec.models.triton_frame import TILES, Frame
from quantspec.models.triton_graphs import current

if TYPE_CHECKING:
    from quantspec.kernels.draws import Layout
    from quantspec.models.triton_graphs import Replay
    from quantspec.types import Tap


@dataclass(slots=True)
class Storage:
    """What outlives a cache, since captured graphs hold its addresses.

    ``kv [layers, 2 kv_heads, slots, head_dim]``, or uint8 ``[.., row_bytes]`` of quantized rows; ``cos, sin [>= slots,
    head_dim]``; inputs by number of rows, and graphs by number of rows, taps and what is drawn (None: used once, not
    captured yet).
    """

    kv: Tensor
    cos: Tensor
    sin: Tensor
    frames: dict[int, Frame] = field(default_factory=dict)
    graphs: dict[tuple[int, tuple[Tap, ...], Layout | None], Replay | None] = field(default_factory=dict)

    def frame(self, rows: int) -> Frame:
        """The inputs of a forward of so many rows, filled up."""
        if rows not in self.frames:
            self.frames[rows] = Frame((rows,), self.kv.device)
        return self.frames[rows]


def slots_for(max_length: int, max_nodes: int) -> int:
    """Slots of a cache: rows that fill up the last tile are written past its capacity."""
    return round_up(max_length + max_nodes + TILES[-1], CHUNK)


def allocate_kv(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Raises ``ResourceError``: no memory."""
    try:
        return torch.zeros(shape, device=device, dtype=dtype)
    except RuntimeError as error:  # torch's out-of-memory errors, on CPU and GPU alike
        size = math.prod(shape) * dtype.itemsize / 2**30
        message = f"no memory on {device} for a cache of {shape[2]} tokens ({size:.1f} GiB)"
        raise ResourceError(message, hint="shorten the context") from error


class TritonCache:
    """See ``models.base.Cache``. ``capacity`` slots can hold rows; the storage has more."""

    chains_only = False

    def __init__(self, storage: Storage, max_length: int, max_nodes: int) -> None:
        self.storage, self.length = storage, 0
        self.max_length, self.capacity = max_length, max_length + max_nodes

    @property
    def nbytes(self) -> int:
        """Bytes of memory for all slots."""
        return self.storage.kv.nbytes

    @torch.inference_mode()
    def commit(self, rows: Sequence[int]) -> None:
        """Keep these rows of the last forward, in ascending order, right after ``length``. A prefix moves nothing."""
        end = self.length + len(rows)
        assert end <= self.max_length, "more tokens than the cache was made for"
        assert all(a < b for a, b in pairwise(rows)), "a path's rows ascend"
        moved = next((i for i, row in enumerate(rows) if row != i), len(rows))
        # No row moves forward, so a later part reads nothing that an earlier one has written.
        for first in range(moved, len(rows), MAX_ROWS):
            self._move(self.length + first, [row - first for row in rows[first : first + MAX_ROWS]])
        self.length = end

    def _move(self, start: int, rows: Sequence[int]) -> None:
        kv = self.storage.kv
        numbers = torch.tensor([start, 0, 0, 0, *rows], dtype=torch.int32).to(kv.device, non_blocking=True)
        with current(kv.device):
            commit(kv, numbers[:1], numbers[4:])

    def truncate(self, length: int) -> None:
        """Forget all committed slots from ``length`` on."""
        assert 0 <= length <= self.length
        self.length = length
