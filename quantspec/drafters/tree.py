"""The dynamic draft tree of EAGLE-2 (arXiv 2406.16858), and the best tree over rows of logits that are all there
already, as functions without a model.

A node's log-score is the sum of ``View.scores`` along its path: the estimated log-probability that all of the path is
accepted. No child outranks its parent, so the best nodes, with ties to the earlier one, always form a tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

from quantspec.types import EMPTY_DRAFT, Budget, Draft

if TYPE_CHECKING:
    from torch import Tensor

    from quantspec.core.drafter import View

Ranked = tuple[Sequence[int], Sequence[float]]
"""Tokens that may follow a path, and their conditional log-probabilities, best first."""


@dataclass(slots=True)
class Tree:
    """Candidate nodes in the order they were grown, parents before children; parent -1 is the last committed token."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    log_scores: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def expand(self, parent: int, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """Add children of a node, distinct tokens with their conditional log-probabilities."""
        base = self.log_scores[parent] if parent >= 0 else 0.0
        self.tokens += tokens
        self.parents += [parent] * len(tokens)
        # A log-softmax may round to just above 0; a child must never outrank its parent.
        self.log_scores += [base + min(log_prob, 0.0) for log_prob in log_probs]


def rerank(log_scores: Sequence[float], budget: Budget) -> list[int]:
    """Ids, ascending, of the nodes worth verifying (``Budget.worth``).

    Ties go to the earlier node, so the kept set holds every ancestor of its members.
    """
    best = _best(log_scores, budget.max_nodes)
    return sorted(best[: budget.worth([math.exp(log_scores[node]) for node in best])])


def promising(log_scores: Sequence[float], budget: Budget) -> list[int]:
    """Ids, ascending, of the nodes that may be worth verifying once more have been grown: as ``rerank``, but for rows
    that the next ones may pay for."""
    if not budget.prices:
        return rerank(log_scores, budget)
    best = zip(_best(log_scores, budget.max_nodes), budget.floors(), strict=False)
    return sorted(node for node, floor in best if math.exp(log_scores[node]) > floor)


def _best(log_scores: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(log_scores)), key=log_scores.__getitem__, reverse=True)[:count]


def frontier(tree: Tree, level_start: int, kept: Sequence[int], width: int, leaf_tokens: Collection[int]) -> list[int]:
    """The nodes of the newest level (ids from ``level_start``) worth expanding: the ``width`` best of those ``kept``.

    A node outside the best cannot have a descendant among them, so nothing is lost by not growing it. Nothing follows
    ``leaf_tokens``, which end the text.
    """
    growing = [i for i in kept if i >= level_start and tree.tokens[i] not in leaf_tokens]
    return sorted(sorted(growing, key=tree.log_scores.__getitem__, reverse=True)[:width])


def best_first(
    ranked: Callable[[tuple[int, ...]], Ranked], depth: int, budget: Budget, leaf_tokens: Collection[int]
) -> Tree:
    """The best nodes of the whole tree, in falling order, where what may follow a path costs no forward to know, as far
    as any of them may be worth verifying. Nothing follows ``leaf_tokens``."""
    floors = budget.floors()
    tree, paths, children = Tree(), {-1: tuple[int, ...]()}, {-1: ranked(())}
    waiting: list[tuple[float, int, int, int]] = []  # negative score, order of arrival, parent, rank among its children

    def wait(parent: int, rank: int, arrival: int) -> None:
        log_probs = children[parent][1]
        if rank < len(log_probs):
            above = tree.log_scores[parent] if parent >= 0 else 0.0
            heappush(waiting, (-above - min(log_probs[rank], 0.0), arrival, parent, rank))

    wait(-1, 0, 0)
    while waiting and len(tree) < len(floors):
        negative, _, parent, rank = heappop(waiting)
        if math.exp(-negative) <= floors[len(tree)]:
            break
        tokens, log_probs = children[parent]
        node, path = len(tree), (*paths[parent], tokens[rank])
        tree.expand(parent, [tokens[rank]], [log_probs[rank]])
        wait(parent, rank + 1, 2 * node + 1)
        if len(path) < depth and tokens[rank] not in leaf_tokens:
            paths[node], children[node] = path, ranked(path)
            wait(node, 0, 2 * node + 2)
    return tree


def draft_of_rows(
    view: View, logits: Tensor, budget: Budget, top_k: int, tau: float, ids: Tensor | None, stage: str
) -> Draft:
    """The best tree where row d of ``logits [depth, W]`` says what follows any path of d tokens, ``top_k`` children to
    a node: a path's probability is the product of its rows' (DDTree, arXiv 2604.12989). ``ids``, ``tau``: see
    ``View.best``."""
    width = min(top_k, view.vocab_size)

    def best(rows: Tensor, paths: Sequence[Sequence[int]]) -> list[Ranked]:
        found = view.best(rows, paths, width, tau, ids)
        return list(zip(*(each.tolist() for each in found), strict=True))

    if view.chain.stateless:  # of the tokens before a row only their number matters
        levels = best(logits, [range(level) for level in range(len(logits))])
        tree = best_first(lambda path: levels[len(path)], len(logits), budget, view.stop_ids)
    else:
        rows = logits.split(1)
        tree = best_first(lambda path: best(rows[len(path)], [path])[0], len(logits), budget, view.stop_ids)
    return assemble(tree, rerank(tree.log_scores, budget), stage)


class Rows(NamedTuple):
    """Logits ``[n, W]`` of what follows n nodes of a level, on target ids ``[W]`` (None: on all)."""

    logits: Tensor
    ids: Tensor | None


@dataclass(frozen=True, slots=True)
class Level:
    """Nodes that are expanded together, with their parents' rows in the level before."""

    number: int
    """From 1, the children of the last committed token."""
    nodes: Sequence[int]
    parents: Sequence[int]
    tokens: Sequence[int]
    rows: Sequence[int]


