"""Exhaustive enumeration: the text's distribution under speculation equals plain decoding's, to the last digit.

Probabilities are multiples of 1/D and the noise of a position is one of D equally likely outcomes, from which every
path reads its token through its own permutation. Running the real step over *all* outcomes gives each text's
probability as a fraction, and the total variation distance to the product of the model's probabilities must be exactly
0.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from table_model import TableModel

from quantspec.core.drafter import Drafter, NoDrafter, View
from quantspec.core.race import DenseRace
from quantspec.core.sampling import WarpChain, WarpState
from quantspec.core.session import Session
from quantspec.core.step import step
from quantspec.core.verify import Verifier
from quantspec.drafters.cascade import Cascade
from quantspec.drafters.config import CascadeOptions
from quantspec.types import Budget, Draft, SamplingParams

D, VOCAB, NEW, PROMPT = 4, 3, 3, (0,)


class RationalModel(TableModel):
    """A row holds the numerators of probabilities over D, and a number that names its permutation, hidden in a
    fraction.

    ``agrees_with`` makes it answer like another model on every path but some."""

    def __init__(self, seed: int, agrees_with: RationalModel | None = None) -> None:
        super().__init__(VOCAB, seed)
        self.agrees_with = agrees_with

    def row(self, path: Sequence[int]) -> torch.Tensor:
        pick = random.Random(f"{self.seed} {tuple(path)}")
        if self.agrees_with and pick.random() < 0.7:
            return self.agrees_with.row(path)
        cuts = sorted(pick.choices(range(D + 1), k=VOCAB - 1))
        numerators = np.diff([0, *cuts, D])
        return torch.tensor(numerators, dtype=torch.float32) + pick.randrange(100) / 256

    def probability(self, path: Sequence[int], token: int) -> Fraction:
        return Fraction(int(self.row(path)[token]), D)


class FiniteNoise:
    """Stands for ``Stream``: outcome ``omega[i]`` of D at the i-th drawn position. The continuous noise is switched
    off."""

    def __init__(self, omega: Sequence[int]) -> None:
        self.omega = omega

    def outcome(self, t: int) -> int:
        return self.omega[t - len(PROMPT)] if t - len(PROMPT) < NEW else 0

    def noise(self, t: int, vocab_size: int) -> np.ndarray:
        return np.zeros(vocab_size, np.float32)


class FiniteRace(DenseRace):
    """``best`` is that of the probabilities, without noise."""

    def __init__(self, rows: np.ndarray, y: list[int]) -> None:
        super().__init__(rows)
        self.y = y

    def argmax(self) -> list[int]:
        return self.y


class FiniteChain(WarpChain):
    """Reads a token off the outcome: the row's tokens, each as often as its numerator, in the row's own order."""

    def apply_rows(self, states: Sequence[WarpState], logits: torch.Tensor) -> torch.Tensor:
        return logits.floor().log()

    def race(self, states, logits: torch.Tensor, positions: Sequence[int], stream, exact: bool = True) -> FiniteRace:
        result = []
        for row, t in zip(logits, positions, strict=True):
            tokens = [token for token in range(VOCAB) for _ in range(int(row[token]))]
            random.Random(round(float(row[0] % 1) * 256)).shuffle(tokens)
            result.append(tokens[stream.outcome(t)])
        return FiniteRace(self.apply_rows(states, logits).numpy(), result)


def distribution(model: RationalModel, make_drafter: Callable[[], Drafter]) -> tuple[dict[tuple, Fraction], int]:
    """Probability of every text of NEW tokens, and how many draft tokens were accepted on the way."""
    texts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for omega in itertools.product(range(D), repeat=NEW):
        drafter, verifier = make_drafter(), Verifier(model)
        chain = FiniteChain(SamplingParams(temperature=1.0, max_new_tokens=NEW), PROMPT)
        session = verifier.open(PROMPT, chain, FiniteNoise(omega), frozenset(), NEW)
        state = drafter.open(session.view())
        while session.finish is None:
            (verdict,) = step([session], [state], drafter, verifier, [Budget(20, NEW)], notice=pytest.fail)
            accepted += len(verdict.path)
        texts[tuple(session.tokens[len(PROMPT) :])] += 1
    return {text: Fraction(count, D**NEW) for text, count in texts.items()}, accepted


def total_variation(model: RationalModel, found: dict[tuple, Fraction]) -> Fraction:
    distance = Fraction(0)
    for text in itertools.product(range(VOCAB), repeat=NEW):
        p = Fraction(1)
        for i, token in enumerate(text):
            p *= model.probability((*PROMPT, *text[:i]), token)
        distance += abs(found.get(text, Fraction(0)) - p)
    return distance / 2


class Proposer(NoDrafter):
    """Drafts what ``tree(view)`` says: ``(tokens, parents)``."""

    def __init__(self, tree: Callable[[View], tuple[Sequence[int], Sequence[int]]]) -> None:
        self.tree = tree

    def propose(self, states: Sequence[None], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        drafts = []
        for tokens, parents in map(self.tree, views):
            n = len(tokens)
            drafts.append(Draft(tuple(tokens), tuple(parents), (1.0,) * n, ("draft",) * n))
        return drafts


def chain_of(model: RationalModel, view: View) -> tuple[list[int], range]:
    """The tokens that ``model`` itself would draw with the target's noise."""
    tokens: list[int] = []
    for i in range(NEW):
        row = model.row((*view.tokens, *tokens))[None]
        tokens += view.chain.sample([view.state], row, [len(view.tokens) + i], view.stream)
    return tokens, range(-1, NEW - 1)


