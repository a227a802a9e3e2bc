"""The race that decides a draw: ``log q - log E`` of every token that may be drawn, dense or of those that are left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantspec.core.truncation import Kept, Rows, check_finite
from quantspec.kernels.cpu.sampling import best_rows

Best = tuple[NDArray[np.integer], Rows]
"""Ids and log-probabilities, each ``[m, k]``, best first; a row with fewer entries ends in -inf."""


@dataclass(slots=True)
class DenseRace:
    """``rows [m, V]``."""

    rows: Rows

    def argmax(self) -> list[int]:
        """Per row the best token, the lowest id on ties. Raises ``ModelError`` if a row has no finite maximum."""
        y = self.rows.argmax(axis=-1)
        check_finite(self.rows[np.arange(len(y)), y])
        return y.tolist()

    def best(self, k: int, tau: float = 1.0) -> Best:
        """The k best of ``log_softmax(row / tau)``."""
        return best_rows(self.rows if tau == 1 else self.rows / np.float32(tau), k)


@dataclass(slots=True)
class SparseRace:
    """Only the tokens that truncation left; their values at least one a row and finite at its best."""

    kept: Kept

    def argmax(self) -> list[int]:
        """Per row the best token, the lowest id on ties."""
        kept, starts = self.kept, self.kept.starts
        hits = np.flatnonzero(kept.values == np.maximum.reduceat(kept.values, starts).repeat(kept.count))
        return kept.ids[hits[hits.searchsorted(starts)]].tolist()

    def best(self, k: int, tau: float = 1.0) -> Best:
        """The k best of ``log_softmax(row / tau)``."""
        count, starts = self.kept.count, self.kept.starts
        place = np.arange(max(k, count.max()))
        rows = np.full((len(count), len(place)), -np.inf, np.float32)
        rows[place < count[:, None]] = self.kept.values / np.float32(tau)
        ranked, scores = best_rows(rows, k)
        return self.kept.ids[starts[:, None] + np.minimum(ranked, count[:, None] - 1)], scores


@dataclass(slots=True)
class DrawnRace:
    """Run on the device: of each row the best ``value [m]``, and ids and log-probabilities ``[m, k]`` of its first.
    ``whole`` runs it again on the host, for whoever asks for more of them."""

    value: Rows
    ids: NDArray[np.int32]
    log_scores: Rows
    whole: Callable[[], Race]

    def argmax(self) -> list[int]:
        """Per row the best token, the lowest id on ties. Raises ``ModelError`` if a row has no finite maximum."""
        check_finite(self.value)
        return self.ids[:, 0].tolist()

    def best(self, k: int, tau: float = 1.0) -> Best:
        """The k best of ``log_softmax(row / tau)``."""
        if tau != 1 or k > self.ids.shape[1]:
            return self.whole().best(k, tau)
        return self.ids[:, :k], self.log_scores[:, :k]


Race = DenseRace | SparseRace | DrawnRace
