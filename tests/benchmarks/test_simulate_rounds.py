"""Rounds in expectation against closed forms, against brute force, against draws, and against the engine's own cascade.

Draws: 3 standard errors of the mean of so many rounds stay below the tolerances given (tokens of a round vary by about
half their mean, so 6,000 rounds of a sequence leave 3 * 0.5 / sqrt(6,000) = 1.9%)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

import pytest
import torch
from table_model import TableModel, generate

from quantspec.benchmarks.simulate_rounds import Cascade, Direct, Expected, Verified, chain, replay, tree
from quantspec.core.drafter import NoDrafter
from quantspec.core.verify import Verifier
from quantspec.drafters.cascade import Cascade as RealCascade
from quantspec.drafters.config import CascadeOptions
from quantspec.engine.costs import CostCurve, DraftCost, Step, Trace
from quantspec.types import EMPTY_DRAFT, Budget, Draft, Needs, SamplingParams

FLAT = CostCurve((0,), (1, 64), ((1.0, 1.0),))
STEPS = CostCurve((0, 100), (1, 8, 16, 64), ((1.0, 1.1, 2.0, 5.0), (1.5, 1.8, 3.0, 7.0)), tiles=(8,))
SMALL = CostCurve((0,), (1, 4, 8, 32), ((0.1, 0.11, 0.15, 0.4),))
RANKS = ((0.6, 0.2, 0.1),)


def test_a_chain_of_constant_acceptance_is_the_geometric_sum() -> None:
    for alpha, length in product((0.3, 0.8, 0.95), (1, 5, 12)):
        assert chain([alpha], length).tokens == pytest.approx((1 - alpha ** (length + 1)) / (1 - alpha))
    assert chain([0.9, 0.5, 0.1], 2).tokens == pytest.approx(1 + 0.9 + 0.45)


def test_a_draft_models_chain_is_a_cascade_with_nothing_inside() -> None:
    drafting = Cascade(Verified(SMALL, Direct(), 0), [0.8], min_draft=5, most=5)
    assert drafting.expected.reach == pytest.approx(chain([0.8], 5).reach)
    # Five steps of the small model; after full acceptance the first has two rows, which take 0.1033 instead of 0.1.
    assert drafting.seconds(1) == pytest.approx(0.5 + 0.8**5 * (0.01 / 3))


def test_the_tree_is_the_best_of_all_trees() -> None:
    """Against a search of all ways to give nodes to children, as Sequoia's recursion has it, with a limit of depth."""
    ranks = ((0.5, 0.3, 0.1), (0.6, 0.2, 0.05), (0.4, 0.3, 0.2))

    @lru_cache
    def best(nodes: int, depth: int) -> float:
        """The most tokens below a node at that depth, which itself is not counted."""
        if not nodes or depth == len(ranks):
            return 0.0
        shares = [split for split in product(range(nodes + 1), repeat=3) if sum(split) == nodes]
        return max(
            sum(p * (1 + best(n - 1, depth + 1)) for p, n in zip(ranks[depth], split, strict=True) if n)
            for split in shares
        )

    for nodes in range(1, 11):
        assert tree(ranks, nodes, 3, top_k=3).tokens == pytest.approx(1 + best(nodes, 0)), nodes


def test_replayed_traces_count_what_was_accepted() -> None:
    wide = Step((0.9, 0.5, 0.4, 0.3), (-1, -1, 0, 2), (True, False, True, False), 10)
    narrow = Step((0.8,), (-1,), (False,), 12)
    trace = Trace((wide, wide, narrow))
    found = replay(trace, 3, 2)
    assert found.reach == pytest.approx((2 / 3, 2 / 3))
    assert found.sizes == pytest.approx({(2, 3): 2 / 3, (1, 1): 1 / 3})
    for nodes, depth in product((1, 2, 3, 4), (1, 2, 3)):
        assert replay(trace, nodes, depth).tokens == pytest.approx(trace.length(Budget(nodes, depth)))


