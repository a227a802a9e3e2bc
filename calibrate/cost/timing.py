"""Times of many calls, alternated: what else the machine does then falls on all of them alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping
from time import perf_counter
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

BURST_SECONDS, MOST_CALLS = 0.004, 8
ROUND_SECONDS = 0.016
"""What a call may take of a round on average: slow ones take part in every second or tenth, or in none."""


def alternate(
    calls: Mapping[Key, Callable[[], object]], rounds: int, seed: int = 0, share: float = ROUND_SECONDS
) -> dict[Key, list[float]]:
    """Seconds that each of ``calls`` took, one figure a call.

    Every round goes through all of them in a new order. A quick call is made once untimed, which wakes threads and
    brings code and inputs into the caches, and then up to 8 times; a slow one once, in as many rounds as ``share``
    seconds a round allow. One that never gets its turn again has the time of the first look at them all.
    """
    shuffle = random.Random(seed).shuffle
    order = list(calls)
    shuffle(order)
    first = {key: _timed(calls[key]) for key in order}
    least, spent = dict(first), dict(first)
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for number in range(rounds):
        shuffle(order)
        for key in order:
            if spent[key] > (number + 1) * share:
                continue
            count = max(1, min(MOST_CALLS, int(BURST_SECONDS / least[key])))
            if count > 1:
                spent[key] += _timed(calls[key])
            burst = [_timed(calls[key]) for _ in range(count)]
            times[key] += burst
            spent[key] += sum(burst)
            least[key] = min(least[key], *burst)
    return {key: times[key] or [first[key]] for key in calls}


def _timed(call: Callable[[], object]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began
