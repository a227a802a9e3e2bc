"""EAGLE-1 and -2 (arXiv 2401.15077, 2406.16858): a one-layer head continues the features before the target's LM head,
and grows a dynamic tree (see ``feature_tree``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantspec.core.drafter import TargetParts
from quantspec.drafters.config import EagleOptions
from quantspec.drafters.eagle_head import EagleHead, HeadConfig, IntegerEagleHead, NativeEagleHead
from quantspec.drafters.eagle_rotation import read_head_for
from quantspec.drafters.feature_tree import FeatureTree
from quantspec.drafters.head_tensors import HeadTensors
from quantspec.drafters.target import lend
from quantspec.errors import ModelError
from quantspec.kernels.dispatch import NATIVE
from quantspec.types import Needs, Tap

if TYPE_CHECKING:
    from quantspec.models.base import CausalModel

_NATIVE_HEADS = dict(zip(NATIVE, (IntegerEagleHead, NativeEagleHead), strict=True))


class Eagle(FeatureTree):
    """Drafts a tree with an EAGLE-1 or EAGLE-2 head."""

    needs = Needs(taps=("norm",))
    name = "eagle"
    _kind = "EAGLE head"

    def __init__(self, folder: Path | str, options: EagleOptions | None = None) -> None:
        super().__init__(folder, options)
        self.config = HeadConfig.load(self.folder)

    def prepare(self, parts: TargetParts) -> None:
        model, shape = lend(parts.model, "embed", "head"), self.config.model
        if (model.hidden_size, model.vocab_size) != (shape.hidden_size, shape.vocab_size):
            raise ModelError(
                f"{self.folder} was made for a target of width {shape.hidden_size} and {shape.vocab_size} tokens, "
                f"not {model.hidden_size} and {model.vocab_size}",
                hint="an EAGLE head works only with the model it was trained on",
            )
        probe = model.embed([0])
        self._model = model
        self._load(parts.model, probe)
        self._logits(probe)  # some targets have a head that cannot be borrowed, and say so here

    def _load(self, model: CausalModel, probe: Tensor) -> None:
        """Load the head onto the device and in the type of ``probe``, a row of the target's embedding."""
        kind = _NATIVE_HEADS.get(model.backend, EagleHead)
        self._head: EagleHead = kind(*self._tensors(model), probe.device, probe.dtype)
        self._lm_head, self._ids = self._head.lm_head, self._head.ids

    def _tensors(self, model: CausalModel) -> tuple[HeadConfig, HeadTensors]:
        """The head's configuration and weights for that target."""
        return read_head_for(self.folder, getattr(model, "rotation", None))

    def _features(self, taps: Mapping[Tap, Tensor]) -> Tensor:
        return taps["norm"]

    def _logits(self, outputs: Tensor) -> Tensor:
        return self._model.head(outputs) if self._lm_head is None else self._lm_head(outputs)

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        own = self._head.embed_weight
        return self._model.embed(tokens) if own is None else own[torch.tensor(tokens, device=own.device)]

    def _tau(self, temperature: float) -> float:
        return self.config.tau_at(temperature)
