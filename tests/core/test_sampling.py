"""The warp chain: equal to transformers' where the semantics agree, pure, stable, and blind to a row's neighbours."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain, WarpState
from quantspec.core.truncation import truncate, truncate_for_draft
from quantspec.errors import ModelError, UsageError
from quantspec.kernels.cpu import library
from quantspec.types import SamplingParams

V = 300


def rows(seed: int, m: int = 8, size: int = V) -> torch.Tensor:
    return 3 * torch.randn(m, size, generator=torch.Generator().manual_seed(seed))


def chain(prompt: tuple[int, ...] = (1, 2, 3), stop_ids: frozenset[int] = frozenset(), **params) -> WarpChain:
    return WarpChain(SamplingParams(**{"temperature": 1.0, **params}), prompt, stop_ids)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize(
    "top_k, top_p, min_p", [(0, 0.9, 0), (20, 1.0, 0), (0, 1.0, 0.1), (30, 0.8, 0.02), (2, 0.99, 0.3)]
)
def test_truncation_equals_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    from transformers.generation import logits_process as hf

    logits = rows(1)
    expected = hf.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = hf.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = hf.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = hf.MinPLogitsWarper(min_p)(None, expected)
    c = chain(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert c.apply_rows([c.start()] * len(logits), logits).equal(expected)


def test_penalties_equal_transformers() -> None:
    from transformers.generation import logits_process as hf

    prompt, output, logits = (5, 6, 7, 5), (9, 5, 9, 11), rows(2, 1)
    c = chain(prompt, repetition_penalty=1.4)
    expected = hf.RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([[*prompt, *output]]), logits)
    assert c.apply(c.at(output), logits[0]).equal(expected[0])


def test_presence_and_frequency_cover_the_output_alone() -> None:
    c = chain((5, 6), presence_penalty=0.5, frequency_penalty=0.25)
    row = c.apply(c.at((6, 9, 9)), torch.zeros(12))
    assert row.nonzero().ravel().tolist() == [6, 9]
    assert row[[6, 9]].tolist() == [-0.75, -1.0]


def test_order_is_penalties_bias_masks_temperature_truncation() -> None:
    c = chain(
        (2,), frozenset({0}), repetition_penalty=2.0, logit_bias={2: 3.0, 0: 9.0}, min_new_tokens=1, temperature=0.5
    )
    assert c.apply(c.start(), torch.tensor([1.0, 1.0, -1.0])).tolist() == [-math.inf, 2.0, 2.0]
    assert c.apply(c.advance(c.start(), 1), torch.tensor([1.0, 1.0, -1.0])).tolist() == [20.0, 1.0, 2.0]
    greedy = chain(temperature=0.0, top_k=1, top_p=0.1, logit_bias={1: 0.5})
    assert greedy.apply(greedy.start(), torch.tensor([1.0, 1.0])).tolist() == [1.0, 1.5], (
        "no temperature, no truncation"
    )


def test_stop_tokens_are_masked_until_min_new_tokens() -> None:
    c = chain(stop_ids=frozenset({4, 7}), min_new_tokens=2)
    states = [c.at(output) for output in ((), (1,), (1, 2), (1, 2, 3))]
    masked = c.apply_rows(states, torch.zeros(4, 9)).isinf()
    assert masked.nonzero().tolist() == [[0, 4], [0, 7], [1, 4], [1, 7]]


def brute_truncate(row: np.ndarray, top_k: int, top_p: float, min_p: float) -> list[int]:
    """From the definition: rank by (-score, id), cut by rank, by mass and by ratio."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[: top_k or None]
    mass = [math.exp(float(row[i]) - float(row[order[0]])) for i in order]
    kept, before = [], 0.0
    for i, p in zip(order, mass, strict=True):
        if (top_p == 1 or before < top_p * sum(mass)) and p >= min_p:
            kept.append(i)
        before += p
    return sorted(kept)


def test_truncation_is_stable_by_id_and_finds_long_prefixes() -> None:
    """Rows full of ties, flat rows (kept sets longer than any sorted prefix tried first) and peaked ones."""
    pick = np.random.default_rng(0)
    for size, scale in itertools.product((1, 7, 130, 1500), (0.0, 0.5, 3.0)):
        logits = np.round(scale * pick.standard_normal((4, size)), 1).astype(np.float32)
        for top_k, top_p, min_p in ((0, 0.83, 0), (5, 1.0, 0), (0, 1.0, 0.13), (200, 0.97, 0.01), (0, 0.997, 0)):
            kept = truncate(logits, top_k, top_p, min_p)
            for row, ids in zip(logits, np.split(kept.ids, kept.count.cumsum()[:-1]), strict=True):
                assert ids.tolist() == brute_truncate(row, top_k, top_p, min_p)


