"""P-EAGLE (arXiv 2602.01469): an EAGLE-3 head that drafts a whole chain in one forward.

The last slot with a true feature says the first token, as in EAGLE-3. Behind it stand slots that read a mask, one
learned feature and one learned token, at rising positions, and say those after it: what a slot puts out does not depend
on the tokens drafted before it. The chain is as long as the budget allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantspec.core.drafter import TargetParts, View
from quantspec.drafters.config import EagleOptions
from quantspec.drafters.eagle3 import Eagle3
from quantspec.drafters.eagle3_head import Eagle3Config
from quantspec.drafters.feature_tree import CHUNK, FeatureState
from quantspec.drafters.peagle_files import MASK, read_peagle, read_peagle_config
from quantspec.drafters.tree import Tree, assemble, rerank
from quantspec.types import EMPTY_DRAFT, Budget, Proposal


class PEagle(Eagle3):
    """Drafts a chain with a P-EAGLE head."""

    name = "peagle"
    _kind = "P-EAGLE head"

    def __init__(self, folder: Path | str, longest: int) -> None:
        """``longest`` bounds a chain, as do budgets."""
        super().__init__(folder, EagleOptions(top_k=1, depth=longest))

    def _read_config(self) -> Eagle3Config:
        config = read_peagle_config(self.folder)
        self._mask_token = config.mask_token_id
        return config.head

    def _read(self) -> tuple[Eagle3Config, dict[str, Tensor], Tensor | None]:
        config, tensors, ids = read_peagle(self.folder)
        self._mask = tensors.pop(MASK).view(1, -1)
        return config.head, tensors, ids

    def prepare(self, parts: TargetParts) -> None:
        super().prepare(parts)
        own = self._head.embed_weight
        assert own is not None, "every P-EAGLE head has one"
        self._masked = self._head.fuse(self._mask.to(own).chunk(self.config.streams, dim=1))

    def _draft(self, state: FeatureState, view: View, budget: Budget) -> Proposal:
        depth = min(self._room(state, view, budget), budget.max_nodes)
        if not depth:
            return EMPTY_DRAFT
        logits = self._logits(self._forward(state, view.tokens, depth))
        tree = Tree()
        for token, score in self._best(view, logits):
            tree.expand(len(tree) - 1, [token], [score])
            if token in view.stop_ids:  # nothing follows it
                break
        return assemble(tree, rerank(tree.log_scores, budget), self.name)

    def _forward(self, state: FeatureState, tokens: Sequence[int], depth: int) -> Tensor:
        """Outputs ``[depth, width]`` that say the tokens of a draft: one forward, but for what a long prompt needs."""
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

    def _best(self, view: View, logits: Tensor) -> Iterator[tuple[int, float]]:
        """The token of each row of ``logits [depth, W]`` and its log-score."""
        tau, path = self._tau(view.chain.params.temperature), list[int]()
        if view.chain.stateless:  # of the tokens before a row only their number matters
            paths = [range(depth) for depth in range(len(logits))]
            tokens, scores = view.best(logits, paths, 1, tau, self._ids)
            yield from zip(tokens[:, 0].tolist(), scores[:, 0].tolist(), strict=True)
            return
        for row in logits.split(1):
            tokens, scores = view.best(row, [path], 1, tau, self._ids)
            path.append(int(tokens[0, 0]))
            yield path[-1], float(scores[0, 0])

    def describe(self) -> str:
        return f"{self._kind} {self.folder.name}, chains in one forward"
