"""The inputs of a forward on Triton's kernels, in one buffer on the device: a captured graph reads them there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantspec.kernels.spans import round_up
from quantspec.kernels.triton.graft import graft
from quantspec.kernels.triton.rows import ALIGNMENT, Rows
from quantspec.kernels.triton.sampling import Dials
from quantspec.models.base import Draw, Drawing
from quantspec.models.triton_rounds import Round

TILES = (8, 16, 32, 48, 64)
"""Numbers of rows that a forward of one short sequence is filled up to, so that a graph each serves them all."""
_ALIGNED = ALIGNMENT // torch.int32.itemsize


def tile_for(n: int) -> int:
    """The least of ``TILES`` that holds n rows."""
    return next(tile for tile in TILES if tile >= n)


class Frame:
    """``tokens [sum(sizes)]``, the ``dials`` of their draws, and per sequence its ``Rows``, as views of one buffer of
    int32 that one copy fills."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes, n = tuple(sizes), sum(sizes)
        # Tokens, keys (of 64 bits), temperatures and noise; then of every sequence its length, depths and paths.
        lengths = [n, 2 * n, n, n, *(length for size in sizes for length in (1, size, size * size))]
        ends = list(accumulate((round_up(length, _ALIGNED) for length in lengths), initial=0))
        self._places = [slice(start, start + length) for start, length in zip(ends, lengths, strict=False)]
        self._buffer = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        self.tokens, keys, temperatures, noisy, *rows = [self._buffer[place] for place in self._places]
        self.dials = Dials(keys.view(torch.int64), temperatures.view(torch.float32), noisy)
        self.rows = [
            Rows(cached, depths, paths.view(size, size))
            for size, cached, depths, paths in zip(sizes, rows[::3], rows[1::3], rows[2::3], strict=True)
        ]

    def fill(
        self,
        tokens: Sequence[int],
        parents: Sequence[Sequence[int]],
        cached: Sequence[int],
        draws: Sequence[Draw] | None = None,
    ) -> None:
        """The rows of all sequences, in order. With one sequence there may be fewer rows than the frame has: those that
        fill it up hang on the last cached token, and belong to nobody."""
        pad = sum(self.sizes) - len(tokens)
        assert pad == 0 or (pad > 0 and len(self.sizes) == 1), "rows to fill up in one sequence alone"
        # By numpy, whose calls take a tenth of torch's time. Not pinned: the copy is staged before the call returns, so
        # the next step may write another without waiting.
        host = np.zeros(len(self._buffer), np.int32)
        own_tokens, keys, temperatures, noisy, *rows = [host[place] for place in self._places]
        own_tokens[: len(tokens)] = tokens
        for i, (their_parents, length) in enumerate(zip(parents, cached, strict=True)):
            own_cached, depths, paths = rows[3 * i : 3 * i + 3]
            own_cached[0] = length
            _fill_paths(their_parents, depths, paths.reshape(len(depths), -1))
        if draws is not None:
            keys.view(np.uint64)[:] = self._per_row([draw.key or 0 for draw in draws], np.uint64)
            divisors = [1.0 if draw.key is None else draw.temperature for draw in draws]
            temperatures.view(np.float32)[:] = self._per_row(divisors, np.float32)
            noisy[:] = self._per_row([draw.key is not None and not draw.truncates for draw in draws], np.int32)
        self._buffer.copy_(torch.from_numpy(host), non_blocking=True)

    def _per_row(self, values: Sequence[float], dtype: type[np.generic]) -> NDArray[Any]:
        """One value per sequence, repeated for each of its rows."""
        return np.array(values, dtype).repeat(self.sizes)

    def fill_round(self, part: Round, drawing: Drawing | None) -> None:
        """``fill``, with drafts that only the device knows in place of the rows that stand in for them."""
        if drawing is None:
            self.fill(part.tokens, part.parents, part.cached)
            return
        self.fill(part.tokens, part.parents, part.cached, [drawing.draws[s] for s in part.sequences])
        for i, s in enumerate(part.sequences):
            if s in drawing.pending:
                draft, tokens = drawing.pending[s], self.tokens.split(self.sizes)[i]
                lag = len(part.parents[i]) - draft.capacity
                graft(draft.record, draft.capacity, draft.max_depth, lag, tokens, self.rows[i])

    def positions(self) -> Tensor:
        """Those of the tokens that its rows draw, int32 ``[sum(sizes)]``: one past each row's own."""
        return torch.cat([rows.cached + rows.depths + 1 for rows in self.rows])


def _fill_paths(parents: Sequence[int], depths: NDArray[np.int32], paths: NDArray[np.int32]) -> None:
    """What ``Rows.of`` computes, for a frame's rows ``depths [n]`` and ``paths [n, n]``, which hold zeros."""
    for i, parent in enumerate(parents):
        assert -1 <= parent < i, "a parent must stand before its child"
        if parent >= 0:
            depth = depths[i] = depths[parent] + 1
            paths[i, :depth] = paths[parent, :depth]
            paths[i, depth] = i
        else:
            paths[i, 0] = i
    paths[len(parents) :, 0] = range(len(parents), len(paths))
