"""Figures of a benchmark with their uncertainty: ratios of sums over prompts, resampled by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of sums over ``prompts`` prompts, and the 95% interval of its bootstrap over prompts."""

    value: float
    low: float
    high: float
    prompts: int

    def json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def ratio(pairs: Sequence[tuple[float, float]], seed: int = 0) -> Ratio:
    """``sum(a) / sum(b)`` over pairs (a, b), one per prompt. A prompt is resampled as a whole: its tokens depend on
    each other."""
    if not sum(b for _, b in pairs):
        return Ratio(0.0, 0.0, 0.0, len(pairs))
    data = np.array(pairs, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(data), (_RESAMPLES, len(data)))
    sums = data[picks].sum(axis=1)
    drawn = sums[:, 0] / np.maximum(sums[:, 1], 1e-9)
    low, high = np.quantile(drawn, (0.025, 0.975))
    total = data.sum(axis=0)
    return Ratio(float(total[0] / total[1]), float(low), float(high), len(data))


def quotient(over: Sequence[tuple[float, float]], under: Sequence[tuple[float, float]], seed: int = 0) -> Ratio:
    """``ratio(over) / ratio(under)`` of two methods on the same prompts, which are resampled together."""
    assert len(over) == len(under), "the same prompts"
    if not over or not all(sum(column) for pairs in (over, under) for column in zip(*pairs, strict=True)):
        return Ratio(0.0, 0.0, 0.0, len(over))
    data = np.array([[*a, *b] for a, b in zip(over, under, strict=True)], dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(data), (_RESAMPLES, len(data)))
    sums = np.maximum(data[picks].sum(axis=1), 1e-9)
    low, high = np.quantile(sums[:, 0] * sums[:, 3] / (sums[:, 1] * sums[:, 2]), (0.025, 0.975))
    a, b, c, d = data.sum(axis=0)
    return Ratio(float(a * d / (b * c)), float(low), float(high), len(data))


def distinct_ngrams(tokens: Sequence[int], n: int = 4) -> float:
    """Share of distinct n-grams among all: near 0 for a loop, 1 where nothing repeats (or the text is too short to)."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
