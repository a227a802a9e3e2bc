"""Keys and values of one sequence, allocated once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from quantspec.errors import ResourceError
from quantspec.kernels.spans import LANES, round_up


class KVCache:
    """``kv [layers, 2 kv_heads, max_length + max_nodes, head_dim]``: all keys of a layer, then all values. Slots
    ``0..length-1`` are committed.

    A forward writes its rows to the slots past ``length``; ``commit`` gathers the accepted ones into place.
    """

    chains_only = False

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, max_length: int, max_nodes: int, *,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.length, self.max_length, self.kv_heads = 0, max_length, kv_heads
        self.capacity = max_length + max_nodes
        # Attention reads whole groups of LANES slots.
        shape = (layers, 2 * kv_heads, round_up(self.capacity, LANES), head_dim)
        try:
            # Zeros, not garbage: slots that a row does not attend are multiplied by zero, and a NaN would survive that.
            self.kv = torch.zeros(shape, device=device, dtype=dtype)
        except RuntimeError as error:  # torch's out-of-memory errors, on CPU and GPU alike
            size = math.prod(shape) * dtype.itemsize / 2**30
            message = f"no memory for a cache of {max_length} tokens ({size:.1f} GiB)"
            raise ResourceError(message, hint="shorten the context") from error

    @property
    def keys(self) -> torch.Tensor:
        """``[layers, kv_heads, slots, head_dim]``."""
        return self.kv[:, : self.kv_heads]

    @property
    def values(self) -> torch.Tensor:
        """``[layers, kv_heads, slots, head_dim]``."""
        return self.kv[:, self.kv_heads :]

    @torch.inference_mode()
    def commit(self, rows: Sequence[int]) -> None:
        """Keep these rows of the last forward, in order, right after ``length``. A prefix 0, 1, ... moves nothing."""
        start, end = self.length, self.length + len(rows)
        assert end <= self.max_length, "more tokens than the cache was made for"
        moved = next((i for i, row in enumerate(rows) if row != i), len(rows))
        if moved < len(rows):  # index_select copies before the assignment: source and target may overlap
            source = torch.tensor([start + row for row in rows[moved:]], device=self.kv.device)
            self.kv[:, :, start + moved : end] = self.kv.index_select(2, source)
        self.length = end

    def truncate(self, length: int) -> None:
        """Forget all committed slots from ``length`` on."""
        assert 0 <= length <= self.length
        self.length = length
