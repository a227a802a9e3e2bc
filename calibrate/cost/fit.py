"""What a draft costs, fitted to timed drafts: a fixed part, one for each level, one for each node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, combinations

import numpy as np

from quantspec.engine.costs import DraftCost

Sample = tuple[int, int, float]
"""Levels, nodes and seconds of one draft."""


def fit(samples: Iterable[Sample], prefill_per_token: float = 0.0) -> DraftCost:
    """Least squares with no part below 0, on the lower quartile of the times of each shape of draft: what else the
    machine did only ever adds to a time."""
    by_shape: dict[tuple[int, int], list[float]] = {}
    for levels, nodes, seconds in samples:
        by_shape.setdefault((levels, nodes), []).append(seconds)
    if not by_shape:
        return DraftCost(prefill_per_token)
    shapes = np.array(list(by_shape), dtype=np.float64)
    design = np.column_stack((np.ones(len(shapes)), shapes))
    times = np.array([quick(each) for each in by_shape.values()])
    weights = np.sqrt([len(each) for each in by_shape.values()])
    found = _non_negative(design * weights[:, None], times * weights)
    return DraftCost(prefill_per_token, *found)


def quick(times: Sequence[float]) -> float:
    """What something takes that is never quite the same work: the lower quartile."""
    return float(np.quantile(times, 0.25))


def _non_negative(design: np.ndarray, values: np.ndarray) -> Sequence[float]:
    """The least squares solution without negative parts: the best over all choices of columns, of which there are few.
    Where columns say the same, the earlier ones are taken."""
    columns = range(design.shape[1])
    best, least = [0.0] * design.shape[1], float(values @ values)
    for chosen in chain.from_iterable(combinations(columns, size) for size in range(1, len(columns) + 1)):
        part = design[:, chosen]
        if np.linalg.matrix_rank(part) < len(chosen):
            continue
        solution = np.linalg.lstsq(part, values, rcond=None)[0]
        error = float(((part @ solution - values) ** 2).sum())
        if (solution >= 0).all() and error < least * (1 - 1e-9):
            least = error
            best = [0.0] * design.shape[1]
            for column, value in zip(chosen, solution.tolist(), strict=True):
                best[column] = value
    return best
