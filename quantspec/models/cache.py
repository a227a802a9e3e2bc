"""Keys and values of one sequence, allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantspec.errors import ResourceError
from quantspec.kernels.spans import LANES, round_up


class KVCache:
    """``keys`` and ``values`` ``[layers, kv_heads, max_length + max_nodes, head_dim]``; slots ``0..length-1`` are committed.

    A forward writes its rows to the slots past ``length``; ``commit`` gathers the accepted ones into place.
    """

    chains_only = False

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, max_length: int, max_nodes: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        # Attention looks at whole groups of LANES slots.
        shape = (layers, kv_heads, round_up(max_length + max_nodes, LANES), head_dim)
        self.length = 0
        self.max_length, self.max_nodes = max_length, max_nodes
        try:
            # Zeros, not garbage: masked slots are multiplied by zero weights, which a stray NaN would survive.
            self.keys = torch.zeros(shape, device=device, dtype=dtype)
            self.values = torch.zeros(shape, device=device, dtype=dtype)
        except RuntimeError as error:  # torch's out-of-memory errors on CPU and GPU alike
            gib = 2 * 4 * layers * kv_heads * (max_length + max_nodes) * head_dim / 2**30
            raise ResourceError(f"no memory for a cache of {max_length} tokens ({gib:.1f} GiB)", hint="shorten the context") from error

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @torch.inference_mode()
    def commit(self, rows: Sequence[int]) -> None:
        """Keep these rows of the last forward, in order, right after ``length``. A prefix 0, 1, 2, ... moves nothing."""
        start = self.length
        assert start + len(rows) <= self.max_length, "more tokens than the cache was made for"
        moved = next((i for i, row in enumerate(rows) if row != i), len(rows))
        if moved < len(rows):
            source = torch.tensor([start + row for row in rows[moved:]], device=self.keys.device)
            for tensor in (self.keys, self.values):  # index_select copies first: source and target may overlap
                tensor[:, :, start + moved : start + len(rows)] = tensor.index_select(2, source)
        self.length = start + len(rows)

    def truncate(self, length: int) -> None:
        """Forget all committed slots from ``length`` on."""
        assert 0 <= length <= self.length
        self.length = length
