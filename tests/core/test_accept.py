"""Acceptance on tokens and probabilities alone: chains, trees, and the ratio rule in closed form."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
import torch

from quantspec.core.accept import accept, ratio_accept, residual
from quantspec.types import Draft


def tree(tokens: tuple[int, ...], parents: tuple[int, ...]) -> Draft:
    return Draft(tokens, parents, (1.0,) * len(tokens), ("draft",) * len(tokens))


@pytest.mark.parametrize(
    "y, path",
    [((5, 6, 7, 8), (0, 1, 2)), ((5, 6, 9, 8), (0, 1)), ((9, 6, 7, 8), ()), ((5, 9, 7, 8), (0,))],
)
def test_chain(y: tuple[int, ...], path: tuple[int, ...]) -> None:
    assert accept(tree((5, 6, 7), (-1, 0, 1)), y) == path


def test_tree_takes_the_branch_that_carries_y_even_if_it_stands_last() -> None:
    draft = tree((1, 2, 3, 4, 5, 6), (-1, -1, 0, 0, 1, 4))
    assert accept(draft, (2, 3, 5, 0, 0, 6, 0)) == (1, 4, 5)
    assert accept(draft, (1, 4, 5, 9, 9, 6, 0)) == (0, 3)
    assert accept(draft, (9, 3, 5, 0, 0, 6, 0)) == ()


def test_a_node_whose_parent_was_rejected_never_stands() -> None:
    assert accept(tree((1, 2), (-1, 0)), (9, 2, 9)) == ()


def test_empty_draft() -> None:
    assert accept(tree((), ()), (3,)) == ()


def test_duplicate_siblings_are_merged_with_their_subtrees() -> None:
    draft = tree((1, 1, 2, 3, 2), (-1, -1, 0, 1, 1))
    assert draft.tokens == (1, 2, 3)
    assert draft.parents == (-1, 0, 0)


def test_against_a_walk_from_the_root() -> None:
    pick = random.Random(0)
    for _ in range(500):
        n = pick.randrange(12)
        draft = tree(tuple(pick.randrange(3) for _ in range(n)), tuple(pick.randrange(-1, i) for i in range(n)))
        y = [pick.randrange(3) for _ in range(len(draft) + 1)]
        path, at = [], -1
        while True:
            child = [i for i in range(len(draft)) if draft.parents[i] == at and draft.tokens[i] == y[at + 1]]
            if not child:
                break
            at = child[0]
            path.append(at)
        assert accept(draft, y) == tuple(path)


# The ratio rule, enumerated: probabilities are multiples of 1/D, coins stand on a grid on which every p/q falls between
# two points, and the residual draw is taken apart into its probabilities.
D = 4
GRID = 12  # a multiple of every possible numerator of q


def distributions(vocab_size: int) -> list[tuple[Fraction, ...]]:
    return [
        tuple(Fraction(part, D) for part in parts)
        for parts in itertools.product(range(D + 1), repeat=vocab_size)
        if sum(parts) == D
    ]


def outcomes(tokens: tuple[int, ...], p: list, q: list | None) -> dict[tuple[int, ...], Fraction]:
    """Exact distribution of the emitted text for a drafted chain, over all coins."""
    p_rows = torch.tensor([[float(x) for x in row] for row in p], dtype=torch.float64)
    q_rows = None if q is None else torch.tensor([[float(x) for x in row] for row in q], dtype=torch.float64)
    result: dict[tuple[int, ...], Fraction] = {}
    for coins in itertools.product(range(GRID), repeat=len(tokens)):
        drawn: list[tuple[Fraction, ...]] = []

        def draw(probabilities: torch.Tensor, i: int, drawn: list = drawn) -> int:
            drawn.append(tuple(Fraction(float(x)).limit_denominator(1000) for x in probabilities))
            return 0

        kept, _ = ratio_accept(tokens, p_rows, q_rows, lambda i, coins=coins: (coins[i] + 0.5) / GRID, draw)
        for token, probability in enumerate(drawn[0]):
            text = (*tokens[:kept], token)
            result[text] = result.get(text, Fraction(0)) + probability * Fraction(1, GRID ** len(tokens))
    return result


def test_ratio_rule_is_exact_in_closed_form() -> None:
    """``q(v) min(1, p/q) + P(rejected) residual(v) == p(v)`` for every pair of distributions and every entry."""
    for p, q in itertools.product(distributions(3), repeat=2):
        total = [Fraction(0)] * 3
        for token, weight in enumerate(q):
            if not weight:
                continue
            for text, probability in outcomes((token,), [p, p], [q]).items():
                total[text[0]] += weight * probability
        assert tuple(total) == p


def test_ratio_rule_on_a_point_mass_is_exact_for_any_token() -> None:
    for p in distributions(3):
        for token in range(3):
            total = [Fraction(0)] * 3
            for text, probability in outcomes((token,), [p, p], None).items():
                total[text[0]] += probability
            assert tuple(total) == p


def test_ratio_rule_on_chains_of_two() -> None:
    """The joint distribution of the first two tokens, p and q of the second depending on the first; a text that stopped
    after one token goes on with a plain draw."""
    pick = random.Random(1)
    pool = distributions(3)
    for _ in range(4):
        p1, q1 = pick.choice(pool), pick.choice(pool)
        p2, q2, p3 = ([pick.choice(pool) for _ in range(3)] for _ in range(3))
        total: dict[tuple[int, int], Fraction] = {}
        for first, second in itertools.product(range(3), repeat=2):
            weight = q1[first] * q2[first][second]
            if not weight:
                continue
            for text, probability in outcomes((first, second), [p1, p2[first], p3[second]], [q1, q2[first]]).items():
                longer = [(text, Fraction(1))] if len(text) > 1 else [((*text, v), p2[text[0]][v]) for v in range(3)]
                for (a, b, *_), share in longer:
                    total[a, b] = total.get((a, b), Fraction(0)) + weight * probability * share
        for a, b in itertools.product(range(3), repeat=2):
            assert total.get((a, b), 0) == p1[a] * p2[a][b]


def test_residual() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.75, 0.0])
    assert residual(p, q).tolist() == [0.5, 0.0, 0.5]
    assert residual(p, p * 1.0001).equal(p)
