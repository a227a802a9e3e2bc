"""The cascade: a drafter whose proposals an intermediate model verifies before the target sees them.

This is the hierarchical method of SpecMQuant (arXiv 2505.22179) at any depth: ``propose`` runs ordinary rounds of
``core.step`` against the intermediate, with any drafter below it, until enough tokens stand, and hands them over as one
chain. What it commits there is provisional. When the target disagrees, the next ``propose`` takes the intermediate's
session back to the common prefix; when the target goes the same way, tokens past its text are surplus, kept for free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any

import torch

from quantspec.core.drafter import Drafter, TargetParts, View
from quantspec.core.session import Session
from quantspec.core.step import step, warn
from quantspec.core.verify import Verifier
from quantspec.drafters.config import CascadeOptions
from quantspec.drafters.tau import tau_at
from quantspec.errors import ModelError
from quantspec.kernels.draws import MOST_RUNNERS_UP
from quantspec.types import EMPTY_DRAFT, Budget, Draft, Needs, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from quantspec.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Drafted:
    """One provisional token: the level that proposed it, how sure the intermediate was of it, its runner-up and how
    likely that was; and, under the ratio rule, the distribution ``[V]`` it was drawn from."""

    stage: str
    probability: float
    runner_up: tuple[int, float]
    q: Tensor | None


@dataclass(slots=True)
class _Level:
    """The intermediate's side of one sequence. ``drafted`` describes the last tokens of ``session``, which the outer
    level has not committed yet."""

    session: Session
    inner: Any
    drafted: list[_Drafted] = field(default_factory=list)
    stopped: bool = False

    def hungry(self, goal: int, budget: Budget) -> bool:
        """Whether another round is due on the way to ``goal`` tokens: a token as sure as those before pays for it and
        for a row."""
        have = len(self.drafted)
        if have >= goal or self.stopped or self.session.finish is not None:
            return False
        if not have or not budget.level_price:
            return True
        reached = math.prod(token.probability for token in self.drafted)
        return reached ** (1 + 1 / have) > budget.level_price + (budget.floors()[have] if budget.prices else 0.0)


@dataclass(slots=True)
class CascadeState:
    """``level`` is made by the first draft; ``final`` tokens are confirmed by the outermost target."""

    level: _Level | None = None
    final: int = 0


class Cascade:
    """Drafts chains of at least ``min_draft`` tokens that ``verifier``'s model, helped by ``inner``, stands for.

    ``inner_budget`` says what one inner draft may cost. ``stop`` sees the intermediate's lead over its runner-up, in
    log-score, at the least certain token of each inner round, and ends the draft where it returns True. ``watch`` sees
    each inner session after a round, how many tokens it had before, and the intermediate's verdict. A node's score is
    the product of the intermediate's own coupled probabilities ``softmax((log q - log E) / tau)`` along the chain, or
    of ``softmax(log q / tau)`` of greedy text; ``taus`` by temperature, see ``tau.tau_at``.
    """

    needs = Needs()
    name = "cascade"

    def __init__(
        self,
        inner: Drafter,
        verifier: Verifier,
        options: CascadeOptions | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        inner_budget: Callable[[Session], Budget] = lambda session: Budget(15, 6),
        stop: Callable[[float], bool] | None = None,
        notice: Callable[[str], None] = warn,
        watch: Callable[[Session, int, Verdict], None] | None = None,
        taus: Mapping[float, float] | None = None,
    ) -> None:
        self.watch, self.taus = watch, taus or {}
        self.inner, self.verifier, self.options = inner, verifier, options or CascadeOptions()
        self.tokenizer, self.inner_budget, self.stop, self.notice = tokenizer, inner_budget, stop, notice

    def prepare(self, parts: TargetParts) -> None:
        own, target = self.verifier.model.vocab_size, parts.model.vocab_size
        if self.tokenizer and parts.tokenizer and self.tokenizer.fingerprint() != parts.tokenizer.fingerprint():
            raise ModelError(
                f"the {self.verifier.stage} model and its target have different tokenizers",
                hint="a draft model must share its target's tokenizer",
            )
        if own != target:
            raise ModelError(f"the {self.verifier.stage} model has {own} tokens, but its target {target}")
        self.inner.prepare(TargetParts(self.verifier.model, self.tokenizer))

    def open(self, view: View) -> CascadeState:
        # The intermediate reads the prompt at the first draft, so that the target can stream its first token before.
        return CascadeState()

    def propose(self, states: Sequence[CascadeState], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        goals = [
            min(self.options.min_draft, budget.max_nodes, budget.max_depth, view.remaining - 1)
            for view, budget in zip(views, budgets, strict=True)
        ]
        levels = [
            self._sync(state, view) if goal > 0 else None
            for state, view, goal in zip(states, views, goals, strict=True)
        ]
        due = [each for each in zip(levels, goals, budgets, strict=True) if each[0]]
        while hungry := [level for level, goal, budget in due if level and level.hungry(goal, budget)]:
            self._round(hungry, ratio=views[0].stream is None)
        return [
            _draft(level, view, budget, self.verifier.stage) if level else EMPTY_DRAFT
            for level, view, budget in zip(levels, views, budgets, strict=True)
        ]

    def _sync(self, state: CascadeState, view: View) -> _Level:
        """Bring the intermediate's session to the outer text; what it has past that text stays as surplus."""
        if state.level is None:
            state.level = self._open(view)
        level, outer = state.level, view.tokens
        session = level.session
        common = _common_prefix(session.tokens, outer, session.final)
        if common < len(outer):
            if common < len(session.tokens):
                self.inner.truncate(level.inner, common)
            session.truncate(common, then=outer[common:])
            level.drafted.clear()
        else:
            del level.drafted[: len(level.drafted) - (len(session.tokens) - common)]
        level.stopped = False
        if state.final > session.final:
            session.finalize(state.final)
            self.inner.finalize(level.inner, state.final)
        return level

    def _open(self, view: View) -> _Level:
        stream = view.stream or view.draft_stream
        assert stream is not None, "a view has one or the other"
        generated = len(view.tokens) - view.prompt_length
        prompt = view.tokens[: view.prompt_length]
        session = self.verifier.open(prompt, view.chain, stream, view.stop_ids, generated + view.remaining)
        return _Level(session, self.inner.open(session.view()))

    def _round(self, levels: Sequence[_Level], ratio: bool) -> None:
        """One inner step for all these sequences."""
        sessions = [level.session for level in levels]
        starts = [len(session.tokens) for session in sessions]
        verdicts = step(
            sessions,
            [level.inner for level in levels],
            self.inner,
            self.verifier,
            [self.inner_budget(session) for session in sessions],
            notice=self.notice,
            top_k=self.verifier.model.vocab_size if ratio else MOST_RUNNERS_UP if self.taus else 2,
        )
        for level, verdict, start in zip(levels, verdicts, starts, strict=True):
            assert verdict.top is not None, "asked for above"
            rows = [0, *(node + 1 for node in verdict.path)]  # those that the emitted tokens were drawn from
            ids, scores = verdict.top
            tau = 1.0 if ratio else tau_at(self.taus, level.session.chain.params.temperature)
            best = _sure(scores[rows], tau)
            runners_up = zip(ids[rows, 1].tolist(), best[:, 1].tolist(), strict=True)
            q_rows = _proposal(level.session, ids[rows], scores[rows], start) if ratio else [None] * len(rows)
            level.drafted += map(_Drafted, verdict.stages, best[:, 0].tolist(), runners_up, q_rows)
            if self.watch:
                self.watch(level.session, start, verdict)
            if self.stop:
                level.stopped = self.stop(float((scores[rows, 0] - scores[rows, 1]).min()))

    def observe(self, state: CascadeState, verdict: Verdict) -> None:
        """Nothing: the next view tells what was committed."""

    def truncate(self, state: CascadeState, length: int) -> None:
        """Nothing: the next view tells what was taken back."""

    def finalize(self, state: CascadeState, length: int) -> None:
        # Kept until the intermediate's session has been brought to the confirmed text.
        state.final = length

    def close(self, state: CascadeState) -> None:
        if state.level is not None:
            self.inner.close(state.level.inner)
            state.level = None

    def describe(self) -> str:
        least, stage = self.options.min_draft, self.verifier.stage
        return f"cascade: {self.inner.describe()}; chains of {least} tokens and more from the {stage} model"


