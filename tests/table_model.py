"""A causal model whose logits are a hash of the path: exact at any width, with a cache that shows every mistake.

``TableModel`` implements ``quantspec.models.base.CausalModel``. A row's logits depend on *all* tokens of its path as the
cache holds them (not on the batch's own account of it), so a wrong commit, truncation, slot or ancestor list changes text.
Tests get it from the fixtures in ``tests/conftest.py``:

    def test_something(table_model):
        target = table_model(vocab_size=32, seed=1)
        inner = table_model(vocab_size=32, seed=1, blur=0.5)    # the same table plus noise: agrees with it most of the time
        parrot = table_model(vocab_size=32, seed=1, order=2)    # sees the last 2 tokens only: repeats itself
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from quantspec.models.base import Cache, Output
from quantspec.types import Batch, Tap

EMPTY = -1  # a slot that was never written, or was given up


class TableCache:
    """Slots hold token ids. Everything past ``length`` is provisional."""

    def __init__(self, max_length: int, max_nodes: int, chains_only: bool = False) -> None:
        self.slots = [EMPTY] * (max_length + max_nodes)
        self.length = 0
        self.chains_only = chains_only
        self.in_flight = 0

    def commit(self, rows: Sequence[int]) -> None:
        rows = list(rows)
        assert rows == sorted(set(rows)) and all(0 <= row < self.in_flight for row in rows), "rows not in flight"
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
            assert batch.cached[s] == cache.length and end > start
            cache.in_flight = end - start
            cache.slots[cache.length : cache.length + end - start] = batch.tokens[start:end]  # overrun: the list would grow
            assert cache.length + end - start <= len(cache.slots), "more rows than the cache was opened for"
            if cache.chains_only:
                assert batch.parents[start:end] == tuple(range(-1, end - start - 1)), "a tree for a chain-only cache"
            prefix = cache.slots[: cache.length]
            for i in range(start, end):
                path = [*prefix, *(cache.slots[cache.length + row] for row in ancestors[i])]
                assert EMPTY not in path and all(0 <= token < self.vocab_size for token in path)
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
