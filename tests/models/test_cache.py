"""Commit and truncate against a plain list of what the slots should hold."""

from __future__ import annotations

import random

import pytest
import torch

from quantspec.errors import ResourceError
from quantspec.models.cache import KVCache


def make(max_length: int, max_nodes: int) -> KVCache:
    return KVCache(2, 3, 4, max_length, max_nodes, device=torch.device("cpu"), dtype=torch.float32)


def test_commit_gathers_and_truncate_forgets() -> None:
    rng, cache, kept = random.Random(0), make(40, 8), []
    for step in range(200):
        if rng.random() < 0.2:
            kept = kept[: rng.randrange(len(kept) + 1)]
            cache.truncate(len(kept))
            continue
        n = rng.randrange(1, 9)
        marks = torch.arange(n) + 10.0 * step
        cache.kv[:, :, cache.length : cache.length + n] = marks[:, None]
        rows = sorted(rng.sample(range(n), rng.randrange(n + 1)))[: 40 - len(kept)]
        cache.commit(rows)
        kept += marks[rows].tolist()
        assert cache.length == len(kept)
        assert torch.equal(cache.keys[:, :, : len(kept)], torch.tensor(kept)[:, None].expand(2, 3, -1, 4))
        assert torch.equal(cache.values[:, :, : len(kept)], torch.tensor(kept)[:, None].expand(2, 3, -1, 4))


def test_a_prefix_moves_nothing() -> None:
    cache = make(8, 8)
    cache.kv = torch.ones(1)  # any access to slots would fail on this shape
    cache.commit([0, 1, 2])
    assert cache.length == 3


def test_more_memory_than_there_is() -> None:
    with pytest.raises(ResourceError, match="no memory for a cache of"):
        make(2**50, 8)
