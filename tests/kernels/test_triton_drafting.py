"""Draft trees on the device against their references on the host: ``View.best`` and ``quantspec.drafters.tree``."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from quantspec.core.drafter import View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.drafters.tree import Tree, assemble, frontier, rerank
from quantspec.types import EMPTY_DRAFT, Budget, Draft, PendingDraft, SamplingParams

pytest.importorskip("triton", reason="triton is not installed")

from quantspec.kernels.triton.drafting import Growth, Limits, Race, best_children

FILLED, LEVEL = 11, 3
WARPS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(),
    "warm": SamplingParams(temperature=0.8),
    "top-k": SamplingParams(temperature=0.7, top_k=9),
    "top-p": SamplingParams(temperature=1.2, top_p=0.6),
    "all": SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.02),
}


def race_of(params: SamplingParams, stream: Stream, tau: float, device: torch.device) -> Race:
    truncated = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    warp = [params.temperature, tau, params.top_p, params.min_p, params.top_k]
    length = torch.tensor([FILLED], dtype=torch.int32, device=device)
    key = torch.from_numpy(np.array([stream.key], np.uint64).view(np.int64)).to(device)
    return Race(length, key, torch.tensor(warp, device=device), params.temperature > 0, truncated)


@pytest.mark.parametrize("vocab", [70, 5000])
@pytest.mark.parametrize("name", WARPS)
def test_children_are_those_of_the_host(triton_device: torch.device, name: str, vocab: int) -> None:
    params, stream, tau = WARPS[name], Stream(2**63 + 12345), 0.7
    logits = 8 * torch.randn(3, vocab)  # so that truncation leaves fewer than the 64 tokens it looks at
    logits[1, 5] = logits[1, 69] = 40.0  # ties go to the lower id, within a block and across
    logits[2, 10:] = -torch.inf  # fewer tokens than children, almost
    view = View((0,) * (FILLED + 1), 1, chain := WarpChain(params, (0,)), chain.start(), stream, frozenset(), 20, vocab)
    ids, scores = view.best(logits.cpu(), [(0,) * LEVEL] * 3, 8, tau)
    found_ids, found = best_children(logits, race_of(params, stream, tau, triton_device), LEVEL, 8)
    found_ids, found = found_ids.cpu().numpy(), found.cpu().numpy()
    live = np.isfinite(scores)
    assert (np.isfinite(found) == live).all()
    # fp32 sums of 5000 exponentials in another order, and a division that need not round as IEEE's.
    np.testing.assert_allclose(found[live], scores[live], rtol=0, atol=2e-5)
    assert (found_ids == ids)[live].all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the logarithm of nothing
def test_rows_of_nan_have_no_children(triton_device: torch.device) -> None:
    logits = torch.full((1, 40), torch.nan)
    race = race_of(SamplingParams(temperature=1.0), Stream(1), 1.0, triton_device)
    _, scores = best_children(logits, race, 0, 3)
    assert not torch.isfinite(scores).any()


def host_tree(levels: list[dict[tuple[int, ...], tuple[list[int], list[float]]]], width: int, budget: Budget, stops):
    """The loop of ``drafters.eagle``, with children by path in place of a head."""
    tree, nodes, paths, depth = Tree(), [-1], {-1: ()}, budget.max_depth
    for level in range(depth):
        start = len(tree)
        for node in nodes:
            tree.expand(node, *levels[level][paths[node]])
        kept = rerank(tree.log_scores, budget)
        grown = frontier(tree, start, kept, width, stops) if level + 1 < depth else []
        if not grown:
            break
        for node in grown:
            paths[node] = (*paths[tree.parents[node]], tree.tokens[node])
        nodes = grown
    return assemble(tree, kept, "eagle")


class Children:
    """Children of every path, made when asked for: few distinct scores, so that many tie."""

    def __init__(self, count: int, seed: int, coarse: bool) -> None:
        self.count, self.seed, self.coarse = count, seed, coarse

    def __getitem__(self, path: tuple[int, ...]) -> tuple[list[int], list[float]]:
        rng = random.Random(f"{self.seed} {path}")
        scores = sorted((-rng.expovariate(1.0) for _ in range(self.count)), reverse=True)
        if self.coarse:
            scores = [round(2 * score) / 2 for score in scores]
        if rng.random() < 0.2:
            scores[-1] = -float("inf")
        return rng.sample(range(100), self.count), scores


def device_tree(children: Children, width: int, depth: int, budget: Budget, stops, device: torch.device) -> Draft:
    growth, capacity = Growth(width, children.count, depth, device), budget.max_nodes
    for garbage in (growth._candidates, growth._scores, growth.paths, growth._bases, growth._nodes):
        garbage.fill_(10**6)  # memory as a graph finds it
    record = torch.full((1 + 3 * capacity,), 77, dtype=torch.int32)
    limits = Limits(
        torch.tensor([budget.max_depth], dtype=torch.int32),
        torch.tensor([budget.price(k) for k in range(1, capacity + 1)], dtype=torch.float32),
        torch.tensor([*sorted(stops), -1], dtype=torch.int32),
    )
    paths: list[tuple[int, ...]] = [()]
    for level in range(depth):
        ids, scores = zip(*(children[path] for path in paths), strict=True)
        best = torch.tensor(ids, dtype=torch.int32), torch.tensor(scores, dtype=torch.float32)
        growth.grow(best, level, limits, record)
        if level + 1 < depth:
            rows, tokens, slots = growth.rows.tolist(), growth.tokens.tolist(), growth.paths.tolist()
            paths = [(*paths[row], token) for row, token in zip(rows, tokens, strict=True)]
            for i, path in enumerate(slots):
                assert path[level] == level * width + i
                assert all(step * width <= slot < (step + 1) * width for step, slot in enumerate(path[:level]))
    return PendingDraft(record, capacity, budget.max_depth, "eagle").resolve()


@pytest.mark.parametrize("seed", range(12))
def test_trees_are_those_of_the_host(triton_device: torch.device, seed: int) -> None:
    rng = random.Random(seed)
    count, width, depth = rng.randint(1, 6), rng.randint(1, 6), rng.randint(1, 5)
    children = Children(count, seed, coarse=seed % 2 == 0)
    most = count * (1 + (depth - 1) * width)
    budget = Budget(rng.randint(1, min(20, most)), rng.randint(1, depth), rng.choice([0.0, 0.03]))
    stops = frozenset(rng.sample(range(100), 5))
    expected = host_tree([children] * depth, width, budget, stops)
    found = device_tree(children, width, depth, budget, stops, triton_device)
    assert (found.tokens, found.parents, found.stages) == (expected.tokens, expected.parents, expected.stages)
    # Sums of up to five log-scores in fp32 here, in fp64 there.
    assert found.scores == pytest.approx(expected.scores, rel=1e-5)


def test_trees_that_are_not_worth_their_price_are_empty(triton_device: torch.device) -> None:
    budget = Budget(5, 3, min_score=1.0)
    assert device_tree(Children(3, 1, coarse=True), 3, 3, budget, (), triton_device) == EMPTY_DRAFT
