"""What all EAGLE drafters share: slots filled with a target's features, and a dynamic tree grown from the last one.

Slots, features and positions. Slot i holds the pair (f_i, t_{i+1}) at rotary position i, as in training, and predicts
t_{i+2}. With T committed tokens the verifier has handed out f_0 .. f_{T-2}, so slots 0 .. T-2 can be filled, and slot
T-2 predicts the first drafted token. A drafted node at depth d (from 1) stands at position T-2+d, with its parent's
output as its feature; siblings share the position.

Keys and values stay only for slots that were filled from true features; those of a draft tree are written past them and
overwritten by the next fill.

In a cascade tokens come without a forward: after a draft that the target took whole, the intermediate has not yet read
its own last token, nor the target's behind it. A slot whose feature is missing gets the output of the slot before, as a
drafted node does, so that no forward of the intermediate has to go by without a draft.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quantspec.core.drafter import View
from quantspec.drafters.config import EagleOptions
from quantspec.drafters.tree import Level, Rows, grow
from quantspec.types import EMPTY_DRAFT, Budget, Needs, Proposal, Tap, Verdict

CHUNK = 256
"""Slots per forward while a long prompt is read, which bounds the attention scores to [heads, 256, length]."""


class Network(Protocol):
    """A head's network over slots. ``width`` is that of a feature row and of an output row."""

    width: int

    def new_kv(self, capacity: int) -> Tensor:
        """Zeroed keys and values of ``capacity`` slots."""

    def forward(
        self, features: Tensor, embeddings: Tensor, positions: slice, kv: Tensor, start: int, bias: Tensor
    ) -> Tensor:
        """Outputs ``[m, width]`` of m slots, whose keys and values go to ``kv`` slots ``start`` on; an output is the
        feature of the slots drafted below.

        ``features [m, width]`` and ``embeddings [m, E]`` are the inputs; ``positions`` spans m rotary positions, or one
        that all share. ``bias [m, w]`` is added to the scores of the last w slots (0 to see one, -inf not to); every
        slot before those is seen by all.
        """


@dataclass(slots=True)
class FeatureState:
    """``features`` are the true ones of tokens ``base`` on; slots ``0 .. filled-1`` of ``kv`` were made from such.

    Invariant after every ``observe``: ``count`` equals the verifier's cached tokens.
    """

    kv: Tensor
    _features: Tensor
    base: int = 0
    filled: int = 0
    _newest: list[Tensor] = field(default_factory=list)
    """Not joined to the others before somebody looks: while nothing is drafted, nobody does."""

    @property
    def features(self) -> Tensor:
        """``[count - base, width]``."""
        if self._newest:
            self._features, self._newest = torch.cat((self._features, *self._newest)), []
        return self._features

    @features.setter
    def features(self, rows: Tensor) -> None:
        self._features, self._newest = rows, []

    def add(self, rows: Tensor) -> None:
        """Features of the next tokens."""
        self._newest.append(rows)

    @property
    def count(self) -> int:
        """True features seen so far."""
        return self.base + len(self._features) + sum(map(len, self._newest))


