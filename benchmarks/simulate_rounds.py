"""Rounds of speculation in expectation: what a drafter's proposals give, and what they cost, at any depth of cascades.

A verifier's round emits the accepted tokens of a draft and one of its own. What matters of a drafter is how likely at
least d of its tokens are accepted (``reach``), and the sizes of its drafts. A cascade's drafts are rounds of its
intermediate until enough tokens stand, so its own figures follow from those of the level below, and so on upwards. The
mechanics are those of ``drafters.cascade``: surplus behind a cut draft is kept while the target goes the same way, and
after full acceptance the intermediate lags two tokens, so that a drafter that reads its features misses the last ones:
on a GPU it then drafts nothing, on a CPU it guesses them.

Rounds of one level count as independent; a batch's sequences too.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from operator import mul
from typing import Protocol

import numpy as np

from quantspec.drafters.tree import Tree, frontier, rerank
from quantspec.engine.costs import CostCurve, DraftCost, Trace
from quantspec.types import Budget

DraftTime = Callable[[int, int, int], float]
"""Seconds of drafts of so many levels and nodes each, for so many sequences."""
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Expected:
    """Drafts of one kind. ``reach[d - 1]``: how likely at least d tokens are accepted. ``sizes``: how likely a draft
    has so many ``(levels, nodes)``."""

    reach: tuple[float, ...]
    sizes: Mapping[tuple[int, int], float]

    @property
    def tokens(self) -> float:
        """Acceptance length: tokens per round, the verifier's own counted."""
        return 1 + sum(self.reach)

    def accepted(self) -> list[float]:
        """How likely exactly 0, 1, ... tokens are accepted."""
        reach = (1.0, *self.reach, 0.0)
        return [here - further for here, further in pairwise(reach)]


NOTHING = Expected((), {(0, 0): 1.0})
FREE = DraftCost()


def agreed(agreement: Sequence[float], position: int) -> float:
    """Acceptance at a position, from 0, given all before it; the last known one goes on."""
    return agreement[min(position, len(agreement) - 1)]


def chain(agreement: Sequence[float], length: int) -> Expected:
    """A chain whose token at each position is accepted with that probability, given all before it."""
    reach = tuple(accumulate((agreed(agreement, i) for i in range(length)), mul))
    return Expected(reach, {(length, length): 1.0})


def tree(ranks: Sequence[Sequence[float]], nodes: int, depth: int, top_k: int = 10) -> Expected:
    """EAGLE-2's tree where the r-th likeliest child of an accepted node at depth d is accepted with ``ranks[d][r]``
    (the last row goes on), whatever the text."""
    grown, level_start, parents = Tree(), 0, [-1]
    for level in range(depth):
        log_probs = [math.log(p) for p in ranks[min(level, len(ranks) - 1)][:top_k]]
        level_start = len(grown)
        for parent in parents:
            grown.expand(parent, range(len(log_probs)), log_probs)
        kept = rerank(grown.log_scores, Budget(nodes, nodes))
        parents = frontier(grown, level_start, kept, top_k, ())
        if not parents:
            break
    depths: list[int] = []
    for parent in grown.parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
    reach = [0.0] * max((depths[node] for node in kept), default=0)
    for node in kept:
        reach[depths[node] - 1] += math.exp(grown.log_scores[node])
    return Expected(tuple(reach), {(len(reach), len(kept)): 1.0})


def replay(trace: Trace, nodes: int, depth: int) -> Expected:
    """What was measured, at this or a narrower setting than it was measured with."""
    budget, sizes, lengths = Budget(nodes, depth), Counter[tuple[int, int]](), Counter[int]()
    for step in trace.steps:
        kept = step.kept(budget)
        sizes[max((step.depths[node] for node in kept), default=0), len(kept)] += 1
        lengths[sum(step.accepted[node] for node in kept)] += 1
    count = max(len(trace.steps), 1)
    reach = [sum(times for length, times in lengths.items() if length >= d) / count for d in range(1, max(lengths) + 1)]
    return Expected(tuple(reach), {size: times / count for size, times in sizes.items()})


