"""The inputs of a forward on Triton's kernels, in one buffer on the device: a captured graph reads them there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantspec.kernels.spans import round_up
from quantspec.kernels.triton.rows import ALIGNMENT, Rows

TILES = (8, 16, 32, 48, 64)
"""Numbers of rows that a forward of one short sequence is filled up to, so that a graph each serves them all."""
_ALIGNED = ALIGNMENT // torch.int32.itemsize


def tile_for(n: int) -> int:
    """The least of ``TILES`` that holds n rows."""
    return next(tile for tile in TILES if tile >= n)


class Frame:
    """``tokens [sum(sizes)]`` and per sequence its ``Rows``, as int32 views of one buffer that one copy fills."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes = tuple(sizes)
        length = _aligned(sum(sizes)) + sum(_ALIGNED + _aligned(n) + _aligned(n * n) for n in sizes)
        self._buffer = torch.zeros(length, dtype=torch.int32, device=device)
        self.tokens, self.rows = _views(self._buffer, self.sizes)

    def fill(self, tokens: Sequence[int], parents: Sequence[Sequence[int]], cached: Sequence[int]) -> None:
        """The rows of all sequences, in order. With one sequence there may be fewer rows than the frame has: those that
        fill it up hang on the last cached token, and belong to nobody."""
        pad = sum(self.sizes) - len(tokens)
        assert pad == 0 or (pad > 0 and len(self.sizes) == 1), "rows to fill up in one sequence alone"
        # Not pinned: the copy is staged before the call returns, so the next step may write another without waiting.
        host = torch.zeros(self._buffer.shape, dtype=torch.int32, device="cpu")
        own_tokens, own_rows = _views(host, self.sizes)
        own_tokens[: len(tokens)] = torch.tensor(tokens, dtype=torch.int32, device="cpu")
        for rows, their_parents, length in zip(own_rows, parents, cached, strict=True):
            found = Rows.of([*their_parents, *[-1] * pad], length, host.device)
            rows.cached.copy_(found.cached)
            rows.depths.copy_(found.depths)
            rows.paths[:, : found.paths.shape[1]] = found.paths
        self._buffer.copy_(host, non_blocking=True)


def _views(buffer: Tensor, sizes: Sequence[int]) -> tuple[Tensor, list[Rows]]:
    at, rows = 0, []

    def take(n: int) -> Tensor:
        nonlocal at
        at += _aligned(n)
        return buffer[at - _aligned(n) :][:n]

    tokens = take(sum(sizes))
    for n in sizes:
        rows.append(Rows(take(1), take(n), take(n * n).view(n, n)))
    return tokens, rows


def _aligned(n: int) -> int:
    return round_up(n, _ALIGNED)