def _sure(scores: Tensor, tau: float) -> Tensor:
    """``[m, 2]``: how likely the best two of rows of log-scores are to be the target's. With a tau, of those that are
    given: sharpened, the others come to nothing."""
    return scores[:, :2].exp() if tau == 1 else (scores / tau).softmax(-1)[:, :2]


def _common_prefix(a: Sequence[int], b: Sequence[int], start: int) -> int:
    """Length of the common prefix of two texts that are known to agree on their first ``start`` tokens."""
    end = min(len(a), len(b))
    while start < end and a[start] == b[start]:
        start += 1
    return start


def _proposal(session: Session, ids: Tensor, scores: Tensor, start: int) -> list[Tensor | None]:
    """The distributions ``[V]`` that tokens from position ``start`` on were drawn from.

    ``scores`` are the whole rows of ``log q - log E`` up to a constant, so adding ``log E`` gives q back.
    """
    if session.chain.greedy:
        return [None] * len(scores)
    # A row ends in repeated ids and -inf where fewer tokens could be drawn.
    rows = torch.full_like(scores, -torch.inf).scatter_reduce_(1, ids.long(), scores, "amax")
    noise = [torch.tensor(session.stream.noise(start + i, rows.shape[1])) for i in range(len(rows))]
    return list((rows + torch.stack(noise).to(rows.device)).softmax(-1))