class Drafting(Protocol):
    """A drafter in expectation; one that ``reads_features`` needs its verifier's states of the last token to draft."""

    @property
    def expected(self) -> Expected: ...

    @property
    def reads_features(self) -> bool: ...

    def seconds(self, batch: int) -> float:
        """Of one draft for each of so many sequences."""


@dataclass(frozen=True)
class Direct:
    """A head, a lookup or nothing at all: its drafts come without a verifier in between."""

    expected: Expected = NOTHING
    time: DraftTime = lambda levels, nodes, batch: 0.0
    reads_features: bool = False

    def seconds(self, batch: int) -> float:
        return sum(share * self.time(*size, batch) for size, share in self.expected.sizes.items() if size[1])


@dataclass
class Verified:
    """A model that verifies a drafter's proposals: a whole strategy, or the inside of a cascade. ``overhead`` is a
    round's seconds outside forwards and drafts."""

    curve: CostCurve
    drafter: Drafting
    context: int
    overhead: float = 0.0
    _totals: dict[int, dict[int, float]] = field(default_factory=dict)
    _known: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def tokens(self) -> float:
        """Per round of a sequence."""
        return self.drafter.expected.tokens

    def tokens_per_second(self, batch: int = 1) -> float:
        """Of all sequences together."""
        return batch * self.tokens / self.seconds(batch)

    def seconds(self, batch: int, lagging: int = 0) -> float:
        """Of one round of so many sequences, so many of which first have to catch up with one token: a row more each,
        and no draft where it would need that token's features."""
        if (batch, lagging) not in self._known:
            silent = lagging if self.drafter.reads_features else 0
            drafting = batch - silent
            spent = self.overhead + (self.drafter.seconds(drafting) if drafting else 0.0)
            self._known[batch, lagging] = spent + self._forward(drafting, silent, lagging + silent)
        return self._known[batch, lagging]

    def _forward(self, drafting: int, silent: int, more: int) -> float:
        # All rows share one read of the weights; the context is each sequence's own.
        rows = sum(share * self._seconds(total + more) for total, share in self._rows(drafting).items())
        own = sum(share * self._reading(nodes + 1) for (_, nodes), share in self.drafter.expected.sizes.items())
        return rows + drafting * own + silent * self._reading(2)

    def _seconds(self, rows: int) -> float:
        return self.curve.at(rows, self.curve.contexts[0])

    def _reading(self, rows: int) -> float:
        return self.curve.at(rows, self.context) - self._seconds(rows)

    def _rows(self, drafting: int) -> dict[int, float]:
        """How likely the drafts of so many sequences have so many rows in all, the last committed tokens' counted."""
        if drafting not in self._totals:
            most = max(nodes for _, nodes in self.drafter.expected.sizes)
            one = np.zeros(most + 1)
            for (_, nodes), share in self.drafter.expected.sizes.items():
                one[nodes] += share
            total = np.ones(1)
            for _ in range(drafting):
                total = np.convolve(total, one)
            found = {drafting + int(n): float(total[n]) for n in np.flatnonzero(total > _NEGLIGIBLE)}
            self._totals[drafting] = found
        return self._totals[drafting]


_LAG = -1
"""The state of an intermediate that does not have the last token yet; all others are its numbers of surplus tokens."""


@dataclass(frozen=True)
class _Walk:
    """Rounds from one state: how likely each is due, and how long the chain is then."""

    due: tuple[float, ...]
    lengths: Mapping[int, float]


