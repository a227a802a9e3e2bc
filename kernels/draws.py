"""What a device hands out of the rows that it draws from, as one table of 32-bit words: its layout, and how the host
reads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_RUNNERS_UP = 8
"""Tokens of a race that the kernel ranks: more would cost it more than the noise."""
MOST_CANDIDATES = 256
"""Best tokens of a row that are handed out where the host truncates."""

Words = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Layout:
    """A row's words: its best value and its mass (both fp32), ``ranked`` ids and log-scores of the best of its race,
    then ``candidates`` ids and logits of its best tokens (0: none are asked for), one more than may be kept: its logit
    tells which of the others are better than all that are left out."""

    ranked: int = 1
    candidates: int = 0

    @classmethod
    def of(cls, vocab_size: int, ranked: int, candidates: bool) -> Layout:
        return cls(ranked, min(MOST_CANDIDATES + 1, vocab_size) if candidates else 0)

    @property
    def head(self) -> int:
        """Words before the candidates."""
        return 2 + 2 * self.ranked

    @property
    def width(self) -> int:
        return self.head + 2 * self.candidates


@dataclass(frozen=True, slots=True)
class Drawn:
    """The table of m rows, read. ``value [m]`` is the best of each race, not finite where the row is refused; ``mass
    [m]`` the sum of ``exp(score - value)``; ``ids`` and ``log_scores [m, ranked]`` descend, ties by id; the order of
    candidates (``logits [m, c]``, before temperature) has no meaning where they tie."""

    value: NDArray[np.float32]
    mass: NDArray[np.float32]
    ids: Words
    log_scores: NDArray[np.float32]
    candidates: Words
    logits: NDArray[np.float32]

    @classmethod
    def read(cls, table: Words, layout: Layout) -> Drawn:
        """From the words ``[m, layout.width]``."""
        ends = np.cumsum([1, 1, layout.ranked, layout.ranked, layout.candidates])
        value, mass, ids, log_scores, candidates, logits = np.split(table, ends, axis=1)
        return cls(
            _floats(value)[:, 0], _floats(mass)[:, 0], ids, _floats(log_scores), candidates, _floats(logits)
        )  # fmt: skip


def _floats(words: Words) -> NDArray[np.float32]:
    return np.ascontiguousarray(words).view(np.float32)
