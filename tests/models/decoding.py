"""Plain decoding and random trees, for the tests of decoders whose rows must keep their bits."""

from __future__ import annotations

import random
from typing import Any

import torch

from quantspec.models.base import Cache, CausalModel, Output
from quantspec.types import Batch

from .conftest import VOCAB


def decode(model: CausalModel, tokens: list[int], cache: Cache) -> Output:
    """Plain decoding, one token at a time: logits and the "norm" tap of every row."""
    rows = []
    for token in tokens:
        rows.append(model.forward(Batch.chain([token], cache.length), [cache], taps=("norm",)))
        cache.commit([0])
    return Output(torch.cat([row.logits for row in rows]), {"norm": torch.cat([row.taps["norm"] for row in rows])})


def prefilled(model: CausalModel, text: list[int], room: int) -> Any:
    """A cache that holds ``text``, with room for so many more tokens."""
    cache = model.new_cache(len(text) + room, 64)
    if text:
        model.forward(Batch.chain(text, num_logits=0), [cache])
        cache.commit(range(len(text)))
    return cache


def random_tree(rng: random.Random, n: int) -> tuple[list[int], list[int]]:
    """Tokens and parents: mostly deep, with some branches that start anywhere."""
    low = [-1 if rng.random() < 0.3 else max(0, i - 3) for i in range(n)]
    return rng.choices(range(VOCAB), k=n), [-1, *(rng.randrange(low[i], i) for i in range(1, n))]