@dataclass
class Cascade:
    """Chains of at least ``min_draft`` tokens that ``inner`` stands for, at most ``most`` of which are handed over.

    ``agreement`` is how likely the outer level accepts the token at each position, given those before; ``besides`` what
    a sequence's draft costs outside its rounds. Without a drafter inside it is a draft model.
    """

    inner: Verified
    agreement: Sequence[float]
    min_draft: int
    most: int
    besides: DraftCost = FREE
    reads_features: bool = False

    @cached_property
    def expected(self) -> Expected:
        sizes, reach = defaultdict[tuple[int, int], float](float), [0.0] * self.most
        for state, share in self._states.items():
            for length, likely in self._walks[state].lengths.items():
                handed = min(length, self.most)
                sizes[handed, handed] += share * likely
                for d in range(handed):
                    reach[d] += share * likely * self._all_accepted[d + 1]
        return Expected(tuple(p for p in reach if p > 0), dict(sizes))

    def seconds(self, batch: int) -> float:
        spent = batch * sum(share * self.besides.at(0, nodes) for (_, nodes), share in self.expected.sizes.items())
        lagging = self._states.get(_LAG, 0.0)
        for number in range(max(len(walk.due) for walk in self._walks.values())):
            due = sum(
                share * walk.due[number]
                for state, walk in self._walks.items()
                if number < len(walk.due) and (share := self._states.get(state, 0.0))
            )
            spent += self._round(batch, due, lagging if number == 0 else 0.0)
        return spent

    def _round(self, batch: int, due: float, lagging: float) -> float:
        """Seconds of an inner round, in which a sequence takes part with probability ``due``, and lags with
        probability ``lagging``."""
        spent = 0.0
        for present in range(1, batch + 1):
            for late in range(present + 1):
                share = _multinomial(batch, present - late, late, due - lagging, lagging)
                if share > _NEGLIGIBLE:
                    spent += share * self.inner.seconds(present, late)
        return spent

    @cached_property
    def _all_accepted(self) -> list[float]:
        longest = self.most + 1
        return [1.0, *accumulate((agreed(self.agreement, i) for i in range(longest)), mul)]

    @cached_property
    def _walks(self) -> dict[int, _Walk]:
        walks, waiting = dict[int, _Walk](), [0, _LAG]
        while waiting:
            state = waiting.pop()
            walks[state] = self._walk(state)
            waiting += [s for s in self._next(walks[state]) if s not in walks and s not in waiting]
        return walks

    def _walk(self, state: int) -> _Walk:
        accepted = self.inner.drafter.expected.accepted()
        silent = state == _LAG and self.inner.drafter.reads_features
        lengths, due = {max(state, 0): 1.0}, list[float]()
        while hungry := {length: p for length, p in lengths.items() if length < self.min_draft}:
            due.append(sum(hungry.values()))
            after = defaultdict(float, {length: p for length, p in lengths.items() if length not in hungry})
            for length, p in hungry.items():
                for tokens, share in enumerate([1.0] if silent else accepted, 1):
                    if share > 0:
                        after[length + tokens] += p * share
            lengths, silent = dict(after), False
        return _Walk(tuple(due), lengths)

    def _next(self, walk: _Walk) -> dict[int, float]:
        """The states after the outer level's verdict, with their probabilities."""
        after = defaultdict[int, float](float)
        for length, p in walk.lengths.items():
            handed = min(length, self.most)
            full = p * self._all_accepted[handed]
            same = agreed(self.agreement, handed) if length > handed else 0.0
            after[0] += p - full
            if length == handed:
                after[_LAG] += full
            else:
                after[0] += full * (1 - same)
                after[length - handed - 1] += full * same
        return {state: p for state, p in after.items() if p > 0}

    @cached_property
    def _states(self) -> dict[int, float]:
        """How likely a draft begins in each state, in the long run."""
        order = list(self._walks)
        moves = np.zeros((len(order), len(order)))
        for i, state in enumerate(order):
            for after, p in self._next(self._walks[state]).items():
                moves[i, order.index(after)] += p
        equations = np.vstack([moves.T - np.eye(len(order)), np.ones(len(order))])
        found = np.linalg.lstsq(equations, np.append(np.zeros(len(order)), 1.0), rcond=None)[0]
        return {state: float(p) for state, p in zip(order, found, strict=True) if p > _NEGLIGIBLE}


def _multinomial(of: int, a: int, b: int, p: float, q: float) -> float:
    rest = of - a - b
    ways = math.comb(of, a) * math.comb(of - a, b)
    return ways * p**a * q**b * max(1 - p - q, 0.0) ** rest
