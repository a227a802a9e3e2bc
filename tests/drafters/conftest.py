"""The plain loop over ``step`` that every test of a drafter runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from quantspec.core.drafter import Drafter, NoDrafter, TargetParts
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.step import step
from quantspec.core.verify import Verifier
from quantspec.models.base import CausalModel
from quantspec.types import Budget, SamplingParams, Verdict


@dataclass
class Run:
    """What a generation left behind, one list per sequence."""

    texts: list[list[int]]
    verdicts: list[list[Verdict]]
    forwards: int

    @property
    def acceptance(self) -> float:
        """Tokens per target forward and sequence, without the first."""
        later = [verdict for verdicts in self.verdicts for verdict in verdicts[1:]]
        return sum(len(verdict.emitted) for verdict in later) / max(1, len(later))


def _generate(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    drafter: Drafter | None = None,
    *,
    budget: Budget | None = None,
    eos: frozenset[int] = frozenset(),
    seed: int = 0,
    rule: Any = "exact",
) -> Run:
    drafter, verifier = drafter or NoDrafter(), Verifier(model, rule=rule)
    drafter.prepare(TargetParts(model))
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    sessions = [
        verifier.open(prompt, WarpChain(asked, prompt, eos), Stream.of(prompt, 0, seed), eos, asked.max_new_tokens)
        for prompt, asked in zip(prompts, each, strict=True)
    ]
    states = [drafter.open(session.view()) for session in sessions]
    verdicts: list[list[Verdict]] = [[] for _ in sessions]
    before = getattr(model, "forwards", 0)

    def notice(line: str) -> None:
        raise AssertionError(line)

    while running := [i for i, session in enumerate(sessions) if session.finish is None]:
        batch = step(
            [sessions[i] for i in running],
            [states[i] for i in running],
            drafter,
            verifier,
            [budget or Budget(15, 8)] * len(running),
            notice=notice,
        )
        for i, verdict in zip(running, batch, strict=True):
            verdicts[i].append(verdict)
            sessions[i].finalize(len(sessions[i].tokens))
            drafter.finalize(states[i], len(sessions[i].tokens))
    for state in states:
        drafter.close(state)
    texts = [session.tokens[session.prompt_length :] for session in sessions]
    return Run(texts, verdicts, getattr(model, "forwards", 0) - before)


@pytest.fixture(scope="session")
def generate() -> Callable[..., Run]:
    return _generate
