"""A draft tree that grows on the device: each node's best children by the keyed race, then one launch per level.

Nothing here waits for the device and every shape is fixed, so that a whole draft can be one CUDA graph. What a draft is
changes speed alone, so truncation is done on the best 64 tokens of a row. References: ``core.drafter.View.best`` and
``quantspec.drafters.tree``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantspec.kernels.triton.rows import check_layout
from quantspec.kernels.triton.sampling import _log_exponential

MOST_KEPT = 64
"""Tokens of a row that truncation looks at."""
_BLOCK = 2048
_PART = 16  # candidates that all others are compared with at a time: bounds registers


@dataclass(frozen=True, slots=True)
class Race:
    """How one sequence's draws are warped, on the device.

    ``length [1]`` int32: slots of the head that hold true features, one less than the committed tokens; ``key [1]``
    int64: the bits of a ``core.noise.Stream``'s; ``warp [5]`` fp32: temperature, tau, top-p, min-p, top-k (0 is off).
    """

    length: Tensor
    key: Tensor
    warp: Tensor
    noisy: bool
    truncated: bool


@triton.jit(do_not_specialize=["level"])
def _best_of_blocks(
    logits: tl.tensor, length: tl.tensor, key: tl.tensor, warp: tl.tensor,
    values: tl.tensor, tokens: tl.tensor, maxima: tl.tensor, sums: tl.tensor, level: tl.tensor,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, WARM: tl.constexpr, NOISE: tl.constexpr,
) -> None:  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    token = block * BLOCK + lane
    score = tl.load(logits + row * VOCAB + token, mask=token < VOCAB, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))
    if WARM:
        score /= tl.load(warp)
    if NOISE:
        t = (tl.load(length) + 1 + level).to(tl.uint64)
        score -= _log_exponential(tl.load(key).to(tl.uint64, bitcast=True), t, token)
    if NOISE or not WARM:  # a truncated row's maximum and sum are those of its probabilities
        score /= tl.load(warp + 1)
    part = row * tl.num_programs(1) + block
    best = tl.max(score, 0)
    tl.store(maxima + part, best)
    tl.store(sums + part, tl.sum(tl.exp(score - tl.where(best == float("-inf"), 0.0, best)), 0))
    for i in tl.static_range(K):
        value, place = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(values + part * K + i, value)
        tl.store(tokens + part * K + i, block * BLOCK + place)
        score = tl.where(lane == place, float("-inf"), score)


@triton.jit
def _log_total(maxima: tl.tensor, sums: tl.tensor, BLOCKS: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """Log of the row's sum of exponentials, from that of its blocks."""
    row, block = tl.program_id(0), tl.arange(0, PADDED)
    inside = block < BLOCKS
    theirs = tl.load(maxima + row * BLOCKS + block, mask=inside, other=float("-inf"))
    best = tl.max(theirs, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    mass = tl.load(sums + row * BLOCKS + block, mask=inside, other=0.0) * tl.exp(theirs - base)
    return base + tl.log(tl.sum(mass, 0))


@triton.jit
def _store_best(
    score: tl.tensor, token: tl.tensor, log_total: tl.tensor, best_tokens: tl.tensor, best_scores: tl.tensor,
    SIZE: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    lane, row = tl.arange(0, SIZE), tl.program_id(0)
    for i in tl.static_range(K):
        value, place = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(best_tokens + row * K + i, tl.sum(tl.where(lane == place, token, 0), 0))
        tl.store(best_scores + row * K + i, value - log_total)
        score = tl.where(lane == place, float("-inf"), score)


@triton.jit
def _best_of_row(
    values: tl.tensor, tokens: tl.tensor, maxima: tl.tensor, sums: tl.tensor, best_tokens: tl.tensor,
    best_scores: tl.tensor, BLOCKS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    lane, start = tl.arange(0, SIZE), tl.program_id(0) * BLOCKS * K
    score = tl.load(values + start + lane, mask=lane < BLOCKS * K, other=float("-inf"))
    token = tl.load(tokens + start + lane, mask=lane < BLOCKS * K, other=0)
    _store_best(score, token, _log_total(maxima, sums, BLOCKS, PADDED), best_tokens, best_scores, SIZE, K)


@triton.jit(do_not_specialize=["level"])
def _best_of_kept(
    top: tl.tensor, ids: tl.tensor, maxima: tl.tensor, sums: tl.tensor, length: tl.tensor, key: tl.tensor,
    warp: tl.tensor, best_tokens: tl.tensor, best_scores: tl.tensor, level: tl.tensor, top_count: int,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    """Top-k, top-p and min-p on a row's largest logits, in descending order; then the race of what they leave."""
    lane, start = tl.arange(0, SIZE), tl.program_id(0) * top_count
    inside = lane < top_count
    score = tl.load(top + start + lane, mask=inside, other=float("-inf")) / tl.load(warp)
    score = tl.where(score == score, score, float("-inf"))
    token = tl.load(ids + start + lane, mask=inside, other=0).to(tl.int32)
    tau, top_p, min_p, top_k = tl.load(warp + 1), tl.load(warp + 2), tl.load(warp + 3), tl.load(warp + 4)
    best = tl.max(score, 0)
    mass = tl.exp(score - tl.where(best == float("-inf"), 0.0, best))
    kept = inside & (lane < tl.where(top_k == 0, SIZE, top_k))
    whole = tl.exp(_log_total(maxima, sums, BLOCKS, PADDED) - best)
    whole = tl.where((top_k == 0) | (top_k > SIZE), whole, tl.sum(tl.where(kept, mass, 0.0), 0))
    most = tl.where(top_p >= 1, float("inf"), top_p * whole)
    kept &= (tl.cumsum(mass, 0) - mass < most) & (mass >= min_p)
    t = (tl.load(length) + 1 + level).to(tl.uint64)
    score = (score - _log_exponential(tl.load(key).to(tl.uint64, bitcast=True), t, token)) / tau
    score = tl.where(kept, score, float("-inf"))
    best = tl.max(score, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    _store_best(score, token, base + tl.log(tl.sum(tl.exp(score - base), 0)), best_tokens, best_scores, SIZE, K)


def best_children(logits: Tensor, race: Race, level: int, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` tokens most likely to be drawn after each of the nodes at depth ``level``: ids (int32) and log scores
    (fp32), both ``[m, k]``, best first, of fp32 logits ``[m, V]``. Scores are those of ``View.best``; -inf where fewer
    tokens can be drawn. A NaN counts as -inf."""
    m, vocab = logits.shape
    assert logits.dtype == torch.float32, "logits are fp32"
    assert 0 < k <= min(vocab, MOST_KEPT), "more children than there are tokens to choose from"
    assert race.noisy or not race.truncated, "greedy drafts are not truncated"
    check_layout(logits, race.length, race.key, race.warp)
    blocks, first = triton.cdiv(vocab, _BLOCK), 1 if race.truncated else k
    values, tokens = logits.new_empty(m, blocks, first), logits.new_empty(m, blocks, first, dtype=torch.int32)
    maxima, sums = logits.new_empty(m, blocks), logits.new_empty(m, blocks)
    best_tokens, best_scores = logits.new_empty(m, k, dtype=torch.int32), logits.new_empty(m, k)
    padded = triton.next_power_of_2(blocks)
    _best_of_blocks[m, blocks](
        logits, race.length, race.key, race.warp, values, tokens, maxima, sums, level,
        vocab, min(_BLOCK, triton.next_power_of_2(vocab)), first, race.noisy, race.noisy and not race.truncated,
    )  # fmt: skip
    if race.truncated:
        top, ids = logits.topk(count := min(MOST_KEPT, vocab))
        _best_of_kept[m,](
            top, ids, maxima, sums, race.length, race.key, race.warp, best_tokens, best_scores, level, count,
            blocks, padded, MOST_KEPT, k, num_warps=1,
        )  # fmt: skip
    else:
        size = triton.next_power_of_2(blocks * k)
        _best_of_row[m,](values, tokens, maxima, sums, best_tokens, best_scores, blocks, padded, size, k)
    return best_tokens, best_scores


@triton.jit
def _write_record(
    kept: tl.tensor, score: tl.tensor, token: tl.tensor, node: tl.tensor, parents: tl.tensor, order: tl.tensor,
    record: tl.tensor, CAPACITY: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """The kept nodes, numbered anew, as a ``PendingDraft``'s record."""
    number = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(order + node, number)
    tl.debug_barrier()
    parent = tl.load(parents + node, mask=kept, other=-1)
    parent = tl.load(order + parent, mask=kept & (parent >= 0), other=-1)
    total, place = tl.sum(kept.to(tl.int32), 0), tl.arange(0, SIZE)
    empty = (place >= total) & (place < CAPACITY)
    at = record + 1
    tl.store(record, total)
    tl.store(at + place, 0, mask=empty)
    tl.store(at + CAPACITY + place, -1, mask=empty)
    tl.store(at + 2 * CAPACITY + place, 0, mask=empty)
    tl.store(at + number, token, mask=kept)
    tl.store(at + CAPACITY + number, parent, mask=kept)
    tl.store(at + 2 * CAPACITY + number, tl.exp(score).to(tl.int32, bitcast=True), mask=kept)


@triton.jit
def _choose_frontier(
    growing: tl.tensor, rank: tl.tensor, node: tl.tensor, i: tl.tensor, new: tl.tensor, row: tl.tensor,
    tokens: tl.tensor, scores: tl.tensor, order: tl.tensor, nodes: tl.tensor, bases: tl.tensor, paths: tl.tensor,
    rows: tl.tensor, next_tokens: tl.tensor, level: tl.tensor, start: tl.tensor, end: tl.tensor,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, SIZE: tl.constexpr, LEVEL: tl.constexpr, SLOTS: tl.constexpr,
    STEPS: tl.constexpr, PART: tl.constexpr,
) -> None:  # fmt: skip
    """The ``WIDTH`` best of the ``growing`` nodes of the newest level, with the paths that they attend."""
    tl.store(order + node, tl.where(growing, rank, SIZE))
    tl.debug_barrier()
    mine, better = tl.load(order + start + i, mask=new, other=SIZE), tl.zeros([LEVEL], tl.int32)
    for first in range(start, end, PART):
        other = first + tl.arange(0, PART)
        theirs = tl.load(order + other, mask=other < end, other=SIZE)
        better += tl.sum((theirs[None, :] < mine[:, None]).to(tl.int32), 1)
    chosen = (mine < SIZE) & (better < WIDTH)
    slot, total = tl.cumsum(chosen.to(tl.int32), 0) - 1, tl.sum(chosen.to(tl.int32), 0)
    step, place = tl.arange(0, STEPS), tl.arange(0, SLOTS)
    taken = chosen[:, None] & (step < level)[None, :]
    path = tl.load(paths + row[:, None] * DEPTH + step[None, :], mask=taken, other=0)
    path = tl.where((step == level)[None, :], level * WIDTH + slot[:, None], path)
    grown, token = tl.load(scores + start + i, mask=chosen), tl.load(tokens + start + i, mask=chosen)
    tl.debug_barrier()
    tl.store(paths + slot[:, None] * DEPTH + step[None, :], path, mask=chosen[:, None] & (step <= level)[None, :])
    tl.store(bases + slot, grown, mask=chosen)
    tl.store(nodes + slot, start + i, mask=chosen)
    tl.store(rows + slot, row, mask=chosen)
    tl.store(next_tokens + slot, token, mask=chosen)
    # Rows without a node go through the layers too: they need a path, and their children are worth nothing.
    idle = (place >= total) & (place < WIDTH)
    own = step[None, :] * WIDTH + place[:, None]
    tl.store(paths + place[:, None] * DEPTH + step[None, :], own, mask=idle[:, None] & (step <= level)[None, :])
    tl.store(bases + place, float("-inf"), mask=idle)
    tl.store(nodes + place, -1, mask=idle)
    tl.store(rows + place, 0, mask=idle)
    tl.store(next_tokens + place, 0, mask=idle)


@triton.jit(do_not_specialize=["level", "start", "count"])
def _grow(
    best_tokens: tl.tensor, best_scores: tl.tensor, tokens: tl.tensor, parents: tl.tensor, scores: tl.tensor,
    order: tl.tensor, nodes: tl.tensor, bases: tl.tensor, paths: tl.tensor, rows: tl.tensor, next_tokens: tl.tensor,
    max_depth: tl.tensor, prices: tl.tensor, stops: tl.tensor, record: tl.tensor,
    level: tl.tensor, start: tl.tensor, count: tl.tensor,
    K: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, CAPACITY: tl.constexpr, STOPS: tl.constexpr,
    SIZE: tl.constexpr, LEVEL: tl.constexpr, SLOTS: tl.constexpr, STEPS: tl.constexpr, PART: tl.constexpr,
    LAST: tl.constexpr,
) -> None:  # fmt: skip
    """One program: candidates ``start ..`` are the children of the frontier; what is kept of all of them; and of those
    the next frontier or, at the last level, the record. Barriers stand where threads read what others have written."""
    i, end = tl.arange(0, LEVEL), start + count
    new, row = i < count, i // K
    base = tl.load(bases + row, mask=new & (level > 0), other=0.0)
    # A log-softmax may round to just above 0; a child must never outrank its parent.
    score = base + tl.minimum(tl.load(best_scores + i, mask=new, other=0.0), 0.0)
    score = tl.where((score == score) & (level < tl.load(max_depth)), score, float("-inf"))
    tl.store(scores + start + i, score, mask=new)
    tl.store(tokens + start + i, tl.load(best_tokens + i, mask=new, other=0), mask=new)
    tl.store(parents + start + i, tl.load(nodes + row, mask=new & (level > 0), other=-1), mask=new)
    tl.debug_barrier()

    node = tl.arange(0, SIZE)
    there = node < end
    score, token = tl.load(scores + node, mask=there, other=float("-inf")), tl.load(tokens + node, mask=there, other=0)
    rank = tl.zeros([SIZE], tl.int32)
    for first in range(0, end, PART):
        other = first + tl.arange(0, PART)
        theirs = tl.load(scores + other, mask=other < end, other=float("-inf"))[None, :]
        ahead = (theirs > score[:, None]) | ((theirs == score[:, None]) & (other[None, :] < node[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    price = tl.load(prices + rank, mask=there & (rank < CAPACITY), other=float("inf"))
    kept = there & (rank < tl.min(tl.where(tl.exp(score) > price, SIZE, rank), 0))

    if LAST:
        _write_record(kept, score, token, node, parents, order, record, CAPACITY, SIZE)
    else:
        growing = kept & (node >= start)
        for s in tl.static_range(STOPS):
            growing &= token != tl.load(stops + s)
        _choose_frontier(
            growing, rank, node, i, new, row, tokens, scores, order, nodes, bases, paths, rows, next_tokens, level,
            start, end, WIDTH, DEPTH, SIZE, LEVEL, SLOTS, STEPS, PART,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a tree, on the device.

    ``max_depth [1]`` int32; ``prices [capacity]`` fp32: the k-th best node is kept while its score exceeds the k-th
    price; ``stops`` int32: tokens after which nothing follows (-1: none).
    """

    max_depth: Tensor
    prices: Tensor
    stops: Tensor


class Growth:
    """The dynamic tree of EAGLE-2 (arXiv 2406.16858), ``width`` nodes a level, each with ``children``.

    After ``grow`` at any level but the last: ``tokens [width]`` of the next frontier; ``rows [width]``, which rows of
    this level they are children of; and ``paths [width, depth]``: node j of level l is number ``l * width + j``, and
    row i attends the first ``level + 1`` of its path. Rows past the frontier hold token 0, below row 0.
    """

    def __init__(self, width: int, children: int, depth: int, device: torch.device) -> None:
        self.width, self.children, self.depth = width, children, depth
        size = children * (1 + (depth - 1) * width)
        self._size = triton.next_power_of_2(max(size, 16))
        self._candidates = torch.empty(4, self._size, dtype=torch.int32, device=device)
        self._scores = torch.empty(self._size, device=device)
        self._nodes, self.tokens, self.rows = (torch.empty(width, dtype=torch.int32, device=device) for _ in range(3))
        self._bases = torch.empty(width, device=device)
        self.paths = torch.empty(width, depth, dtype=torch.int32, device=device)

    def grow(self, best: tuple[Tensor, Tensor], level: int, limits: Limits, record: Tensor) -> None:
        """Take the children of level ``level`` (from 0; ``best_children``), ``[1 or width, children]``. The last level
        writes ``record`` (see ``types.PendingDraft``)."""
        tokens, scores = best
        capacity, stops = limits.prices.shape[0], limits.stops.shape[0]
        assert tokens.shape == scores.shape == (self.width if level else 1, self.children), "children of each row"
        assert record.shape == (1 + 3 * capacity,), "a record of another capacity"
        assert 0 <= level < self.depth
        assert capacity <= self._size, "a record of more nodes than there are candidates"
        start = self.children * (1 + (level - 1) * self.width) if level else 0
        most = self.width * self.children
        _grow[1,](
            tokens, scores, self._candidates[0], self._candidates[1], self._scores, self._candidates[2], self._nodes,
            self._bases, self.paths, self.rows, self.tokens, limits.max_depth, limits.prices, limits.stops, record,
            level, start, tokens.numel(), self.children, self.width, self.depth, capacity, stops,
            self._size, triton.next_power_of_2(most), triton.next_power_of_2(self.width),
            triton.next_power_of_2(self.depth), _PART, level == self.depth - 1, num_warps=8,
        )  # fmt: skip