def test_truncation_for_drafts_differs_at_the_cut_alone() -> None:
    if library.usable() is not None:
        pytest.skip("no native library here")
    pick = np.random.default_rng(1)
    for size, scale in itertools.product((1, 7, 130, 4099), (0.5, 3.0)):
        logits = (scale * pick.standard_normal((5, size))).astype(np.float32)
        for top_p, min_p in ((0.5, 0), (0.95, 0), (1.0, 0.05), (0.9, 0.02), (1.0, 1e-12)):
            exact, rough = (cut(logits, 0, top_p, min_p) for cut in (truncate, truncate_for_draft))
            ends = zip(exact.count.cumsum(), rough.count.cumsum(), strict=True)
            for row, (a, b), m, n in zip(logits, ends, exact.count, rough.count, strict=True):
                kept = rough.ids[b - n : b]
                assert np.array_equal(row[kept], rough.values[b - n : b])
                missed = np.setdiff1d(exact.ids[a - m : a], kept)
                more = np.setdiff1d(kept, exact.ids[a - m : a])
                # The cut is found to 0.005 in the logarithm; sums in fp32 move it by less.
                edge = row[exact.ids[a - m : a]].min()
                assert np.abs(row[np.append(missed, more)] - edge).max(initial=0) < 0.01


PARAMETERS = [
    {},
    {"temperature": 0.0},
    {"top_p": 0.9, "temperature": 0.8},
    {"top_k": 40, "min_p": 0.02},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": {3: 1.0}, "min_new_tokens": 2, "top_p": 0.7},
]


@pytest.mark.parametrize("params", PARAMETERS)
@pytest.mark.parametrize("size", [5, 259, 4099])
def test_a_row_is_the_same_in_any_company(params: dict, size: int) -> None:
    c = chain(stop_ids=frozenset({0}), **params)
    pick = random.Random(size)
    logits = rows(size, 33, size)
    states = [c.at([pick.randrange(size) for _ in range(i % 5)]) for i in range(33)]
    whole = c.apply_rows(states, logits)
    for first, last in ((0, 1), (1, 3), (4, 9), (9, 33)):
        part = c.apply_rows(states[first:last], logits[first:last])
        assert part.equal(whole[first:last])
    positions = [pick.randrange(3, 7) for _ in states]
    y = c.draw(whole, positions, Stream(1))
    assert y == c.sample(states, logits, positions, Stream(1)), "the short way gives the same tokens"
    assert y == [
        c.sample([s], row[None], [t], Stream(1))[0] for s, row, t in zip(states, logits, positions, strict=True)
    ]
    assert all(whole[i, token] > -math.inf for i, token in enumerate(y))


@pytest.mark.parametrize("params", PARAMETERS)
def test_purity(params: dict) -> None:
    c = chain(stop_ids=frozenset({0}), **params)
    logits = rows(3)
    original = logits.clone()
    state = c.at((5, 6))
    before = c.apply(state, logits[0])
    branches = [c.advance(state, token) for token in (5, 8, 9)]
    c.apply_rows([state, *branches], logits[:4])
    assert c.apply(state, logits[0]).equal(before)
    assert logits.equal(original)
    assert isinstance(state, WarpState)


def test_states_put_together_in_different_ways_agree_bit_for_bit() -> None:
    c = chain((1, 2, 200), repetition_penalty=1.3, presence_penalty=0.1, frequency_penalty=0.7)
    pick = random.Random(4)
    output = [pick.randrange(60) for _ in range(100)]
    stepwise = settled = c.start()
    for i, token in enumerate(output):
        stepwise = c.advance(stepwise, token)
        settled = c.settle(c.advance(settled, token), output[: i + 1])
    assert len(settled.recent) <= 33
    row = rows(5, 1)[0]
    assert c.apply(stepwise, row).equal(c.apply(settled, row))
    assert c.apply(stepwise, row).equal(c.apply(c.at(output), row))


def test_greedy_ties_go_to_the_lowest_id() -> None:
    c = chain(temperature=0.0)
    logits = torch.zeros(2, 9)
    logits[1, [7, 4]] = 1.0
    assert c.sample([c.start()] * 2, logits, [5, 5], Stream(0)) == [0, 4]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}])
@pytest.mark.parametrize("bad", [math.nan, math.inf, "excluded"])
def test_bad_rows_are_an_error_not_a_token(params: dict, bad: float | str) -> None:
    c = chain(**params)
    logits = rows(6, 2)
    logits[1] = -math.inf if bad == "excluded" else logits[1]
    if bad != "excluded":
        logits[1, 3] = bad
    with pytest.raises(ModelError, match="no finite maximum"):
        c.sample([c.start()] * 2, logits, [0, 1], Stream(0))


def test_unknown_ids_are_refused() -> None:
    for params, stop_ids in (
        ({"logit_bias": {V: 1.0}}, frozenset()),
        ({"logit_bias": {-1: 1.0}}, frozenset()),
        ({}, {V}),
    ):
        with pytest.raises(UsageError, match=f"tokens are 0 to {V - 1}"):
            chain(stop_ids=frozenset(stop_ids), **params).check(V)
