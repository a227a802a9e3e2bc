"""Keyed noise: standard exponential races ``E(stream, t, v)`` from a counter-based generator.

``argmax_v(log p(v) - log E(v))`` is a draw from p (the Gumbel trick), and here it is a *function* of the stream, the
absolute position t and p: whoever asks, in whatever order and however often, sees the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MAX_U = 1 - 2.0**-24
_CACHED_ROWS = 128  # a long draft's positions at a 128k vocabulary: 64 MB at most


@dataclass(frozen=True, slots=True)
class Stream:
    """The noise of one sequence: a 64-bit key."""

    key: int

    @classmethod
    def of(cls, prompt_ids: Sequence[int], sample_index: int, seed: int) -> Stream:
        """Key from the prompt, the sample's index among n, and the seed (all from 0 to 2^63 - 1)."""
        words = np.array([seed, sample_index, *prompt_ids], dtype="<i8")
        return cls(int.from_bytes(hashlib.blake2b(words.tobytes(), digest_size=8).digest(), "little"))

    def domain(self, name: str) -> Stream:
        """An independent stream for another purpose, such as the coins of the ratio rule."""
        digest = hashlib.blake2b(name.encode(), digest_size=8, key=self.key.to_bytes(8, "little")).digest()
        return Stream(int.from_bytes(digest, "little"))

    def noise(self, t: int, vocab_size: int) -> NDArray[np.float32]:
        """``log E(t, v)`` for all v, fp32 ``[vocab_size]``, read-only and cached. ``vocab_size`` changes no entry."""
        return _noise_row(self.key, t, vocab_size)

    def noise_at(
        self, positions: Sequence[int], count: NDArray[np.int64], ids: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """``log E(t, v)`` of ``count[i]`` ids at ``positions[i]``, group after group: the same bits as in ``noise``."""
        seeds = np.array([_seed(self.key, t) for t in positions], dtype=np.uint64)
        return _log_exponential(_uniform(seeds.repeat(count) + (ids + 1).view(np.uint64) * np.uint64(_WEYL)))

    def coin(self, t: int) -> float:
        """A uniform number in (0, 1) for position t."""
        return float(_uniform(np.array([_seed(self.key, t)], dtype=np.uint64))[0])


def _mix(z: int) -> int:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014), on one Python integer."""
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


@lru_cache(maxsize=4096)
def _seed(key: int, t: int) -> int:
    """Where position t starts on SplitMix64's sequence; v counts on from there."""
    return _mix(_mix(key) ^ (t * _WEYL & _MASK))


@lru_cache(maxsize=8)
def _counters(size: int) -> NDArray[np.uint64]:
    return np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_WEYL)


@lru_cache(maxsize=_CACHED_ROWS)
def _noise_row(key: int, t: int, size: int) -> NDArray[np.float32]:
    row = _log_exponential(_uniform(_counters(size) + np.uint64(_seed(key, t))))
    row.flags.writeable = False
    return row


def _uniform(z: NDArray[np.uint64]) -> NDArray[np.float64]:
    """``u = (k + 1/2) 2^-32``, at most 1 - 2^-24, with k the high half of SplitMix64's output at ``z``, which is
    lost."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(_MIX_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_MIX_2)
    z >>= np.uint64(32)  # the finalizer's last step would only add bit 63 to bit 32
    u = z.astype(np.float64)
    u += 0.5
    u *= 2.0**-32
    return np.minimum(u, _MAX_U, out=u)


def _log_exponential(u: NDArray[np.float64]) -> NDArray[np.float32]:
    """``log(-log1p(-u))``; ``u`` is lost. In float64, so that the result, rounded, is the same on every machine."""
    np.subtract(1.0, u, out=u)  # exact, since u has 33 significant bits: the plain log is as good as log1p here
    np.log(u, out=u)
    np.negative(u, out=u)
    np.log(u, out=u)
    return u.astype(np.float32)