def test_a_batch_shares_the_read_of_the_weights_but_not_its_contexts() -> None:
    verified = Verified(STEPS, Direct(chain([0.5], 3), lambda levels, nodes, batch: 0.01 * levels * batch), 50, 0.2)
    # 4 rows of each of 3 sequences: a forward of 16, and the context of each by itself, halfway to that at 100 tokens.
    own = (1.8 - 1.1) / 2
    assert verified.seconds(3) == pytest.approx(0.2 + 0.09 + 2.0 + 3 * own)
    assert verified.tokens_per_second(3) == pytest.approx(3 * 1.875 / verified.seconds(3))


@dataclass
class Drawn:
    """One sequence of a level, by draws: the reference for all that ``Cascade`` sums up."""

    surplus: int = 0
    lag: bool = False
    inner: Drawn | None = field(default=None, repr=False)


def draw_round(
    verified: Verified, states: list[Drawn], late: list[bool], pick: random.Random
) -> tuple[list[int], float]:
    """Tokens of one round of each sequence, and its seconds."""
    drafting, seconds = verified.drafter, verified.overhead
    silent = [lag and drafting.reads_features for lag in late]
    active = [i for i, quiet in enumerate(silent) if not quiet]
    nodes, accepted = [0] * len(states), [0] * len(states)
    if isinstance(drafting, Cascade):
        lengths, spent = draw_chains(drafting, [states[i] for i in active], pick)
        seconds += spent
        for i, length in zip(active, lengths, strict=True):
            nodes[i] = min(length, drafting.most)
            accepted[i] = settle(drafting, states[i], length, pick)
    else:
        for i in active:
            u = pick.random()
            accepted[i] = sum(u < p for p in drafting.expected.reach)
            (levels, nodes[i]) = next(iter(drafting.expected.sizes))
        seconds += drafting.time(levels, nodes[active[0]], len(active)) if active and nodes[active[0]] else 0.0
    rows = sum(nodes) + len(states) + sum(late)
    near = verified.curve.at(rows, 0)
    own = sum(
        verified.curve.at(2 if quiet else n + 1, verified.context) - verified.curve.at(2 if quiet else n + 1, 0)
        for n, quiet in zip(nodes, silent, strict=True)
    )
    return [1 + n for n in accepted], seconds + near + own


def draw_chains(cascade: Cascade, states: list[Drawn], pick: random.Random) -> tuple[list[int], float]:
    lengths, seconds = [state.surplus for state in states], 0.0
    for state in states:
        state.inner = state.inner or Drawn()
    while hungry := [i for i, length in enumerate(lengths) if length < cascade.min_draft]:
        late = [states[i].lag for i in hungry]
        inner = [states[i].inner for i in hungry]
        tokens, spent = draw_round(cascade.inner, inner, late, pick)
        seconds += spent
        for i, emitted in zip(hungry, tokens, strict=True):
            lengths[i] += emitted
            states[i].lag = False
    return lengths, seconds + sum(cascade.besides.at(0, min(length, cascade.most)) for length in lengths)


def settle(cascade: Cascade, state: Drawn, length: int, pick: random.Random) -> int:
    handed = min(length, cascade.most)
    alpha = [cascade.agreement[min(i, len(cascade.agreement) - 1)] for i in range(handed + 1)]
    right = [pick.random() < a for a in alpha]
    accepted = next((i for i in range(handed) if not right[i]), handed)
    whole = accepted == handed
    state.lag = whole and length == handed
    state.surplus = length - handed - 1 if whole and length > handed and right[handed] else 0
    if not whole:
        state.inner = None  # what it had drafted beyond is gone
    return accepted


def drawn(verified: Verified, batch: int, rounds: int, seed: int = 0) -> tuple[float, float]:
    """Tokens of a sequence and seconds of all, per round."""
    pick, states, tokens, seconds = random.Random(seed), [Drawn() for _ in range(batch)], 0, 0.0
    for _ in range(rounds):
        found, spent = draw_round(verified, states, [False] * batch, pick)
        tokens, seconds = tokens + sum(found), seconds + spent
    return tokens / rounds / batch, seconds / rounds