def proposers(model: RationalModel) -> dict[str, Callable[[View], tuple[Sequence[int], Sequence[int]]]]:
    other = RationalModel(99, agrees_with=model)

    def fixed_tree(view: View) -> tuple[Sequence[int], Sequence[int]]:
        return (0, 1, 2, 0, 1, 2), (-1, -1, 0, 1, 1, 4)

    def duplicate_siblings(view: View) -> tuple[Sequence[int], Sequence[int]]:
        return (1, 1, 0, 2, 1, 1, 0), (-1, -1, 0, 1, -1, 2, 2)

    def text_dependent(view: View) -> tuple[Sequence[int], Sequence[int]]:
        pick = random.Random(str(view.tokens))
        n = pick.randrange(6)
        return [pick.randrange(VOCAB) for _ in range(n)], [pick.randrange(-1, i) for i in range(n)]

    def knows(view: View) -> tuple[Sequence[int], Sequence[int]]:
        return chain_of(model, view)

    def avoids(view: View) -> tuple[Sequence[int], Sequence[int]]:
        """Hostile: knows the target's tokens and offers all others."""
        tokens, _ = chain_of(model, view)
        return [(tokens[0] + 1) % VOCAB, (tokens[0] + 2) % VOCAB], [-1, -1]

    def knows_sometimes(view: View) -> tuple[Sequence[int], Sequence[int]]:
        """Hostile: shows what it knows only when the noise favours token 0, else a wrong token."""
        tokens, parents = chain_of(model, view)
        return (tokens, parents) if tokens[0] == 0 else ([(tokens[0] + 1) % VOCAB], [-1])

    def coupled(view: View) -> tuple[Sequence[int], Sequence[int]]:
        return chain_of(other, view)

    trees = (fixed_tree, duplicate_siblings, text_dependent, knows, avoids, knows_sometimes, coupled)
    return {tree.__name__: tree for tree in trees}


@pytest.mark.parametrize("name", ["none", *proposers(RationalModel(0))])
def test_total_variation_is_zero(name: str) -> None:
    model = RationalModel(5)
    found, accepted = distribution(model, lambda: NoDrafter() if name == "none" else Proposer(proposers(model)[name]))
    assert total_variation(model, found) == 0
    assert (accepted == 0) == (name in ("none", "avoids"))


@pytest.mark.parametrize("inner", ["none", "knows", "duplicate_siblings"])
@pytest.mark.parametrize("levels", [1, 2])
def test_total_variation_is_zero_for_cascades_that_share_the_noise(inner: str, levels: int) -> None:
    model = RationalModel(5)

    def nested() -> Drafter:
        drafter: Drafter = NoDrafter() if inner == "none" else Proposer(proposers(model)[inner])
        for level in range(levels):
            between = RationalModel(50 + level, agrees_with=model)
            drafter = Cascade(drafter, Verifier(between, stage=f"level {level}"), CascadeOptions(min_draft=2))
        return drafter

    found, accepted = distribution(model, nested)
    assert total_variation(model, found) == 0
    assert accepted > 0


def test_the_check_finds_a_wrong_rule() -> None:
    """Power: a verifier that also accepts a draft token 0 where the target drew another is caught."""
    model = RationalModel(5)

    class Lax(Verifier):
        def verify(self, sessions: Sequence[Session], drafts: Sequence[Draft], needs) -> list:
            verdicts = super().verify(sessions, drafts, needs)
            return [
                verdict
                if verdict.path or not draft.tokens
                else type(verdict)((), (), draft.tokens[0], verdict.y, ("lax",))
                for verdict, draft in zip(verdicts, drafts, strict=True)
            ]

    texts: Counter[tuple[int, ...]] = Counter()
    for omega in itertools.product(range(D), repeat=NEW):
        verifier = Lax(model)
        chain = FiniteChain(SamplingParams(temperature=1.0, max_new_tokens=NEW), PROMPT)
        session = verifier.open(PROMPT, chain, FiniteNoise(omega), frozenset(), NEW)
        while session.finish is None:
            step([session], [None], Proposer(proposers(model)["fixed_tree"]), verifier, [Budget(20, NEW)])
        texts[tuple(session.tokens[1:])] += 1
    assert total_variation(model, {text: Fraction(n, D**NEW) for text, n in texts.items()}) > Fraction(1, 10)
