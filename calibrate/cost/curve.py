"""The cost curve v(n): seconds of one forward over how many rows it has, at several lengths of context.

Forwards are verifications of random chains by the engine's own verifier, so graphs, threads and the choice of the next
tokens are in the time, as in decoding. Widths and contexts are timed in turns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from math import inf
from statistics import median

import numpy as np
import torch

from quantspec.calibrate.cost.timing import alternate
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.session import Session
from quantspec.core.verify import Verifier
from quantspec.engine.costs import CostCurve
from quantspec.engine.engine import torch_threads
from quantspec.errors import ModelError
from quantspec.models.base import DrawingModel
from quantspec.models.cache import KVCache
from quantspec.models.triton_frame import TILES
from quantspec.types import EMPTY_DRAFT, Draft, SamplingParams

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64)
INNER_WIDTHS = tuple(width for width in WIDTHS if width <= 24)
_LOW = 0.1  # the quantile that stands for a time: least times of what else the machine does
_ROUNDS = 24
_ENOUGH = 4  # times of either half

Times = Mapping[tuple[int, int], Sequence[float]]
"""Seconds of forwards by (context, width), in the order in which they ran."""


class Forwards:
    """Forwards of one verifier at several contexts, timed as often as asked; what was timed before still counts."""

    def __init__(
        self, verifier: Verifier, contexts: Sequence[int], widths: Sequence[int], threads: int | None, seed: int
    ) -> None:
        self._verifier, self._widths, self._threads, self._seed = verifier, widths, threads, seed
        most = verifier.model.max_positions - widths[-1] - 1
        if most < 1:
            raise ModelError(f"a context of {verifier.model.max_positions} tokens is too short to measure")
        self.contexts = tuple(sorted({min(context, most) for context in contexts}))
        self._random = random.Random(seed)
        with torch.inference_mode(), torch_threads(threads):
            sessions = {context: self._session(context) for context in self.contexts}
        self._calls = {
            (context, width): self._call(sessions[context], width)
            for context, width in product(self.contexts, self._widths)
        }
        self.times: dict[tuple[int, int], list[float]] = {key: [] for key in self._calls}

    def run(self, seconds: float) -> None:
        """Time all of them for about that long, each for the same share of it: narrow forwards, which decide most, more
        often than wide ones."""
        share = seconds / len(self._calls) / _ROUNDS
        with torch.inference_mode(), torch_threads(self._threads):
            quick = self._calls[self.contexts[0], self._widths[0]]
            plain = min(alternate({0: quick}, 3)[0])
            share = max(share, plain / 2)  # of a large model too, narrow forwards in every second round
            for key, times in alternate(self._calls, _ROUNDS, self._seed, share).items():
                self.times[key] += times

    def curve(self) -> CostCurve:
        """Of all that was timed so far."""
        return CostCurve(
            self.contexts,
            tuple(self._widths),
            tuple(tuple(low(self.times[context, width]) for width in self._widths) for context in self.contexts),
            TILES if isinstance(self._verifier.model, DrawingModel) else None,
        )

    def _session(self, context: int) -> Session:
        verifier = self._verifier
        prompt = [self._token() for _ in range(context)]
        chain = WarpChain(SamplingParams(), prompt, frozenset())
        session = verifier.open(prompt, chain, Stream.of(prompt, 0, 0), max_new_tokens=2, max_nodes=self._widths[-1])
        cache = session.cache
        if isinstance(cache, KVCache) and cache.format is None and cache.kv.device.type == "cpu":
            cache.kv.normal_()  # random keys and values cost what others do, and a long prompt would take minutes
            cache.commit(range(context))
            session.extend([self._token()])
        else:
            session.commit(verifier.verify([session], [EMPTY_DRAFT])[0].cut(1))
        return session

    def _call(self, session: Session, width: int) -> Callable[[], object]:
        nodes = width - 1
        draft = Draft.chain([self._token() for _ in range(nodes)], [1.0] * nodes, ["random"] * nodes)
        return lambda: self._verifier.verify([session], [draft])

    def _token(self) -> int:
        return self._random.randrange(self._verifier.model.vocab_size)


def low(times: Iterable[float]) -> float:
    """The time that a call takes when nothing else runs: the lower decile."""
    return float(np.quantile(list(times), _LOW))


def noise(times: Times) -> float:
    """How far times repeat: the median over all calls (of which there are times enough) of the difference between the
    first and the second half of its times, as a share of the smaller."""
    apart = []
    most = max(2, *map(len, times.values()))
    for each in times.values():
        half = len(each) // 2
        if half < min(_ENOUGH, most // 2):
            continue
        first, second = low(each[:half]), low(each[half:])
        apart.append(abs(first - second) / min(first, second))
    return median(apart) if apart else inf
