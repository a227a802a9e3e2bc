import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantspec.drafters.tree import Tree, assemble, frontier, promising, rerank
from quantspec.types import EMPTY_DRAFT, Budget

# Few distinct values on purpose: ties are what breaks ancestor closure.
log_probs = st.sampled_from([0.0, -0.25, -0.5, -1.0, -3.0, -math.inf])


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    tree = Tree()
    for _ in range(draw(st.integers(1, 6))):
        parent = draw(st.integers(-1, len(tree) - 1))
        if parent in tree.parents:  # a node is expanded once
            continue
        size = draw(st.integers(1, 3))
        tree.expand(parent, list(range(size)), draw(st.lists(log_probs, min_size=size, max_size=size)))
    return tree


def test_expand_adds_the_parents_score_and_never_exceeds_it() -> None:
    tree = Tree()
    tree.expand(-1, [7, 8], [-0.5, -1.0])
    tree.expand(1, [9, 3], [-0.25, 1e-7])  # a log-softmax rounded above zero
    assert tree.tokens == [7, 8, 9, 3]
    assert tree.parents == [-1, -1, 1, 1]
    assert tree.log_scores == [-0.5, -1.0, -1.25, -1.0]


@given(trees(), st.integers(0, 8))
@settings(deadline=None)
def test_rerank_is_closed_under_ancestors(tree: Tree, max_nodes: int) -> None:
    kept = rerank(tree.log_scores, Budget(max_nodes, 9))
    assert kept == sorted(set(kept))
    assert len(kept) <= max_nodes
    assert all(tree.parents[i] in (-1, *kept) for i in kept)


@given(trees(), st.integers(1, 6))
@settings(deadline=None)
def test_rerank_equals_brute_force_over_all_subtrees(tree: Tree, max_nodes: int) -> None:
    scores = [math.exp(s) for s in tree.log_scores]
    closed = (
        nodes
        for size in range(min(max_nodes, len(tree)) + 1)
        for nodes in combinations(range(len(tree)), size)
        if all(tree.parents[i] in (-1, *nodes) for i in nodes)
    )
    best = max(sum(scores[i] for i in nodes) for nodes in closed)
    # The same few floats are added in another order.
    assert sum(scores[i] for i in rerank(tree.log_scores, Budget(max_nodes, 9))) == pytest.approx(best, abs=1e-12)


@given(trees(), st.floats(0.0, 1.0), st.integers(1, 8))
@settings(deadline=None)
def test_rerank_keeps_exactly_what_pays_a_flat_price(tree: Tree, price: float, max_nodes: int) -> None:
    kept = rerank(tree.log_scores, Budget(max_nodes, 9, min_score=price))
    paying = [i for i, score in enumerate(tree.log_scores) if math.exp(score) > price]
    assert set(kept) <= set(paying)
    assert len(kept) == min(len(paying), max_nodes)


def test_rerank_buys_a_row_that_the_next_ones_pay_for() -> None:
    scores = [math.log(p) for p in (0.9, 0.6, 0.5, 0.4, 0.05)]
    tile = Budget(5, 9, prices=(0.0, 0.0, 0.8, 0.0, 0.0))
    assert rerank(scores, tile) == [0, 1, 2, 3, 4], "three rows at 0.8 together"
    assert rerank(scores[:3], tile) == [0, 1]
    assert promising(scores[:3], tile) == [0, 1, 2], "the next nodes may pay for the third row"
    assert rerank(scores, Budget(5, 9, prices=(0.0, 0.0, 0.8, 0.6))) == [0, 1]
    assert rerank(scores, Budget(2, 9)) == [0, 1]


@given(trees(), st.lists(st.floats(0.0, 1.0), max_size=8), st.integers(1, 6))
@settings(deadline=None)
def test_what_is_not_promising_is_never_worth_it(tree: Tree, prices: list[float], max_nodes: int) -> None:
    budget = Budget(max_nodes, 9, prices=tuple(prices))
    assert set(rerank(tree.log_scores, budget)) <= set(promising(tree.log_scores, budget))


def test_rerank_breaks_ties_towards_the_earlier_node() -> None:
    tree = Tree()
    tree.expand(-1, [0, 1], [-1.0, -1.0])
    tree.expand(0, [2], [0.0])
    assert rerank(tree.log_scores, Budget(2, 9)) == [0, 1]


def test_frontier_takes_the_best_kept_nodes_of_the_new_level_and_skips_leaves() -> None:
    tree = Tree()
    tree.expand(-1, [0, 1, 2, 3], [-2.0, -1.0, -3.0, -1.5])
    assert frontier(tree, 0, [0, 1, 2, 3], 2, ()) == [1, 3]
    assert frontier(tree, 0, [0, 1, 3], 3, {1}) == [0, 3]
    assert frontier(tree, 2, [0, 1], 3, ()) == []


@given(trees(), st.integers(1, 5))
@settings(deadline=None)
def test_growing_only_the_frontier_loses_nothing(tree: Tree, max_nodes: int) -> None:
    """No descendant of a node outside the best can enter them, whatever is grown later."""
    kept = rerank(tree.log_scores, Budget(max_nodes, 9))
    for node in set(range(len(tree))) - set(kept):
        if node in tree.parents:
            continue
        grown = Tree(tree.tokens.copy(), tree.parents.copy(), tree.log_scores.copy())
        grown.expand(node, [0], [0.0])
        assert len(tree) not in rerank(grown.log_scores, Budget(max_nodes, 9))


def test_assemble_renumbers_parents_and_turns_log_scores_into_probabilities() -> None:
    tree = Tree()
    tree.expand(-1, [5, 6, 7], [-0.1, -2.0, -0.2])
    tree.expand(2, [8], [-0.3])
    draft = assemble(tree, [0, 2, 3], "eagle")
    assert draft.tokens == (5, 7, 8)
    assert draft.parents == (-1, -1, 1)
    assert draft.scores == pytest.approx((math.exp(-0.1), math.exp(-0.2), math.exp(-0.5)))
    assert draft.stages == ("eagle",) * 3
    assert assemble(tree, [], "eagle") is EMPTY_DRAFT
