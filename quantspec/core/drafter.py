"""The drafter protocol: everything that proposes tokens, a cascade included, and the immutable view it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from quantspec.core.noise import Stream
from quantspec.core.race import Best
from quantspec.core.sampling import WarpChain, WarpState
from quantspec.types import EMPTY_DRAFT, Budget, Draft, Needs, Proposal, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from quantspec.models.base import CausalModel
    from quantspec.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TargetParts:
    """What a drafter may use of its target, read-only: the model (embedding, final norm and head are its attributes)
    and the tokenizer (None in tests)."""

    model: CausalModel
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True, slots=True)
class View:
    """One session as a drafter sees it at one step.

    ``remaining`` is how many more tokens the user may get; a node deeper than ``remaining - 1`` cannot count. ``state``
    is the warp state after ``tokens``, ``vocab_size`` the target's. Under the ratio rule drafters see no noise:
    ``stream`` is None, and ``draft_stream`` is for their own draws.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    chain: WarpChain
    state: WarpState
    stream: Stream | None
    stop_ids: frozenset[int]
    remaining: int
    vocab_size: int
    draft_stream: Stream | None = None

    def scores(
        self, logits: Tensor, paths: Sequence[Sequence[int]], ids: Tensor | None = None, tau: float = 1.0
    ) -> Tensor:
        """Log of the estimated probability that each token is the target's draw: warp, then keyed noise.

        ``logits [m, W]`` are the drafter's rows, ``paths[i]`` the draft tokens that lead from the last committed token
        to row i, ``ids [W]`` maps a trimmed draft vocabulary to target ids (None: the same). Returns log scores ``[m,
        W]``: ``log_softmax((log q - log E) / tau)`` at temperature > 0 with a stream, ``log_softmax(row / tau)`` of
        greedy drafts, which guess a choice and no draw, and ``log_softmax`` of the warped row else.
        """
        rows = self._spread(logits, ids)
        states, positions = self._rows(paths)
        warped, stream = self.chain.apply_rows(states, rows), None if self.chain.greedy else self.stream
        scores = log_scores(warped, positions, stream, self._tau(tau))
        return scores if ids is None else scores[:, ids]

    def best(
        self, logits: Tensor, paths: Sequence[Sequence[int]], k: int, tau: float = 1.0, ids: Tensor | None = None
    ) -> Best:
        """The k best of each row of ``scores(logits, paths, ids, tau)``, as target ids and log scores, at a fraction of
        the cost.

        Truncation may cut a few entries sooner or later. A row ends in -inf where fewer than k tokens can be drawn.
        """
        states, positions = self._rows(paths)
        if ids is not None and self.chain.nameless and logits.shape[1] >= k:
            columns = ids.numpy(force=True)
            race = self.chain.race(states, logits, positions, self.stream, exact=False, ids=columns)
            found, scores = race.best(k, self._tau(tau))
            return columns[found], scores
        race = self.chain.race(states, self._spread(logits, ids), positions, self.stream, exact=False)
        return race.best(k, self._tau(tau))

    def _tau(self, tau: float) -> float:
        """Of draws without noise (the ratio rule's), the drafter's distribution is what is asked."""
        return tau if self.chain.greedy or self.stream is not None else 1.0

    def _spread(self, logits: Tensor, ids: Tensor | None) -> Tensor:
        """Rows on the target's vocabulary; -inf for tokens that the drafter does not have."""
        if ids is None:
            return logits
        rows = logits.new_full((len(logits), self.vocab_size), -torch.inf)
        rows[:, ids] = logits
        return rows

    def _rows(self, paths: Sequence[Sequence[int]]) -> tuple[list[WarpState], list[int]]:
        """Warp state and absolute position of the row after each path."""
        states = [self.state] * len(paths)
        if not self.chain.stateless:
            states = [reduce(self.chain.advance, path, self.state) for path in paths]
        return states, [len(self.tokens) + len(path) for path in paths]


def log_scores(warped: Tensor, positions: Sequence[int], stream: Stream | None, tau: float = 1.0) -> Tensor:
    """``log_softmax((row - log E) / tau)`` of warped rows ``[m, V]`` at absolute positions ``[m]``; without a stream,
    ``log_softmax(row / tau)``."""
    if stream is not None:
        noise = np.stack([stream.noise(t, warped.shape[1]) for t in positions])
        warped = warped - torch.from_numpy(noise).to(warped.device)
    return torch.log_softmax(warped / tau, dim=-1)


class Drafter(Protocol):
    """Proposes drafts. All state of one sequence lives in the object that ``open`` returns."""

    needs: Needs
    name: str

    def prepare(self, parts: TargetParts) -> None:
        """Once, before any ``open``: take what is needed of the target; refuse a mismatch with a ``ModelError``."""

    def open(self, view: View) -> Any:
        """State for a new sequence."""

    def propose(self, states: Sequence[Any], views: Sequence[View], budgets: Sequence[Budget]) -> Sequence[Proposal]:
        """One draft per sequence, within its budget. May be empty: that is plain decoding."""

    def observe(self, state: Any, verdict: Verdict) -> None:
        """After every commit, an empty draft's included. ``verdict.taps`` holds what ``needs`` asked for."""

    def truncate(self, state: Any, length: int) -> None:
        """An outer level took back all tokens from ``length`` on."""

    def finalize(self, state: Any, length: int) -> None:
        """Tokens before ``length`` are confirmed by the outermost target and will never be taken back."""

    def close(self, state: Any) -> None:
        """The sequence is over."""

    def describe(self) -> str:
        """One line for people."""


class NoDrafter:
    """Plain decoding: every draft is empty."""

    needs = Needs()
    name = "none"

    def prepare(self, parts: TargetParts) -> None:
        pass

    def open(self, view: View) -> None:
        return None

    def propose(self, states: Sequence[None], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        return [EMPTY_DRAFT] * len(states)

    def observe(self, state: None, verdict: Verdict) -> None:
        pass

    def truncate(self, state: None, length: int) -> None:
        pass

    def finalize(self, state: None, length: int) -> None:
        pass

    def close(self, state: None) -> None:
        pass

    def describe(self) -> str:
        return "none (plain decoding)"
