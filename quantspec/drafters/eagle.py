"""EAGLE-1 and -2 (arXiv 2401.15077, 2406.16858): a one-layer head on the target's features grows a dynamic tree.

Slots, features and positions. Slot i holds the pair (f_i, t_{i+1}) at rotary position i, as in training, and predicts
t_{i+2}. With T committed tokens the verifier has handed out f_0 .. f_{T-2}, so slots 0 .. T-2 can be filled, and slot
T-2 predicts the first drafted token. A drafted node at depth d (from 1) stands at position T-2+d, with its parent's
output as its feature; siblings share the position.

Keys and values stay only for slots that were filled from true features; those of a draft tree are written past them and
overwritten by the next fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from quantspec.core.drafter import TargetParts, View
from quantspec.drafters.config import EagleOptions
from quantspec.drafters.eagle_head import EagleHead, HeadConfig, NativeEagleHead
from quantspec.drafters.eagle_rotation import read_head_for
from quantspec.drafters.tree import Tree, assemble, frontier, rerank
from quantspec.errors import ModelError
from quantspec.kernels.dispatch import NATIVE
from quantspec.types import EMPTY_DRAFT, Budget, Needs, Proposal, Verdict

if TYPE_CHECKING:
    from quantspec.models.base import CausalModel

_CHUNK = 256
"""Slots per forward while a long prompt is read, which bounds the attention scores to [heads, 256, length]."""


class _HeadedModel(Protocol):
    """The parts of a decoder that the head borrows."""

    vocab_size: int
    hidden_size: int

    def embed(self, tokens: Sequence[int]) -> Tensor: ...

    def head(self, x: Tensor) -> Tensor: ...


@dataclass(slots=True)
class EagleState:
    """``features`` are the true ones of tokens ``base`` on; slots ``0 .. filled-1`` of ``kv`` were made from such.

    Invariant after every ``observe``: ``count`` equals the verifier's cached tokens.
    """

    kv: Tensor
    features: Tensor
    base: int = 0
    filled: int = 0

    @property
    def count(self) -> int:
        """True features seen so far."""
        return self.base + self.features.shape[0]


class Eagle:
    """Drafts a tree with an EAGLE head, whose features must come from the model that verifies it."""

    needs = Needs(taps=("norm",))
    name = "eagle"

    def __init__(self, folder: Path | str, options: EagleOptions | None = None) -> None:
        self.folder, self.options = Path(folder), options or EagleOptions()
        self.config = HeadConfig.load(self.folder)

    def prepare(self, parts: TargetParts) -> None:
        if not (hasattr(parts.model, "embed") and hasattr(parts.model, "head")):
            raise ModelError(
                "an EAGLE head needs the embedding and the LM head of its target, which this target does not hand out",
                hint="use a natively supported target, or another method",
            )
        model, shape = cast(_HeadedModel, parts.model), self.config.model
        if (model.hidden_size, model.vocab_size) != (shape.hidden_size, shape.vocab_size):
            raise ModelError(
                f"{self.folder} was made for a target of width {shape.hidden_size} and {shape.vocab_size} tokens, "
                f"not {model.hidden_size} and {model.vocab_size}",
                hint="an EAGLE head works only with the model it was trained on",
            )
        probe = model.embed([0])
        model.head(probe)  # some targets have a head that cannot be borrowed, and say so here
        self._model = model
        self._load(parts.model, probe)

    def _load(self, model: CausalModel, probe: Tensor) -> None:
        """Load the head onto the device and in the type of ``probe``, a row of the target's embedding."""
        kind = NativeEagleHead if model.backend in NATIVE else EagleHead
        self._head = kind(*self._tensors(model), probe.device, probe.dtype)

    def _tensors(self, model: CausalModel) -> tuple[HeadConfig, dict[str, Tensor]]:
        """The head's configuration and weights for that target."""
        return read_head_for(self.folder, getattr(model, "rotation", None))

    def open(self, view: View) -> EagleState:
        capacity = len(view.tokens) + view.remaining + self.options.top_k * self.options.depth
        kv = self._head.new_kv(capacity)
        return EagleState(kv, kv.new_empty(0, self.config.model.hidden_size))

    @torch.inference_mode()
    def propose(self, states: Sequence[EagleState], views: Sequence[View], budgets: Sequence[Budget]) -> list[Proposal]:
        return [self._draft(*arguments) for arguments in zip(states, views, budgets, strict=True)]

    def _draft(self, state: EagleState, view: View, budget: Budget) -> Proposal:
        depth = min(self.options.depth, budget.max_depth, view.remaining - 1)
        # While features lag (tokens came without a forward) one empty draft lets the verifier catch up.
        if min(depth, budget.max_nodes) < 1 or state.count != len(view.tokens) - 1:
            return EMPTY_DRAFT
        tau, width = self.config.tau_at(view.chain.params.temperature), min(self.options.top_k, view.vocab_size)
        outputs, nodes, tree = self._fill(state, view.tokens), [-1], Tree()
        # Of every expanded node: the tokens that lead to it, and the slots past the filled ones that it attends.
        paths: dict[int, tuple[int, ...]] = {-1: ()}
        columns: dict[int, tuple[int, ...]] = {-1: ()}
        for level in range(1, depth + 1):
            best = view.best(self._model.head(outputs), [paths[node] for node in nodes], width, tau)
            start = len(tree)
            for node, tokens, scores in zip(nodes, *(rows.tolist() for rows in best), strict=True):
                tree.expand(node, tokens, scores)
            kept = rerank(tree.log_scores, budget.max_nodes, budget.price)
            grown = frontier(tree, start, kept, self.options.top_k, view.stop_ids) if level < depth else []
            if not grown:
                break
            row = {node: i for i, node in enumerate(nodes)}
            parents = [tree.parents[node] for node in grown]
            for node, parent in zip(grown, parents, strict=True):
                paths[node] = (*paths[parent], tree.tokens[node])
                columns[node] = (*columns[parent], len(columns) - 1)
            features = outputs[torch.tensor([row[parent] for parent in parents], device=outputs.device)]
            tokens = [tree.tokens[node] for node in grown]
            outputs, nodes = self._expand(state, tokens, features, level, [columns[node] for node in grown]), grown
        return assemble(tree, kept, self.name)

    def _fill(self, state: EagleState, tokens: Sequence[int]) -> Tensor:
        """Fill all slots with a true feature; the last one's output ``[1, H]`` (it is made again if it was full)."""
        start, outputs = min(state.filled, state.count - 1), state.features
        while start < state.count:
            end = min(start + _CHUNK, state.count)
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

    def _expand(
        self, state: EagleState, tokens: Sequence[int], features: Tensor, level: int, columns: Sequence[Sequence[int]]
    ) -> Tensor:
        """Outputs ``[m, H]`` of tree nodes at depth ``level`` (from 1), given their parents' outputs ``[m, H]``.
        ``columns`` are the slots past the filled ones that each attends, its own, the newest, last."""
        width = columns[-1][-1] + 1
        bias = np.full((len(tokens), width), -np.inf, np.float32)
        for row, seen in zip(bias, columns, strict=True):
            row[list(seen)] = 0.0
        position = state.filled + level - 1
        return self._head.forward(
            features,
            self._embed(tokens),
            slice(position, position + 1),
            state.kv,
            state.filled + width - len(tokens),
            torch.from_numpy(bias).to(state.kv),
        )

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        own = self._head.embed_weight
        return self._model.embed(tokens) if own is None else own[torch.tensor(tokens, device=own.device)]

    def observe(self, state: EagleState, verdict: Verdict) -> None:
        state.features = torch.cat((state.features, verdict.taps["norm"]))

    def truncate(self, state: EagleState, length: int) -> None:
        # Slot length-1 goes too, for its token was taken back; its feature stays, to be paired with the next token.
        state.filled = min(state.filled, length - 1)
        state.features = state.features[: max(length - state.base, 0)]

    def finalize(self, state: EagleState, length: int) -> None:
        keep = min(length, state.filled) - 1
        if keep > state.base:
            state.features, state.base = state.features[keep - state.base :], keep

    def close(self, state: EagleState) -> None:
        state.kv = state.kv.new_empty(0)

    def describe(self) -> str:
        return f"EAGLE head {self.folder.name}, trees of depth {self.options.depth}, {self.options.top_k} per level"
