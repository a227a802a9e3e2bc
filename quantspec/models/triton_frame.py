"""The inputs of a forward on Triton's kernels, in one buffer on the device: a captured graph reads them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
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


@dataclass(frozen=True, slots=True)
class _Views:
    tokens: Tensor
    dials: Dials
    rows: list[Rows]


class Frame:
    """``tokens [sum(sizes)]``, the ``dials`` of their draws, and per sequence its ``Rows``, as views of one buffer of
    int32 that one copy fills."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes, n = tuple(sizes), sum(sizes)
        length = 3 * _aligned(n) + _aligned(2 * n) + sum(_ALIGNED + _aligned(n) + _aligned(n * n) for n in sizes)
        self._buffer = torch.zeros(length, dtype=torch.int32, device=device)
        views = _views(self._buffer, self.sizes)
        self.tokens, self.dials, self.rows = views.tokens, views.dials, views.rows

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
        # Not pinned: the copy is staged before the call returns, so the next step may write another without waiting.
        host = torch.zeros(self._buffer.shape, dtype=torch.int32, device="cpu")
        own = _views(host, self.sizes)
        own.tokens[: len(tokens)] = torch.tensor(tokens, dtype=torch.int32, device="cpu")
        for rows, their_parents, length in zip(own.rows, parents, cached, strict=True):
            found = Rows.of([*their_parents, *[-1] * pad], length, host.device)
            rows.cached.copy_(found.cached)
            rows.depths.copy_(found.depths)
            rows.paths[:, : found.paths.shape[1]] = found.paths
        if draws is not None:
            _dial(own.dials, self.sizes, draws)
        self._buffer.copy_(host, non_blocking=True)

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


def _dial(dials: Dials, sizes: Sequence[int], draws: Sequence[Draw]) -> None:
    for keys, temperatures, noisy, draw in zip(
        dials.keys.split(sizes), dials.temperatures.split(sizes), dials.noisy.split(sizes), draws, strict=True
    ):
        keys.copy_(torch.from_numpy(np.array([draw.key or 0], np.uint64).view(np.int64)))
        temperatures.fill_(1.0 if draw.key is None else draw.temperature)
        noisy.fill_(draw.key is not None and not draw.truncates)


def _views(buffer: Tensor, sizes: Sequence[int]) -> _Views:
    at, n = 0, sum(sizes)

    def take(n: int) -> Tensor:
        nonlocal at
        at += _aligned(n)
        return buffer[at - _aligned(n) :][:n]

    tokens, dials = take(n), Dials(take(2 * n).view(torch.int64), take(n).view(torch.float32), take(n))
    return _Views(tokens, dials, [Rows(take(1), take(n), take(n * n).view(n, n)) for n in sizes])


def _aligned(n: int) -> int:
    return round_up(n, _ALIGNED)