class FeatureTree(ABC):
    """Drafts a tree with a head whose features come from the model that verifies it.

    A family of heads says what of the target they are (``_features``), how they become logits (``_logits``) on which
    tokens (``_ids``: target ids ``[W]``, None for all), and how tokens are embedded (``_embed``).
    """

    needs: Needs
    name: str
    _head: Network
    _ids: Tensor | None = None
    _longest_lag = 2
    """Features that may be missing: each makes a guess of a guess."""

    def __init__(self, folder: Path | str, options: EagleOptions | None = None) -> None:
        self.folder, self.options = Path(folder), options or EagleOptions()

    @abstractmethod
    def _features(self, taps: Mapping[Tap, Tensor]) -> Tensor:
        """Features ``[n, width]`` of n tokens."""

    @abstractmethod
    def _logits(self, outputs: Tensor) -> Tensor:
        """Logits ``[m, W]``."""

    @abstractmethod
    def _embed(self, tokens: Sequence[int]) -> Tensor:
        """``[n, E]``."""

    @abstractmethod
    def _tau(self, temperature: float) -> float:
        """See ``View.scores``."""

    def open(self, view: View) -> FeatureState:
        capacity = len(view.tokens) + view.remaining + self.options.top_k * self.options.depth
        kv = self._head.new_kv(capacity)
        return FeatureState(kv, kv.new_empty(0, self._head.width))

    @torch.inference_mode()
    def propose(
        self, states: Sequence[FeatureState], views: Sequence[View], budgets: Sequence[Budget]
    ) -> list[Proposal]:
        return [self._draft(*arguments) for arguments in zip(states, views, budgets, strict=True)]

    def _room(self, state: FeatureState, view: View, budget: Budget) -> int:
        """How deep a draft may be: 0 for none. Where too many features are missing an empty draft lets the verifier
        catch up."""
        depth, lag = min(self.options.depth, budget.max_depth, view.remaining - 1), len(view.tokens) - 1 - state.count
        return depth if min(depth, budget.max_nodes, state.count) >= 1 and lag <= self._longest_lag else 0

    def _draft(self, state: FeatureState, view: View, budget: Budget) -> Proposal:
        depth = self._room(state, view, budget)
        if not depth:
            return EMPTY_DRAFT
        outputs = self._bridge(state, view.tokens, self._fill(state, view.tokens))
        root = len(view.tokens) - 1
        # Of every expanded node, the slots from the root's on that it attends.
        columns: dict[int, tuple[int, ...]] = {-1: ()}

        def deeper(level: Level) -> Rows:
            nonlocal outputs
            for node, parent in zip(level.nodes, level.parents, strict=True):
                columns[node] = (*columns[parent], len(columns) - 1)
            features = outputs[torch.tensor(level.rows, device=outputs.device)]
            seen = [columns[node] for node in level.nodes]
            outputs = self._expand(state, level.tokens, features, root, root + level.number - 1, seen)
            return Rows(self._logits(outputs), self._ids)

        first, tau = Rows(self._logits(outputs), self._ids), self._tau(view.chain.params.temperature)
        return grow(view, budget, depth, self.options.top_k, tau, self.name, first, deeper)

    def _fill(self, state: FeatureState, tokens: Sequence[int]) -> Tensor:
        """Fill all slots with a true feature; the last one's output ``[1, width]`` (made again if it was full)."""
        start, outputs = min(state.filled, state.count - 1), state.features
        while start < state.count:
            end = min(start + CHUNK, state.count)
            bias = state.kv.new_full((end - start, end - start), -torch.inf).triu(1)
            outputs = self._head.forward(
                state.features[start - state.base : end - state.base],
                self._embed(tokens[start + 1 : end + 1]),
                slice(start, end),
                state.kv,
                start,
                bias,
            )
            start = end
        state.filled = state.count
        return outputs[-1:]

    def _bridge(self, state: FeatureState, tokens: Sequence[int], outputs: Tensor) -> Tensor:
        """The output ``[1, width]`` of the last slot, past slots whose features are missing, given that of the last
        one that was filled."""
        for slot in range(state.count, len(tokens) - 1):
            outputs = self._expand(state, tokens[slot + 1 : slot + 2], outputs, slot, slot, [(0,)])
        return outputs

    def _expand(
        self, state: FeatureState, tokens: Sequence[int], features: Tensor, first: int, position: int,
        columns: Sequence[Sequence[int]],
    ) -> Tensor:  # fmt: skip
        """Outputs ``[m, width]`` of nodes at one ``position``, given those of their parents. All attend the slots
        before ``first``; ``columns`` are those from there on that each attends, its own, the newest, last."""
        width = columns[-1][-1] + 1
        bias = np.full((len(tokens), width), -np.inf, np.float32)
        for row, seen in zip(bias, columns, strict=True):
            row[list(seen)] = 0.0
        return self._head.forward(
            features,
            self._embed(tokens),
            slice(position, position + 1),
            state.kv,
            first + width - len(tokens),
            torch.from_numpy(bias).to(state.kv),
        )

    def observe(self, state: FeatureState, verdict: Verdict) -> None:
        state.add(self._features(verdict.taps))

    def truncate(self, state: FeatureState, length: int) -> None:
        # Slot length-1 goes too, for its token was taken back; its feature stays, to be paired with the next token.
        state.filled = min(state.filled, length - 1)
        state.features = state.features[: max(length - state.base, 0)]

    def finalize(self, state: FeatureState, length: int) -> None:
        keep = min(length, state.filled) - 1
        if keep > state.base:
            state.features, state.base = state.features[keep - state.base :], keep

    def close(self, state: FeatureState) -> None:
        state.kv = state.kv.new_empty(0)

    def describe(self) -> str:
        return f"{self._kind} {self.folder.name}, trees of depth {self.options.depth}, {self.options.top_k} per level"

    _kind = "head"
    """What ``describe`` calls it."""
