"""P-EAGLE (arXiv 2602.01469): an EAGLE-3 head that drafts all its tokens in one forward.

The last slot with a true feature says the first token, as in EAGLE-3. Behind it stand slots that read a mask, one
learned feature and one learned token, at rising positions, and say those after it: what a slot puts out does not depend
on the tokens drafted before it. The paper drafts the chain of each slot's best token; here a tree grows, of the paths
with the best products over the slots (see ``tree.draft_of_rows``), of which ``top_k`` 1 leaves that chain.

A head with a path network (``peagle_path``) grows its tree level by level, as EAGLE-2 does, since what a slot says is
corrected by the token before it. It is still one forward of the layers and of the LM head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantspec.core.drafter import TargetParts, View
from quantspec.drafters.eagle3 import Eagle3
from quantspec.drafters.eagle3_head import Eagle3Config
from quantspec.drafters.feature_tree import CHUNK, FeatureState
from quantspec.drafters.peagle_files import MASK, read_peagle, read_peagle_config
from quantspec.drafters.peagle_path import PathNetwork
from quantspec.drafters.tree import Level, Rows, draft_of_rows, grow
from quantspec.types import EMPTY_DRAFT, Budget, Proposal


class PEagle(Eagle3):
    """Drafts a tree with a P-EAGLE head; ``options.depth`` is in slots, ``options.top_k`` bounds a node's children."""

    name = "peagle"
    _kind = "P-EAGLE head"
    _longest_lag = 0  # a slot without its feature reads the mask, and so would those after it

    def _read_config(self) -> Eagle3Config:
        config = read_peagle_config(self.folder)
        self._mask_token = config.mask_token_id
        return config.head

    def _read(self) -> tuple[Eagle3Config, dict[str, Tensor], Tensor | None]:
        config, tensors, ids = read_peagle(self.folder)
        self._mask = tensors.pop(MASK).view(1, -1)
        self._path_tensors = {name: tensors.pop(name) for name in config.path_shapes()}
        return config.head, tensors, ids

    def prepare(self, parts: TargetParts) -> None:
        super().prepare(parts)
        self._masked = self._head.fuse(self._mask.to(self._embed([0])).chunk(self.config.streams, dim=1))
        tensors, head = self._path_tensors, self._head
        self._path = PathNetwork(tensors, head.width, head.linear) if tensors else None

    def _draft(self, state: FeatureState, view: View, budget: Budget) -> Proposal:
        depth = min(self._room(state, view, budget), budget.max_nodes)
        if not depth:
            return EMPTY_DRAFT
        outputs = self._forward(state, view.tokens, depth)
        logits, tau = self._logits(outputs), self._tau(view.chain.params.temperature)
        if self._path is None:
            return draft_of_rows(view, logits, budget, self.options.top_k, tau, self._ids, self.name)
        path, slots = self._path, self._path.read(self._head.normed(outputs[1:]))

        def deeper(level: Level) -> Rows:
            added = path.after(slots[level.number - 1], self._embed(level.tokens))
            return Rows(logits[level.number] + added, self._ids)

        first = Rows(logits[:1], self._ids)
        budget = replace(budget, level_price=0.0)  # all slots have run: what is left of a level costs next to nothing
        return grow(view, budget, depth, self.options.top_k, tau, self.name, first, deeper)

    def _forward(self, state: FeatureState, tokens: Sequence[int], depth: int) -> Tensor:
        """Outputs ``[depth, width]`` that say the levels of a draft: one forward, but for what a long prompt needs."""
        if state.count - state.filled > CHUNK:
            self._fill(state, tokens)
        start, masks = min(state.filled, state.count - 1), depth - 1
        features = torch.cat((state.features[start - state.base :], self._masked.expand(masks, -1)))
        embeddings = self._embed([*tokens[start + 1 : state.count + 1], *[self._mask_token] * masks])
        size = len(features)
        bias = state.kv.new_full((size, size), -torch.inf).triu(1)
        outputs = self._head.forward(features, embeddings, slice(start, start + size), state.kv, start, bias)
        state.filled = state.count  # masked slots are written over by the next true ones
        return outputs[-depth:]

    def describe(self) -> str:
        depth, top_k = self.options.depth, self.options.top_k
        return f"{self._kind} {self.folder.name}, trees of depth {depth} in one forward, {top_k} tokens of each slot"
