"""EAGLE-3 and 3.1 (arXiv 2503.01840): a head on streams of several layers of its target, with a vocabulary of its own,
grows the same dynamic tree as EAGLE-2 (see ``feature_tree``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantspec.core.drafter import TargetParts
from quantspec.drafters.config import EagleOptions
from quantspec.drafters.eagle3_files import read_eagle3, read_eagle3_config
from quantspec.drafters.eagle3_head import Eagle3Config, Eagle3Head, IntegerEagle3Head, NativeEagle3Head
from quantspec.drafters.feature_tree import FeatureTree
from quantspec.drafters.target import layer_count, lend
from quantspec.drafters.tau import tau_at
from quantspec.errors import ModelError
from quantspec.kernels.dispatch import NATIVE
from quantspec.models.base import CausalModel
from quantspec.models.rotation import ResidualRotation
from quantspec.types import Batch, Needs, Tap

_NATIVE_HEADS = dict(zip(NATIVE, (IntegerEagle3Head, NativeEagle3Head), strict=True))


class Eagle3(FeatureTree):
    """Drafts a tree with an EAGLE-3 head."""

    name = "eagle3"
    _kind = "EAGLE-3 head"
    _head: Eagle3Head

    def __init__(self, folder: Path | str, options: EagleOptions | None = None) -> None:
        super().__init__(folder, options)
        self.config = self._read_config()
        self.needs = Needs()

    def _read_config(self) -> Eagle3Config:
        return read_eagle3_config(self.folder)

    def _read(self) -> tuple[Eagle3Config, dict[str, Tensor], Tensor | None]:
        """See ``read_eagle3``."""
        return read_eagle3(self.folder)

    def prepare(self, parts: TargetParts) -> None:
        self._model = model = parts.model
        self._taps = self._taps_of(model)
        self.needs = Needs(taps=tuple(dict.fromkeys(self._taps)))
        self._rotation: ResidualRotation | None = getattr(model, "rotation", None)
        config, tensors, ids = self._read()
        self._lender = lend(model, "embed")
        probe = self._lender.embed([0])
        if "embed_tokens.weight" not in tensors and probe.shape[1] != config.model.hidden_size:
            raise ModelError(
                f"{self.folder} brings no embedding, and its target's has width {probe.shape[1]}, not "
                f"{config.model.hidden_size}"
            )
        kind = _NATIVE_HEADS.get(model.backend, Eagle3Head)
        self._head = kind(config, tensors, probe.device, probe.dtype)
        self._ids = None if ids is None else ids.to(probe.device)

    def _taps_of(self, model: CausalModel) -> tuple[Tap, ...]:
        """The taps on that target. Raises ``ModelError``: the head was made for another one."""
        config, layers, hint = self.config, layer_count(model), "an EAGLE-3 head works only with its own target"
        found = (model.hidden_size, model.vocab_size)
        if found != (config.target_hidden_size, config.model.vocab_size):
            raise ModelError(
                f"{self.folder} was made for a target of width {config.target_hidden_size} and "
                f"{config.model.vocab_size} tokens, not {found[0]} and {found[1]}",
                hint=hint,
            )
        taps = config.taps_of(layers)
        if taps is None:
            raise ModelError(f"{self.folder} does not say which layers it reads, and its target not how many it has")
        beyond = [tap for tap in taps if isinstance(tap, int) and layers is not None and tap >= layers]
        if beyond:
            raise ModelError(
                f"{self.folder} reads its target after layer {beyond[0]} (from 0), but there are only {layers} layers",
                hint=hint,
            )
        return taps

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What it reads of its target."""
        return self._taps

    def neighbours(self) -> list[tuple[Tap, ...]]:
        """What it would read if its layer ids were counted otherwise, or were those of published heads."""
        layers, own = layer_count(self._model), [-1 if tap == "embed" else tap for tap in self._taps]
        wanted = [[tap + by for tap in own if isinstance(tap, int)] for by in (1, -1)]
        found = [tuple("embed" if tap < 0 else tap for tap in taps) for taps in wanted if len(taps) == len(own)]
        if len(own) == 3 and (usual := replace(self.config, taps=None).taps_of(layers)) is not None:
            found.append(usual)
        return [taps for taps in found if not any(isinstance(tap, int) and tap >= (layers or 0) for tap in taps)]

    @torch.inference_mode()
    def rate(self, tokens: Sequence[int], taps: tuple[Tap, ...]) -> float:
        """The share of ``tokens``, from the third on, that it would choose itself after those before them if it read
        its target after ``taps``."""
        count = len(tokens) - 2
        cache = self._model.new_cache(len(tokens), 0)
        output = self._model.forward(Batch.chain(tokens[:count], 0, num_logits=1), [cache], tuple(dict.fromkeys(taps)))
        own, self._taps = self._taps, taps
        try:
            features = self._features(output.taps)
        finally:
            self._taps = own
        bias = features.new_full((count, count), -torch.inf).triu(1)
        kv, embedded = self._head.new_kv(count), self._embed(tokens[1:-1])
        chosen = self._logits(self._head.forward(features, embedded, slice(0, count), kv, 0, bias)).argmax(-1)
        chosen = chosen if self._ids is None else self._ids[chosen]
        return float((chosen.cpu() == torch.tensor(tokens[2:])).float().mean())

    def _features(self, taps: Mapping[Tap, Tensor]) -> Tensor:
        streams = [taps[tap] for tap in self._taps]
        if self._rotation is not None:
            streams = [self._rotation.rotation.undo(stream) for stream in streams]
        return self._head.fuse(streams)

    def _logits(self, outputs: Tensor) -> Tensor:
        return self._head.logits(outputs)

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        if (own := self._head.embed(tokens)) is not None:
            return own
        rows = self._lender.embed(tokens)
        return rows if self._rotation is None else self._rotation.rotation.undo(rows)

    def _tau(self, temperature: float) -> float:
        return tau_at(self.config.tau, temperature)
