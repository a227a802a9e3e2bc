"""Generations by the real engine, written down step by step: what was drafted and accepted, and what each part took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from quantspec.engine.controller import Controller
from quantspec.engine.costs import Step
from quantspec.engine.engine import Engine
from quantspec.engine.generate import advance
from quantspec.engine.request import Request
from quantspec.engine.stats import Lap
from quantspec.types import Budget, Chunk, Draft, SamplingParams, Verdict


@dataclass(frozen=True, slots=True)
class Watched:
    """One step. ``seconds`` are all of it, ``verify`` those of the target's forward, ``context`` the tokens before it;
    ``whole``: neither the end of the text nor the limit of tokens was near enough to cut it."""

    seconds: float
    verify: float
    context: int
    tokens: int
    draft: Draft
    path: tuple[int, ...]
    budget: Budget
    whole: bool

    def record(self) -> Step:
        """For a trace."""
        return step_of(self.draft, self.path, self.context)


def step_of(draft: Draft, path: Sequence[int], context: int) -> Step:
    accepted = set(path)
    return Step(draft.scores, draft.parents, tuple(node in accepted for node in range(len(draft))), context)


class _Request(Request):
    """Remembers its last verdict. ``budgets``, where given, says what each draft may cost."""

    budgets: Iterator[Budget] | None = None
    asked: Budget
    verdict: Verdict

    def budget(self, batch: int = 1) -> Budget:
        self.asked = super().budget(batch)
        if self.budgets is not None and self.asked.max_nodes:
            self.asked = next(self.budgets)
        return self.asked

    def take(self, verdict: Verdict, lap: Lap) -> Chunk:
        self.verdict = verdict
        return super().take(verdict, lap)


def watch(
    engine: Engine,
    prompt: Sequence[int],
    new_tokens: int,
    budgets: Iterator[Budget] | None = None,
    before: Callable[[], None] = lambda: None,
    horizon: int | None = None,
) -> list[Watched]:
    """Generate greedily; the first step, which reads the prompt, comes first. ``before`` is called before each step.
    What is decided by the length of the text, such as whether the drafter should read the prompt at all, is decided as
    for one of ``horizon`` new tokens."""
    request = _Request(engine, prompt, SamplingParams(max_new_tokens=new_tokens), seed=0)
    if engine.outlook and horizon:
        request._controller = Controller(engine.outlook, engine.lessons, len(prompt), horizon)
    request.budgets = budgets
    request.open()
    steps: list[Watched] = []
    try:
        began = perf_counter()
        while not request.text.finish:
            before()
            context, remaining = len(request.session.tokens), request.session.remaining
            advance(engine, [request])
            ended = perf_counter()
            verdict, verifier = request.verdict, engine.verifier
            whole = not verdict.finish and remaining > request.asked.max_depth
            steps.append(
                Watched(
                    ended - began, verifier.ended - verifier.began, context, len(verdict.emitted), verdict.draft,
                    verdict.path, request.asked, whole,
                )
            )  # fmt: skip
            began = ended
    finally:
        request.close()
    return steps
