"""A causal model whose logits are a hash of the path: exact at any width, with a cache that shows every mistake.

``TableModel`` implements ``quantspec.models.base.CausalModel``. A row's logits depend on *all* tokens of its path as
the cache holds them (not on the batch's own account), so a wrong commit, truncation, slot or ancestor list changes the
text. ``tests/conftest.py`` loads this file, so any test may say

    from table_model import RandomDrafter, TableModel, generate

    target = TableModel(vocab_size=32, seed=1)
    inner = TableModel(vocab_size=32, seed=1, blur=0.5)    # the same table plus noise: mostly agrees with it
    parrot = TableModel(vocab_size=32, seed=1, order=2)    # sees the last 2 tokens only: repeats itself
    plain = generate(target, SamplingParams(temperature=0.8, seed=3), prompt=(1, 2, 3))
    other = generate(target, SamplingParams(temperature=0.8, seed=3), (1, 2, 3), RandomDrafter(target, seed=5,
    knows=0.7)) assert other.tokens == plain.tokens
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from quantspec.core.drafter import Drafter, NoDrafter, TargetParts, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.session import Session
from quantspec.core.step import step
from quantspec.core.verify import NO_NEEDS, Verifier
from quantspec.models.base import Cache, CausalModel, Output
from quantspec.types import Batch, Budget, Draft, Needs, SamplingParams, Tap, Verdict

BUDGET = Budget(max_nodes=12, max_depth=8)
EMPTY = -1  # a slot that was never written, or was given up


class TableCache:
    """Slots hold token ids. Everything past ``length`` is provisional."""

    def __init__(self, max_length: int, max_nodes: int, chains_only: bool = False) -> None:
        self.slots = [EMPTY] * (max_length + max_nodes)
        self.length = 0
        self.chains_only = chains_only
        self.in_flight = 0

    @property
    def nbytes(self) -> int:
        return 8 * len(self.slots)

    def commit(self, rows: Sequence[int]) -> None:
        rows = list(rows)
        assert rows == sorted(set(rows)), "rows out of order"
        assert all(0 <= row < self.in_flight for row in rows), "rows not in flight"
        kept = [self.slots[self.length + row] for row in rows]
        end = self.length + len(kept)
        self.slots[self.length : end] = kept
        self.slots[end:] = [EMPTY] * (len(self.slots) - end)
        self.length, self.in_flight = end, 0

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.slots[length:] = [EMPTY] * (len(self.slots) - length)
        self.length, self.in_flight = length, 0


class TableModel:
    """Logits ``scale * gauss(seed, path) + blur * gauss(other seed, path)``, taps ``gauss(tap, path) [hidden_size]``.

    ``order`` limits what a row sees to that many last tokens; None: the whole path. ``bias`` adds to a token's logits
    (an end of sequence that is likely, say).
    """

    row_invariant = True
    hidden_size = 8
    backend = "table"
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        vocab_size: int = 32,
        seed: int = 0,
        *,
        scale: float = 2.0,
        blur: float = 0.0,
        order: int | None = None,
        bias: dict[int, float] | None = None,
        chains_only: bool = False,
        max_positions: int = 4096,
    ) -> None:
        self.vocab_size = vocab_size
        self.seed = seed
        self.scale = scale
        self.blur = blur
        self.order = order
        self.bias = bias or {}
        self.chains_only = chains_only
        self.max_positions = max_positions
        self.forwards = 0
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}

    def new_cache(self, max_length: int, max_nodes: int) -> TableCache:
        return TableCache(max_length, max_nodes, self.chains_only)

    def row(self, path: Sequence[int]) -> torch.Tensor:
        """Logits ``[V]`` after ``path``, which must not be empty."""
        key = tuple(path) if self.order is None else tuple(path[-self.order :])
        if key not in self._rows:
            row = self.scale * _gauss(f"logits {self.seed}", key, self.vocab_size)
            row += self.blur * _gauss(f"blur {self.seed}", key, self.vocab_size)
            for token, value in self.bias.items():
                row[token] += value
            self._rows[key] = row
        return self._rows[key]

    def tap(self, tap: Tap, path: Sequence[int]) -> torch.Tensor:
        """The residual stream ``[hidden_size]`` of the last token of ``path``."""
        return _gauss(f"tap {self.seed} {tap}", tuple(path), self.hidden_size)

    def forward(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap] = ()) -> Output:
        self.forwards += 1
        ancestors = batch.ancestors()
        logits, tapped = [], {tap: [] for tap in taps}
        for s, cache in enumerate(caches):
            assert isinstance(cache, TableCache)
            start, end = batch.seq_starts[s : s + 2]
            assert batch.cached[s] == cache.length
            cache.in_flight = end - start
            assert cache.length + cache.in_flight <= len(cache.slots), "more rows than the cache was opened for"
            cache.slots[cache.length : cache.length + cache.in_flight] = batch.tokens[start:end]
            if cache.chains_only:
                assert batch.parents[start:end] == tuple(range(-1, end - start - 1)), "a tree for a chain-only cache"
            prefix = cache.slots[: cache.length]
            for i in range(start, end):
                path = [*prefix, *(cache.slots[cache.length + row] for row in ancestors[i])]
                assert all(0 <= token < self.vocab_size for token in path), "an empty slot or an unknown token"
                if i >= end - batch.num_logits[s]:
                    logits.append(self.row(path))
                for tap in taps:
                    tapped[tap].append(self.tap(tap, path))
        rows = torch.stack(logits) if logits else torch.empty(0, self.vocab_size)
        return Output(rows, {tap: torch.stack(rows) for tap, rows in tapped.items()})


def _gauss(kind: str, path: tuple[int, ...], size: int) -> torch.Tensor:
    digest = hashlib.blake2b(f"{kind} {path}".encode(), digest_size=8).digest()
    values = np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(size, dtype=np.float32)
    return torch.from_numpy(values)


class RandomDrafter(NoDrafter):
    """An adversary: random trees, duplicate siblings, wrong scores, drafts that exceed the budget, sometimes none.

    ``knows`` is the chance that a node carries the target's own token, read off the noise and the target's logits.
    """

    name = "random"

    def __init__(self, model: TableModel, seed: int, knows: float = 0.0, needs: Needs = NO_NEEDS) -> None:
        self.model, self.random, self.knows, self.needs = model, random.Random(seed), knows, needs
        self.accepted = 0

    def observe(self, state: None, verdict: Verdict) -> None:
        self.accepted += len(verdict.path)

    def propose(self, states: Sequence[None], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        return [self._tree(view) for view in views]

    def _tree(self, view: View) -> Draft:
        pick, paths = self.random, [()]
        tokens, parents = [], []
        for node in range(pick.choice((0, 1, 3, 9))):
            parent = pick.choice((node - 1, pick.randrange(-1, node)))
            path = paths[parent + 1]
            known = pick.random() < self.knows
            token = target_token(self.model, view, path) if known else pick.randrange(self.model.vocab_size)
            tokens.append(token)
            parents.append(parent)
            paths.append((*path, token))
        n = len(tokens)
        return Draft(tuple(tokens), tuple(parents), tuple(pick.random() for _ in range(n)), ("random",) * n)


def target_token(model: TableModel, view: View, path: Sequence[int]) -> int:
    """What ``model`` draws after ``view.tokens`` and ``path``: a drafter may know, for it sees the noise."""
    state = view.state
    for token in path:
        state = view.chain.advance(state, token)
    logits = model.row((*view.tokens, *path))[None]
    return view.chain.sample([state], logits, [len(view.tokens) + len(path)], view.stream)[0]


def generate(
    model: CausalModel,
    params: SamplingParams,
    prompt: Sequence[int],
    drafter: Drafter | None = None,
    *,
    stop_ids: frozenset[int] = frozenset(),
    sample: int = 0,
    budget: Budget = BUDGET,
    prefill_chunk: int = 512,
    rule: str = "exact",
) -> Session:
    """Run one sequence to its end by ``core.step``; ``tokens[prompt_length:]`` of the session is the text. A drafter
    that raises fails the test."""
    drafter = drafter or NoDrafter()
    verifier = Verifier(model, rule=rule, prefill_chunk=prefill_chunk)
    stream = Stream.of(prompt, sample, params.seed or 0)
    chain = WarpChain(params, prompt, stop_ids)
    session = verifier.open(prompt, chain, stream, stop_ids, params.max_new_tokens, budget.max_nodes)
    drafter.prepare(TargetParts(model))
    state = drafter.open(session.view())
    while session.finish is None:
        step([session], [state], drafter, verifier, [budget], notice=pytest.fail)
        session.finalize(len(session.tokens))
        drafter.finalize(state, len(session.tokens))
    drafter.close(state)
    return session
