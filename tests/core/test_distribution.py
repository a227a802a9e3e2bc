"""Sampled text follows the exact warped distribution: chi-square over many seeds, for plain and speculative
decoding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest
from table_model import TableModel, target_token

from quantspec.core.drafter import Drafter, NoDrafter, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.step import step
from quantspec.core.verify import Verifier
from quantspec.types import Budget, Draft, SamplingParams

DRAWS = 10_000
PROMPT = (3, 1)
PARAMS = SamplingParams(max_new_tokens=2, temperature=0.8, top_k=12, top_p=0.95, repetition_penalty=1.2)
FALSE_ALARM = 1e-6
"""How often a perfect sampler would fail one of these tests, over the choice of seeds. They are fixed, so it does not
flicker."""


def exact_row(model: TableModel, path: tuple[int, ...]) -> np.ndarray:
    """The warped distribution in float64, by a full sort, written from the definition."""
    logits = model.row(path).double().numpy()
    seen = sorted(set(path))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.2, logits[seen] * 1.2)
    logits /= PARAMS.temperature
    order = np.argsort(-logits, kind="stable")[: PARAMS.top_k]
    p = np.exp(logits[order] - logits[order[0]])
    p /= p.sum()
    kept = np.cumsum(p) - p < PARAMS.top_p
    result = np.zeros(len(logits))
    result[order[kept]] = p[kept] / p[kept].sum()
    return result


def sampled(model: TableModel, drafter: Drafter, draws: int = DRAWS, rule: str = "exact") -> Counter[tuple[int, ...]]:
    """Texts of two tokens for seeds from 0 to draws - 1, in batches."""
    verifier = Verifier(model, rule=rule)
    chain = WarpChain(PARAMS, PROMPT)
    texts: Counter[tuple[int, ...]] = Counter()
    for first in range(0, draws, 100):
        sessions = [
            verifier.open(PROMPT, chain, Stream.of(PROMPT, 0, seed), max_new_tokens=2)
            for seed in range(first, first + 100)
        ]
        running = sessions
        while running:
            step(running, [None] * len(running), drafter, verifier, [Budget(8, 1)] * len(running), notice=pytest.fail)
            running = [session for session in running if session.finish is None]
        texts.update(tuple(session.tokens[2:]) for session in sessions)
    return texts


class HalfKnowing(NoDrafter):
    """Two siblings: at every other position one of them is the target's own token, which the noise gives away."""

    def __init__(self, model: TableModel) -> None:
        self.model = model

    def propose(self, states: Sequence[None], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        return [self._siblings(view) if view.remaining > 1 else Draft() for view in views]

    def _siblings(self, view: View) -> Draft:
        guess = view.stream.key % self.model.vocab_size
        known = target_token(self.model, view, ()) if view.stream.key % 2 else (guess + 3) % self.model.vocab_size
        return Draft((guess, known), (-1, -1), (0.5, 0.5), ("draft", "draft"))


class DrawingDrafter(NoDrafter):
    """Draws one token from another model's warped distribution q with its own coins, for the ratio rule."""

    def __init__(self, model: TableModel) -> None:
        self.model = model

    def propose(self, states: Sequence[None], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        drafts = []
        for view in views:
            assert view.stream is None, "under the ratio rule a drafter sees no noise"
            if view.remaining < 2:
                drafts.append(Draft())
                continue
            warped = view.chain.apply(view.state, self.model.row(view.tokens))[None]
            token = view.chain.draw(warped, [len(view.tokens)], view.draft_stream)
            drafts.append(Draft.chain(token, [1.0], ["draft"], warped.softmax(-1)))
        return drafts


def check(model: TableModel, texts: Counter[tuple[int, ...]]) -> None:
    expected = {}
    for first, p in enumerate(exact_row(model, PROMPT)):
        if p > 0:
            for second, q in enumerate(exact_row(model, (*PROMPT, first))):
                expected[first, second] = p * q * sum(texts.values())
    assert not [text for text in texts if expected.get(text, 0) == 0], "a text outside the distribution's support"
    rare = [text for text in expected if expected[text] < 5]  # too rare for the approximation: one cell together
    cells = [(texts[text], expected[text]) for text in expected if text not in rare]
    cells.append((sum(texts[text] for text in rare), sum(expected[text] for text in rare)))
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in cells if wanted > 0)
    degrees = len(cells) - 1
    z = NormalDist().inv_cdf(1 - FALSE_ALARM)
    # Wilson and Hilferty's approximation of the chi-square quantile
    assert statistic < degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def test_plain_text_follows_the_distribution() -> None:
    model = TableModel(16, 7, scale=1.5)
    check(model, sampled(model, NoDrafter()))


def test_speculative_text_follows_the_distribution() -> None:
    model = TableModel(16, 7, scale=1.5)
    check(model, sampled(model, HalfKnowing(model)))


def test_text_under_the_ratio_rule_follows_the_distribution() -> None:
    model, other = TableModel(16, 7, scale=1.5), TableModel(16, 7, scale=1.5, blur=1.0)
    check(model, sampled(model, DrawingDrafter(other), DRAWS // 4, "ratio"))


def test_the_check_has_power() -> None:
    """Draws from a somewhat different model are caught."""
    model = TableModel(16, 7, scale=1.5)
    with pytest.raises(AssertionError):
        check(model, sampled(TableModel(16, 7, scale=1.5, blur=0.3), NoDrafter(), DRAWS // 8))
