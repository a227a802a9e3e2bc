"""The inside of a cascade, watched while the real engine runs it: the intermediate's rounds, and their drafts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from quantspec.calibrate.cost.fit import Sample
from quantspec.calibrate.cost.watch import step_of
from quantspec.core.session import Session
from quantspec.core.verify import NO_NEEDS, Verifier
from quantspec.drafters.cascade import Cascade
from quantspec.engine.costs import CostCurve, Step
from quantspec.types import Budget, Needs, Proposal, Verdict


@dataclass(frozen=True, slots=True)
class Round:
    """One step of the intermediate: seconds before its forward (its drafter's) and of the forward, and what came of
    it."""

    draft: float
    verify: float
    record: Step
    wide: bool

    def sample(self, curve: CostCurve) -> Sample:
        """Of the draft: what the round took beyond a forward as the intermediate's curve has it."""
        nodes = len(self.record.scores)
        more = self.draft + self.verify - curve.at(nodes + 1, self.record.context)
        return max(self.record.depths, default=0), nodes, more


class InnerVerifier(Verifier):
    """The intermediate's verifier with a memory. ``steps`` has the rounds of every step of the target."""

    def __init__(self, cascade: Cascade, budgets: Iterator[Budget]) -> None:
        before = cascade.verifier
        super().__init__(before.model, stage=before.stage, rule=before.rule, prefill_chunk=before.prefill_chunk)
        self.steps: list[list[Round]] = []
        self._budgets, self._wide, self._ended = budgets, next(budgets), 0.0
        self._budget = self._wide
        cascade.verifier, cascade.inner_budget = self, self._next

    def begin(self) -> None:
        """A step of the target begins."""
        self.steps.append([])
        self._ended = perf_counter()

    def verify(self, sessions: Sequence[Session], drafts: Sequence[Proposal], needs: Needs = NO_NEEDS) -> list[Verdict]:
        began = perf_counter()
        verdicts = super().verify(sessions, drafts, needs)
        ended = perf_counter()
        verdict = verdicts[0]  # one sequence is watched at a time
        record = step_of(verdict.draft, verdict.path, len(sessions[0].tokens))
        self.steps[-1].append(Round(began - self._ended, ended - began, record, self._budget is self._wide))
        self._ended = ended
        return verdicts

    def _next(self, session: Session) -> Budget:
        self._budget = next(self._budgets)
        return self._budget
