"""Caches of foreign (transformers) models behind the ``Cache`` protocol: one that can be cut, one that cannot.

A transformers cache only appends. Cutting is done here by hand: ``DynamicCache.crop`` means different things in
different versions, and a cache made with the model's config forgets rows that leave a sliding window.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_SNAPSHOTS = 4
"""States kept of a recurrent sequence: a cascade takes back a few rounds of its intermediate at most."""
MAX_REPLAY = 16
"""Committed tokens that ride along with the next rows, at no extra forward; more are read on their own first."""
MAX_STEPS = 32
"""Where a model reads only one token at a time after the first call, more than this is read anew from the start."""


class AttentionCache:
    """Keys and values that can be cut, ``[1, heads, slots, dim]`` per layer: a ``DynamicCache`` without config, which
    keeps every row."""

    def __init__(self, chains_only: bool) -> None:
        from transformers import DynamicCache

        self.length = 0
        self.chains_only = chains_only
        self.state: Any = DynamicCache()

    def begin(self, rows: Sequence[int]) -> list[int]:
        """Before a forward: drop what an earlier one left behind. Returns committed tokens to read first: none."""
        self._keep([])
        return []

    @property
    def nbytes(self) -> int:
        return _bytes(self.state)

    @property
    def empty(self) -> bool:
        return self.length == 0

    def commit(self, rows: Sequence[int]) -> None:
        self._keep(rows)
        self.length += len(rows)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length
        self._keep([])

    def _keep(self, rows: Sequence[int]) -> None:
        """Cut to the committed slots and these rows past them."""
        start, end = self.length, self.length + len(rows)
        moved = next((i for i, row in enumerate(rows) if row != i), len(rows))
        for layer in self.state.layers:
            if layer.keys is None or layer.keys.numel() == 0:  # a layer that shares another one's cache
                continue
            if moved < len(rows):
                source = torch.tensor([start + row for row in rows[moved:]], device=layer.keys.device)
                for slots in (layer.keys, layer.values):  # index_select copies first: source and target may overlap
                    slots[..., start + moved : end, :] = slots.index_select(-2, source)
            layer.keys, layer.values = layer.keys[..., :end, :], layer.values[..., :end, :]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    seen: int  # tokens that the state has read
    state: Any


class RecurrentCache:
    """A state that cannot be cut (state-space models, hybrids): snapshots from before provisional rows, and replay.

    After a rejection the newest snapshot that fits is taken up, and the committed tokens since are read again, together
    with the next rows. ``new_state`` makes an empty state, ``read(tokens, state)`` runs the model over tokens.
    """

    chains_only = True

    def __init__(
        self, new_state: Callable[[], Any], read: Callable[[Sequence[int], RecurrentCache], None], stepwise: bool
    ) -> None:
        self.length = 0
        self.state = new_state()
        self._new_state, self._read, self._stepwise = new_state, read, stepwise
        self._tokens: list[int] = []  # committed
        self._seen = 0  # how many of them the state has read; without meaning while it is dirty
        self._dirty = False  # the state has read tokens that are not committed
        self._rows: tuple[int, ...] = ()
        self._snapshots: list[_Snapshot] = []

    @property
    def nbytes(self) -> int:
        return _bytes(self.state, *(snapshot.state for snapshot in self._snapshots))

    @property
    def empty(self) -> bool:
        return self._seen == 0

    def begin(self, rows: Sequence[int]) -> list[int]:
        """Before a forward over ``rows``: returns the committed tokens that must be read before them."""
        if self._dirty:
            self._restore()
        replay = self._tokens[self._seen :]
        if self._stepwise and len(replay) + len(rows) > MAX_STEPS:
            self.state, self._seen = self._new_state(), 0
            replay = self._tokens[:]
        elif len(replay) > MAX_REPLAY:
            self._read(replay, self)
            self._seen, replay = self.length, []
        if self._seen and all(snapshot.seen != self._seen for snapshot in self._snapshots):
            self._snapshots = [*self._snapshots[-MAX_SNAPSHOTS + 1 :], _Snapshot(self._seen, _copy(self.state))]
        self._rows, self._dirty = tuple(rows), True
        return replay

    def commit(self, rows: Sequence[int]) -> None:
        assert list(rows) == list(range(len(rows))), "a recurrent state takes chains only"
        self._tokens.extend(self._rows[: len(rows)])
        self.length = len(self._tokens)
        if self._dirty and len(rows) == len(self._rows):
            self._seen, self._dirty = self.length, False

    def truncate(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self._tokens[length:]
        self.length = length
        self._dirty = self._dirty or self._seen > length
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot.seen <= length]

    def _restore(self) -> None:
        newest = max(self._snapshots, key=lambda snapshot: snapshot.seen, default=_Snapshot(0, None))
        self._seen = newest.seen
        self.state = _copy(newest.state) if newest.seen else self._new_state()
        self._dirty = False


def _bytes(*states: Any) -> int:
    """Bytes of the tensors of all layers; what states share counts once."""
    entries = [value for state in states for layer in state.layers for value in vars(layer).values()]
    entries += [entry for value in entries if isinstance(value, dict) for entry in value.values()]
    return sum({entry.data_ptr(): entry.nbytes for entry in entries if isinstance(entry, Tensor)}.values())


def _copy(state: Any) -> Any:
    """A cache that further forwards over the original do not change. Keys and values are shared: they grow by
    concatenation into new tensors, while convolution and recurrent states are written in place."""
    fresh = copy.copy(state)
    fresh.layers = [copy.copy(layer) for layer in state.layers]
    for layer in fresh.layers:
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                setattr(layer, name, {key: _clone(entry) for key, entry in value.items()})
            elif name not in ("keys", "values"):
                setattr(layer, name, _clone(value))
    return fresh


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