def grow(
    view: View, budget: Budget, depth: int, width: int, tau: float, stage: str, first: Rows,
    deeper: Callable[[Level], Rows],
) -> Draft:  # fmt: skip
    """EAGLE-2's tree: of each level the ``width`` best nodes that may be worth verifying are expanded, into as many
    children, down to ``depth``. ``first`` says what follows the committed text, ``deeper`` what follows the nodes of a
    level. ``tau``: see ``View.best``."""
    nodes, tree, mass, rows = [-1], Tree(), 1.0, first
    paths: dict[int, tuple[int, ...]] = {-1: ()}  # the tokens that lead to every expanded node
    children = min(width, view.vocab_size)
    for number in range(1, depth + 1):
        best = view.best(rows.logits, [paths[node] for node in nodes], children, tau, rows.ids)
        start = len(tree)
        for node, found, scores in zip(nodes, *(each.tolist() for each in best), strict=True):
            tree.expand(node, found, scores)
        if number == depth:
            break
        kept = promising(tree.log_scores, budget)
        grown = frontier(tree, start, kept, width, view.stop_ids)
        above, mass = mass, sum(math.exp(tree.log_scores[node]) for node in grown)
        if mass * mass <= budget.level_price * above:  # what the next level promises, if it keeps as much as this
            break
        row = {node: i for i, node in enumerate(nodes)}
        parents, tokens = [tree.parents[node] for node in grown], [tree.tokens[node] for node in grown]
        for node, parent, token in zip(grown, parents, tokens, strict=True):
            paths[node] = (*paths[parent], token)
        rows, nodes = deeper(Level(number, grown, parents, tokens, [row[parent] for parent in parents])), grown
    return assemble(tree, rerank(tree.log_scores, budget), stage)


def assemble(tree: Tree, kept: Sequence[int], stage: str) -> Draft:
    """The kept nodes (ids ascending, closed under parents) as a draft."""
    if not kept:
        return EMPTY_DRAFT
    new_id = {-1: -1} | {node: i for i, node in enumerate(kept)}
    return Draft(
        tuple(tree.tokens[i] for i in kept),
        tuple(new_id[tree.parents[i]] for i in kept),
        tuple(math.exp(tree.log_scores[i]) for i in kept),
        (stage,) * len(kept),
    )
