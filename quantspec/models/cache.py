"""Keys and values of one sequence, allocated once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantspec.errors import ResourceError, UsageError
from quantspec.kernels.memory import available_bytes
from quantspec.kernels.spans import LANES, round_up
from quantspec.models.config import ModelConfig
from quantspec.numerics.kv import KVFormat
from quantspec.numerics.scheme import KVCacheDtype

_LARGE = 2**24  # bytes; of less it is not worth asking whether they are there
KV_HINT = "leave out --kv-cache-dtype (kv_cache_dtype= in Python)"


def kv_format(config: ModelConfig, dtype: KVCacheDtype) -> KVFormat | None:
    """How a cache holds the rows of this model's keys and values; None: unquantized."""
    return None if dtype == "auto" else KVFormat(int(dtype.removeprefix("int")), config.head_dim)


def check_kv_cache(config: ModelConfig, dtype: KVCacheDtype, folder: Path) -> tuple[str, ...]:
    """What the user should know of such a cache for the model in ``folder``. Raises ``UsageError``: int4 where keys
    were not calibrated for it."""
    if dtype == "auto" or config.kv_calibrated:
        return ()
    lacks = f"{folder.name} has no calibrated key factors for a quantized cache"
    if dtype == "int4":
        raise UsageError(lacks, hint="quantize it with --kv-cache-dtype int4, or take --kv-cache-dtype int8")
    return (f"{lacks}: keys are rounded to int8 as they are",)


class KVCache:
    """``kv [layers, 2 kv_heads, max_length + max_nodes, head_dim]``: all keys of a layer, then all values; with a
    ``format`` uint8 ``[.., row_bytes]``. Slots ``0..length-1`` are committed.

    A forward writes its rows to the slots past ``length``; ``commit`` gathers the accepted ones into place.
    """

    chains_only = False

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, max_length: int, max_nodes: int, *,
        device: torch.device, dtype: torch.dtype, format: KVFormat | None = None,
    ) -> None:  # fmt: skip
        self.length, self.max_length, self.kv_heads, self.format = 0, max_length, kv_heads, format
        self.capacity = max_length + max_nodes
        width, stored = (head_dim, dtype) if format is None else (format.row_bytes, torch.uint8)
        # Attention reads whole groups of LANES slots.
        shape = (layers, 2 * kv_heads, round_up(self.capacity, LANES), width)
        size = math.prod(shape) * stored.itemsize
        try:
            if device.type == "cpu" and size > _LARGE:
                free = available_bytes()
                if free is not None and size > free:
                    raise MemoryError("Linux would give it, and end the process that uses it")
            # Zeros, not garbage: slots that a row does not attend are multiplied by zero, and a NaN would survive that.
            self.kv = torch.zeros(shape, device=device, dtype=stored)
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors, on CPU and GPU alike
            message = f"no memory for a cache of {max_length} tokens ({size / 2**30:.1f} GiB)"
            raise ResourceError(message, hint="shorten the context, or keep it in int8 (kv_cache_dtype)") from error

    @property
    def nbytes(self) -> int:
        """Bytes of memory for all slots, scales included."""
        return self.kv.nbytes

    @property
    def keys(self) -> Tensor:
        """``[layers, kv_heads, slots, width]``, as stored."""
        return self.kv[:, : self.kv_heads]

    @property
    def values(self) -> Tensor:
        """``[layers, kv_heads, slots, width]``, as stored."""
        return self.kv[:, self.kv_heads :]

    def write(self, layer: int, start: int, rows: Tensor) -> None:
        """Store keys and then values ``[n, 2 kv_heads, head_dim]`` in the slots from ``start`` on."""
        rows = rows if self.format is None else self.format.encode(rows)
        self.kv[layer, :, start : start + rows.shape[0]] = rows.transpose(0, 1)

    def read(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[kv_heads, .., head_dim]`` of at least the first ``slots``, a multiple of ``LANES``."""
        kv = self.kv[layer] if self.format is None else self.format.decode(self.kv[layer, :, :slots])
        keys, values = kv.chunk(2)
        return keys, values

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
