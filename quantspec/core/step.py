"""One round of speculation: propose, verify, trim, commit, observe. Plain decoding is a round with an empty draft."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from quantspec.core.drafter import Drafter
from quantspec.core.session import Session
from quantspec.core.session import trim as trim_limits
from quantspec.core.verify import Verifier
from quantspec.types import EMPTY_DRAFT, Budget, PendingDraft, Proposal, Verdict


def warn(line: str) -> None:
    """The default notice: a warning, which Python shows once per text."""
    warnings.warn(line, RuntimeWarning, stacklevel=3)


def step(
    sessions: Sequence[Session],
    states: Sequence[Any],
    drafter: Drafter,
    verifier: Verifier,
    budgets: Sequence[Budget],
    trim: Callable[[Session, Verdict], Verdict] = trim_limits,
    notice: Callable[[str], None] = warn,
    top_k: int = 0,
) -> list[Verdict]:
    """Advance every session by at least one token; returns what each committed.

    ``states`` come from ``drafter.open``, one per session. ``trim`` cuts a verdict before it is committed (the default
    knows stop tokens and the token limit). A drafter that raises costs speed, never the text: its draft is empty and
    ``notice`` gets a line. ``top_k`` asks for that many best tokens of every row, should the drafter want fewer.
    """
    assert all(session.finish is None for session in sessions), "a finished sequence was stepped"
    drafts = _propose(sessions, states, drafter, budgets, notice)
    needs = drafter.needs if top_k <= drafter.needs.top_k else replace(drafter.needs, top_k=top_k)
    verdicts = verifier.verify(sessions, drafts, needs)
    verdicts = [trim(session, verdict) for session, verdict in zip(sessions, verdicts, strict=True)]
    for session, verdict in zip(sessions, verdicts, strict=True):
        session.commit(verdict)
    for state, verdict in zip(states, verdicts, strict=True):
        try:
            drafter.observe(state, verdict)
        except Exception as error:
            notice(_complaint(drafter, error))
    return verdicts


def _propose(
    sessions: Sequence[Session],
    states: Sequence[Any],
    drafter: Drafter,
    budgets: Sequence[Budget],
    notice: Callable[[str], None],
) -> list[Proposal]:
    """The drafts, cut to what may be verified: the budget's nodes, and no node past the last token that may be
    drawn."""
    try:
        drafts = drafter.propose(states, [session.view() for session in sessions], budgets)
        assert len(drafts) == len(sessions), f"{len(drafts)} drafts for {len(sessions)} sequences"
        return [
            _fit(draft, min(budget.max_nodes, session.max_nodes), session.remaining - 1, session.vocab_size)
            for draft, session, budget in zip(drafts, sessions, budgets, strict=True)
        ]
    except Exception as error:
        notice(_complaint(drafter, error))
        return [EMPTY_DRAFT] * len(sessions)


def _fit(draft: Proposal, max_nodes: int, max_depth: int, vocab_size: int) -> Proposal:
    if isinstance(draft, PendingDraft):
        if draft.capacity <= max_nodes and draft.max_depth <= max_depth:
            return draft
        draft = draft.resolve()
    if not draft.tokens:
        return draft
    assert 0 <= min(draft.tokens) <= max(draft.tokens) < vocab_size, "a drafted token is not in the target's vocabulary"
    if len(draft) <= min(max_nodes, max_depth):
        return draft
    depths = draft.depths()
    return draft.select([node for node in range(min(len(draft), max_nodes)) if depths[node] <= max_depth])


def _complaint(drafter: Drafter, error: Exception) -> str:
    return f"drafter {drafter.name} failed, continuing without it: {type(error).__name__}: {error}"