def _draft(level: _Level, view: View, budget: Budget, stage: str) -> Draft:
    """The surplus as a draft, as far as it pays. Where rows have prices of their own it may be a narrow tree, with
    runners-up that pay for theirs, such as those that a kernel's tile gives for nothing."""
    room = min(len(level.drafted), budget.max_nodes, budget.max_depth, view.remaining - 1)
    drafted, start = level.drafted[:room], len(view.tokens)
    q_rows = [token.q for token in drafted if token.q is not None]
    draft = Draft.chain(
        level.session.tokens[start : start + room],
        list(accumulate([token.probability for token in drafted], mul)),
        [token.stage for token in drafted],
        torch.stack(q_rows) if q_rows else None,
    )
    # Under the ratio rule a token must not be dropped for what it is: that would bend the distribution.
    if view.stream is None:
        return draft
    if budget.prices:
        draft = _with_runners_up(draft, [token.runner_up for token in drafted], stage)
    best = sorted(range(len(draft)), key=draft.scores.__getitem__, reverse=True)
    return draft.select(sorted(best[: budget.worth([draft.scores[node] for node in best])]))


def _with_runners_up(chain: Draft, runners_up: Sequence[tuple[int, float]], stage: str) -> Draft:
    """The chain, and beside each of its tokens the intermediate's second choice, below which nothing grows."""
    nodes, above, reached = list[tuple[int, int, float, str]](), -1, 1.0
    own = zip(chain.tokens, chain.scores, chain.stages, runners_up, strict=True)
    for token, score, proposer, (other, probability) in own:
        place = len(nodes)
        nodes.append((token, above, score, proposer))
        if probability > 0:  # else no other could be drawn
            nodes.append((other, above, reached * probability, stage))
        above, reached = place, score
    if not nodes:
        return chain
    tokens, parents, scores, stages = zip(*nodes, strict=True)
    return Draft(tokens, parents, scores, stages)
