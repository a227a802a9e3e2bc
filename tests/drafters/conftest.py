"""A model small enough to reason about, and the plain loop over ``step`` that every test of a drafter runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from quantspec.core.drafter import Drafter, NoDrafter, TargetParts
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.step import step
from quantspec.core.verify import Verifier
from quantspec.models.base import Cache, CausalModel, Output
from quantspec.types import Batch, Budget, SamplingParams, Tap, Verdict


@dataclass
class TableCache:
    length: int = 0
    chains_only: bool = False
    slots: list[int] = field(default_factory=list)

    def commit(self, rows: Sequence[int]) -> None:
        self.slots[self.length :] = [self.slots[self.length + row] for row in rows]
        self.length = len(self.slots)

    def truncate(self, length: int) -> None:
        assert length <= self.length
        del self.slots[length:]
        self.length = length


class TableModel:
    """Logits looked up by the last two tokens of each row's own path, which it must find through cache and parents."""

    row_invariant = True
    hidden_size = 1
    max_positions = 4096

    def __init__(self, table: Tensor) -> None:
        self.table, self.vocab_size = table, table.shape[-1]
        self.forwards = 0

    @classmethod
    def random(cls, vocab_size: int, seed: int, sharpness: float = 3.0) -> TableModel:
        generator = torch.Generator().manual_seed(seed)
        return cls(sharpness * torch.randn(vocab_size, vocab_size, vocab_size, generator=generator))

    def perturbed(self, noise: float, seed: int = 1) -> TableModel:
        generator = torch.Generator().manual_seed(seed)
        return TableModel(self.table + noise * torch.randn(self.table.shape, generator=generator))

    def new_cache(self, max_length: int, max_nodes: int) -> TableCache:
        return TableCache()

    def forward(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap] = ()) -> Output:
        self.forwards += 1
        pairs = []
        for s, cache in enumerate(caches):
            start, end = batch.seq_starts[s], batch.seq_starts[s + 1]
            assert batch.cached[s] == cache.length
            cache.slots[cache.length :] = batch.tokens[start:end]
            for row in range(end - batch.num_logits[s], end):
                parent = cache.length + batch.parents[row]
                pairs.append((cache.slots[parent] if parent >= 0 else 0, batch.tokens[row]))
        # The tap is a stand-in that a test can recognize: the row's own token.
        return Output(self.table[tuple(torch.tensor(pairs).T)], {tap: torch.tensor(batch.tokens)[:, None].float() for tap in taps})


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
    params: SamplingParams,
    drafter: Drafter | None = None,
    *,
    budget: Budget | None = None,
    eos: frozenset[int] = frozenset(),
    seed: int = 0,
    rule: Any = "exact",
) -> Run:
    drafter, verifier = drafter or NoDrafter(), Verifier(model, rule=rule)
    drafter.prepare(TargetParts(model))
    sessions = [
        verifier.open(prompt, WarpChain(params, prompt, eos), Stream.of(prompt, 0, seed), eos, params.max_new_tokens)
        for prompt in prompts
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
def table_model() -> type[TableModel]:
    return TableModel


@pytest.fixture(scope="session")
def generate() -> Callable[..., Run]:
    return _generate