def head(levels: int, nodes: int, batch: int) -> float:
    return 0.02 + 0.01 * levels + 0.001 * nodes * batch


def two_levels(most: int, min_draft: int = 5, reads: bool = True) -> Verified:
    inner = Verified(SMALL, Direct(tree(RANKS, 6, 3), head, reads), 0, 0.005)
    return Verified(
        STEPS, Cascade(inner, [0.9, 0.8, 0.85], min_draft, most, DraftCost(fixed=0.03, per_node=0.01)), 40, 0.01
    )


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("most", [5, 6, 8, 20])
def test_a_cascade_is_as_by_draws(most: int, reads: bool) -> None:
    verified = two_levels(most, reads=reads)
    tokens, seconds = drawn(verified, 1, 6_000)
    assert verified.tokens == pytest.approx(tokens, rel=0.02)
    assert verified.seconds(1) == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize("batch", [2, 5])
def test_a_batch_of_cascades_is_as_by_draws(batch: int) -> None:
    verified = two_levels(7)
    tokens, seconds = drawn(verified, batch, 6_000 // batch)
    assert verified.tokens == pytest.approx(tokens, rel=0.02)
    assert verified.seconds(batch) == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize("batch", [1, 3])
def test_three_levels_are_as_by_draws(batch: int) -> None:
    """Rounds of the middle level count as independent here, and follow each other there: 1% more for that."""
    tiny = CostCurve((0,), (1, 16), ((0.01, 0.03),))
    inner = Verified(tiny, Direct(tree(RANKS, 4, 2), lambda levels, nodes, batch: 0.002 * levels, True), 0)
    middle = Verified(SMALL, Cascade(inner, [0.8], 3, 4), 0)
    verified = Verified(STEPS, Cascade(middle, [0.9], 6, 8), 0)
    tokens, seconds = drawn(verified, batch, 6_000 // batch)
    assert verified.tokens == pytest.approx(tokens, rel=0.03)
    assert verified.seconds(batch) == pytest.approx(seconds, rel=0.03)


def test_certain_agreement_ends_nowhere() -> None:
    """Every chain is taken whole: the long run is a cycle of states, which has averages all the same."""
    inner = Verified(SMALL, Direct(Expected((1.0, 1.0), {(2, 2): 1.0}), head, True), 0)
    verified = Verified(STEPS, Cascade(inner, [1.0], 4, 4), 0)
    tokens, seconds = drawn(verified, 1, 3_000)
    # No chance is left but the start, which is a step or two of 3,000.
    assert (verified.tokens, verified.seconds(1)) == pytest.approx((tokens, seconds), rel=1e-3)


VOCAB, ORDER = 50, 6


class Text(TableModel):
    """A greedy text that is a hash of its last tokens; ``base`` is another, whose next token it shares with probability
    ``agreement``. Notes the rows of its forwards."""

    def __init__(self, seed: int, base: Text | None = None, agreement: float = 1.0) -> None:
        super().__init__(VOCAB, seed)
        self.base, self.agreement, self.widths = base, agreement, list[int]()

    def next_token(self, path: Sequence[int]) -> int:
        if self.base is None:
            return number(self.seed, path) % VOCAB
        token = self.base.next_token(path)
        return token if share(self.seed, path) < self.agreement else (token + 1) % VOCAB

    def row(self, path: Sequence[int]) -> torch.Tensor:
        row = torch.zeros(VOCAB)
        row[self.next_token(path)] = 5.0
        return row

    def tap(self, tap: object, path: Sequence[int]) -> torch.Tensor:
        return torch.zeros(self.hidden_size)

    def forward(self, batch, caches, taps=()):
        self.widths.append(len(batch.tokens))
        return super().forward(batch, caches, taps)

    def seconds(self, curve: CostCurve) -> float:
        return sum(curve.at(width, 0) for width in self.widths)


def number(seed: int, path: Sequence[int]) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {tuple(path[-ORDER:])}".encode(), digest_size=6).digest(), "little")


def share(seed: int, path: Sequence[int]) -> float:
    return number(seed + 1000, path) / 2**48


class Trees(NoDrafter):
    """The best tree of six nodes and three levels for ``RANKS``, which its verifier's text goes down with their
    probabilities. Reads features, so it has nothing to say while one is missing."""

    needs, name = Needs(taps=("norm",)), "trees"

    def prepare(self, parts) -> None:
        self.model, self.drafts = parts.model, 0

    def open(self, view) -> list[int]:
        return [0]

    def observe(self, state, verdict) -> None:
        state[0] += len(verdict.taps["norm"])

    def truncate(self, state, length) -> None:
        state[0] = min(state[0], length)

    def propose(self, states, views, budgets) -> list[Draft]:
        return [self._draft(state[0], view) for state, view in zip(states, views, strict=True)]

    def _draft(self, seen: int, view) -> Draft:
        if seen != len(view.tokens) - 1:
            return EMPTY_DRAFT
        self.drafts += 1
        ids: dict[tuple[int, ...], int] = {(): -1}
        paths: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
        tokens, parents = list[int](), list[int]()
        for ranks in best_nodes(6, 3):
            above = ranks[:-1]
            token = child(self.model, (*view.tokens, *paths[above]), ranks[-1])
            ids[ranks], paths[ranks] = len(tokens), (*paths[above], token)
            tokens.append(token)
            parents.append(ids[above])
        n = len(tokens)
        return Draft(tuple(tokens), tuple(parents), (1.0,) * n, (self.name,) * n)


@lru_cache
def best_nodes(count: int, depth: int) -> list[tuple[int, ...]]:
    """The likeliest nodes as paths of ranks, parents first."""
    nodes = [ranks for d in range(1, depth + 1) for ranks in product(range(3), repeat=d)]

    def likely(ranks: tuple[int, ...]) -> float:
        p = 1.0
        for rank in ranks:
            p *= RANKS[0][rank]
        return p

    return sorted(sorted(nodes, key=likely, reverse=True)[:count], key=len)


def child(model: Text, path: Sequence[int], rank: int) -> int:
    """The token of that rank after a path: the model's own one stands at rank r with probability ``RANKS[r]``."""
    u, right = share(77, path), len(RANKS[0])
    for r, p in enumerate(RANKS[0]):
        if u < p:
            right = r
            break
        u -= p
    token = model.next_token(path)
    return token if rank == right else (token + 10 + rank) % VOCAB


@pytest.mark.parametrize(("min_draft", "most"), [(5, 6), (5, 20)])
def test_the_engines_own_cascade_does_as_expected(min_draft: int, most: int) -> None:
    """``drafters.cascade`` on texts that agree by chance: its forwards and their widths, not a model of them."""
    target = Text(1)
    intermediate = Text(2, target, 0.85)
    trees = Trees()
    budget = Budget(most, most)
    tokens = forwards = drafts = 0
    outer = inner = 0.0
    for start in range(6):
        target.widths.clear(), intermediate.widths.clear()
        cascade = RealCascade(
            trees, Verifier(intermediate, stage="intermediate"), CascadeOptions(min_draft=min_draft),
            inner_budget=lambda session: Budget(6, 3),
        )  # fmt: skip
        session = generate(target, SamplingParams(max_new_tokens=700), (start, 3), cascade, budget=budget)
        tokens += len(session.tokens) - 3
        forwards += len(target.widths) - 1  # the first reads the prompt
        outer += target.seconds(STEPS) - 1.0
        inner += intermediate.seconds(SMALL)
        drafts += trees.drafts
    level = Verified(SMALL, Direct(tree(RANKS, 6, 3), lambda levels, nodes, batch: 1e-3, True), 0)
    expected = Verified(STEPS, Cascade(level, [0.85], min_draft, most), 0)
    # About 950 rounds of tokens that vary by half their mean: three standard errors are 5%.
    assert expected.tokens == pytest.approx(tokens / forwards, rel=0.05)
    assert expected.seconds(1) == pytest.approx((outer + inner + 1e-3 * drafts) / forwards, rel=0.05)
