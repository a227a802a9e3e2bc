"""Medusa (arXiv 2401.10774): heads that each guess one token further ahead, all from the target's last feature.

The paper's tree is fixed; here it grows best first, so that the nodes verified are those with the best products
of probabilities (see ``tree.draft_of_rows``). Acceptance is exact: the paper's "typical acceptance" is another text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantspec.core.drafter import TargetParts, View
from quantspec.drafters.config import EagleOptions
from quantspec.drafters.medusa_files import read_medusa, read_medusa_config
from quantspec.drafters.medusa_head import MedusaHead, NativeMedusaHead
from quantspec.drafters.target import lend
from quantspec.drafters.tau import tau_at
from quantspec.drafters.tree import draft_of_rows
from quantspec.errors import ModelError
from quantspec.kernels.dispatch import NATIVE
from quantspec.models.rotation import ResidualRotation
from quantspec.types import EMPTY_DRAFT, Budget, Draft, Needs, Verdict


@dataclass(slots=True)
class MedusaState:
    """``features`` are those of tokens ``base`` on, as far as the target has read; none before is needed again."""

    features: Tensor | None = None
    base: int = 0

    @property
    def count(self) -> int:
        return self.base + (0 if self.features is None else len(self.features))


class Medusa:
    """Drafts a tree with Medusa heads; ``options.top_k`` bounds the children of a node."""

    needs = Needs(taps=("norm",))
    name = "medusa"

    def __init__(self, folder: Path | str, options: EagleOptions | None = None) -> None:
        self.folder, self.options = Path(folder), options or EagleOptions()
        self.config = read_medusa_config(self.folder)

    def prepare(self, parts: TargetParts) -> None:
        model, config = parts.model, self.config
        if (model.hidden_size, model.vocab_size) != (config.hidden_size, config.vocab_size):
            raise ModelError(
                f"{self.folder} was made for a target of width {config.hidden_size} and {config.vocab_size} tokens, "
                f"not {model.hidden_size} and {model.vocab_size}",
                hint="Medusa heads work only with the model they were trained on",
            )
        self._rotation: ResidualRotation | None = getattr(model, "rotation", None)
        _, tensors, ids = read_medusa(self.folder)
        probe = lend(model, "embed").embed([0])
        kind = NativeMedusaHead if model.backend in NATIVE else MedusaHead
        self._head = kind(config, tensors, probe.device, probe.dtype)
        self._ids = None if ids is None else ids.to(probe.device)

    def open(self, view: View) -> MedusaState:
        return MedusaState()

    @torch.inference_mode()
    def propose(self, states: Sequence[MedusaState], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        return [self._draft(*arguments) for arguments in zip(states, views, budgets, strict=True)]

    def _draft(self, state: MedusaState, view: View, budget: Budget) -> Draft:
        depth = min(self.config.heads, self.options.depth, budget.max_depth, view.remaining - 1)
        # While features lag (tokens came without a forward) one empty draft lets the verifier catch up.
        if state.features is None or min(depth, budget.max_nodes) < 1 or state.count != len(view.tokens) - 1:
            return EMPTY_DRAFT
        rows = self._logits(state.features[-1:], depth)
        tau = tau_at(self.config.tau, view.chain.params.temperature)
        return draft_of_rows(view, rows, budget, self.options.top_k, tau, self._ids, self.name)

    def _logits(self, feature: Tensor, depth: int) -> Tensor:
        """``[depth, W]`` from a feature ``[1, H]``."""
        if self._rotation is not None:
            norm = self._rotation.final_norm.to(feature)
            feature = self._rotation.rotation.undo(feature) * norm
        return self._head.logits(feature, depth)[:, 0]

    def observe(self, state: MedusaState, verdict: Verdict) -> None:
        rows = verdict.taps["norm"]
        state.features = rows if state.features is None else torch.cat((state.features, rows))

    def truncate(self, state: MedusaState, length: int) -> None:
        if state.features is not None:
            state.features = state.features[: max(length - state.base, 0)]

    def finalize(self, state: MedusaState, length: int) -> None:
        # The last confirmed token's own feature may not be there yet; that of the one before is drafted from.
        keep = min(length, state.count) - 1
        if state.features is not None and keep > state.base:
            state.features, state.base = state.features[keep - state.base :].clone(), keep

    def close(self, state: MedusaState) -> None:
        state.features = None

    def describe(self) -> str:
        return f"Medusa heads {self.folder.name}, {self.config.heads} deep, {self.options.top_k} tokens of each"
