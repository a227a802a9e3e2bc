"""Heads of a small model, written for its shape-scaled one: each reads the same values, and drafts the same tokens.

A head carries the constant of its target's stream (see ``places.Stream``) to its own LM head, which masks the tokens
that the small head cannot draft. LM heads have no more rows than the head's share of its target's cost allows, as
heads with a draft vocabulary of the commonest tokens have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantspec.benchmarks.scaled.decoder import (
    LABEL,
    Small,
    head_sheet,
    linear_places,
    linear_shapes,
    quantized,
    row_size,
    write_layer,
)
from quantspec.benchmarks.scaled.places import CONSTANT, Stream, settings
from quantspec.benchmarks.scaled.sheet import Sheet, SheetOf
from quantspec.benchmarks.shapes import ModelShape
from quantspec.drafters.eagle3_files import is_eagle3, read_eagle3
from quantspec.drafters.eagle3_head import Eagle3Config, Eagle3Head
from quantspec.drafters.eagle_head import DRAFT_IDS, LM_HEAD, read_head
from quantspec.drafters.head_tensors import Matrix, stored
from quantspec.drafters.medusa_files import is_medusa, read_medusa
from quantspec.drafters.peagle_files import MASK, PEagleConfig, is_peagle, read_peagle
from quantspec.errors import ModelError, UsageError
from quantspec.models import atomic
from quantspec.models.config import ModelConfig, read_config

_IDS = "eagle_aux_hidden_state_layer_ids"
_SCALED_FLAGS = frozenset({"norm_output", "norm_before_residual"})


@dataclass(frozen=True)
class Base:
    """What heads are scaled for: the small model, and the shape of the large one."""

    small: Small
    shape: ModelShape
    layers: list[int]
    """Where the small model's layers stand in it."""
    fingerprint: str
    """Of the large one's weights."""

    @property
    def stream(self) -> Stream:
        return self.small.stream(self.shape)


class HeadWriter:
    """One head's folder. ``rows``: of its LM head."""

    def __init__(self, folder: Path, base: Base, sheet_of: SheetOf, rows: int) -> None:
        self.folder, self.base, self.stream, self.rows = folder, base, base.stream, rows
        self.raw, self._sheet_of = read_config(folder), sheet_of
        self._tensors: dict[str, Tensor] = {}
        self._changed: dict[str, Any] = {}

    def write(self, out: Path, quantization: dict[str, Any] | None) -> None:
        """Raises ``ModelError``: a head of a kind, or with a setting, that is not scaled; ``UsageError``: it is wider
        than the shape."""
        kinds = ((is_medusa, self._medusa), (is_peagle, self._peagle), (is_eagle3, self._eagle3))
        next((scale for known, scale in kinds if known(self.raw)), self._eagle)()
        atomic.make_folder(out)
        atomic.save_tensors(out / "model.safetensors", self._tensors)
        raw = {key: value for key, value in self.raw.items() if key != "quantization_config"} | self._changed
        raw["quantspec"] = self.raw.get("quantspec", {}) | {"base": self.base.fingerprint} | LABEL
        atomic.write_json(out / "config.json", raw | quantized(quantization))
        atomic.write_manifest(out)

    def _sheet(self, name: str, sheet: Sheet) -> None:
        self._tensors |= sheet.tensors(name.removesuffix(".weight"))

    def _lm_head(self, name: str, weight: Matrix) -> None:
        self._sheet(name, head_sheet(self._sheet_of(self.rows, self.stream.wide), weight, self.rows, self.stream))

    def _ids(self, ids: Tensor | None, used: int) -> Tensor | None:
        """Target ids of the LM head's rows: the small head's, then tokens that only the large model has."""
        known = torch.arange(used) if ids is None else ids
        vocab = self.base.small.config.vocab_size
        every = torch.cat((known, torch.arange(vocab, vocab + self.rows - used)))
        return None if len(every) == self.base.shape.vocab else every

    def _layer(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], prefix: str, copies: int, live: Tensor
    ) -> None:
        """Linear layers of a decoder layer that reads so many rows side by side, and nothing from ``live`` columns."""
        stream = self.stream
        if config.intermediate_size > self.base.shape.inner:
            raise UsageError(
                f"{self.folder} does not go into that shape, where inner is at least {config.intermediate_size}",
                hint="choose a larger shape, or leave it out by --only",
            )
        read = torch.cat([stream.real + copy * stream.wide for copy in range(copies)])
        shapes = linear_shapes(self.base.shape)
        for name in ("q", "k", "v"):
            shapes[f"self_attn.{name}_proj"] = (shapes[f"self_attn.{name}_proj"][0], copies * stream.wide)
        places = linear_places(config, self.base.shape, read, torch.cat((read, live)), stream)
        weights = {f"{prefix}{name}.weight": stored(tensors, f"{prefix}{name}.weight") for name in shapes}
        self._tensors |= write_layer(self._sheet_of, prefix, shapes, places, weights)

    def _fuse(self, weight: Matrix, parts: int, lift: float = 1.0) -> None:
        """``fc``, which reads ``parts`` rows of the stream and hands on the constant of the last, times ``lift``."""
        stream = self.stream
        starts = torch.arange(parts)[:, None] * stream.wide
        real, constants = (starts + stream.real).flatten(), starts[:, 0] + stream.constant
        sheet = self._sheet_of(stream.wide, parts * stream.wide)
        sheet.silence(torch.cat((real, constants)))
        sheet.put(weight, stream.real, real)
        sheet.mark(torch.tensor([stream.constant]), int(constants[-1]), lift)
        self._sheet("fc", sheet)

    def _eagle(self) -> None:
        config, tensors = read_head(self.folder)
        if "embed_tokens.weight" in tensors:
            raise ModelError(f"{self.folder} has an embedding of its own", hint="heads without one can be scaled")
        stream, layer = self.stream, "layers.0."
        self._fuse(stored(tensors, "fc.weight"), 2)
        if config.fc_bias:
            self._tensors["fc.bias"] = stream.vector(tensors["fc.bias"])
        self._layer(config.model, tensors, layer, 1, torch.tensor([stream.constant]))
        norm = f"{layer}post_attention_layernorm.weight"
        self._tensors[norm] = stream.norm(tensors[norm])
        own = stored(tensors, LM_HEAD) if LM_HEAD in tensors else self.base.small.head
        self._lm_head(LM_HEAD, own)
        ids = self._ids(tensors.get(DRAFT_IDS), _rows(own))
        self._map(ids, config.model)

    def _eagle3(self) -> None:
        self._streams(*read_eagle3(self.folder))

    def _peagle(self) -> None:
        config, tensors, ids = read_peagle(self.folder)
        mask, own = tensors.pop(MASK), tensors.pop("embed_tokens.weight")
        path = {name: tensors.pop(name) for name in config.path_shapes()}
        self._streams(config.head, tensors, ids)
        stream, large = self.stream, self.base.stream
        masked = large.vector(mask.view(-1, stream.size))
        masked[-1, stream.constant] = self.base.small.constant
        table = torch.zeros(self.base.shape.vocab, stream.wide, dtype=own.dtype)
        table[: len(own), : stream.size] = own
        self._tensors |= {MASK: masked.view(1, 1, -1), "embed_tokens.weight": table, **self._path(config, path)}

    def _path(self, config: PEagleConfig, path: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A path network of the same rank, which reads outputs and embeddings where they stand in wide rows."""
        wide, columns = self.stream.wide, torch.cat((self.stream.real, self.stream.wide + self.stream.real))
        shapes = {LM_HEAD: (self.rows, config.path_rank)}
        shapes |= {f"{name}_proj.weight": (2 * config.path_rank, 2 * wide) for name in ("gate", "up")}
        scaled = {}
        for name, tensor in path.items():
            shape = shapes.get(name.removeprefix("path."), tuple(tensor.shape))
            places = columns if shape[1] > tensor.shape[1] else torch.arange(shape[1])
            scaled[name] = tensor.new_zeros(shape)
            scaled[name][: len(tensor), places] = tensor
        return scaled

    def _streams(self, config: Eagle3Config, tensors: Mapping[str, Tensor], ids: Tensor | None) -> None:
        """EAGLE-3's tensors.

        A state has the constant that draft steps hand on: the stream's, or with ``norm_output`` what the final norm
        makes of it. Where the residual stream begins normed, that norm brings it back to the stream's. What norms make
        of a constant goes by the row's size, so that of fused rows is as much larger as they are.
        """
        if config.flags - _SCALED_FLAGS or config.taps is None or "embed_tokens.weight" in tensors:
            raise ModelError(f"{self.folder} has settings that cannot be scaled", hint="plain EAGLE-3 heads can be")
        stream, constant = self.stream, self.base.small.constant
        handed = CONSTANT if "norm_output" in config.flags else constant
        normed = "norm_before_residual" in config.flags
        fused, given, state = self._sizes(config, tensors)
        lift = handed / constant * (fused / given if config.flags else 1.0)
        self._fuse(stored(tensors, "fc.weight"), config.streams, lift)
        for i in range(config.model.num_layers):
            live = [stream.wide + stream.constant] if normed and not i else []
            self._layer(config.model, tensors, f"layers.{i}.", 1 if i else 2, torch.tensor(live, dtype=torch.long))
        for name, norm in tensors.items():
            if "norm" in name:
                self._tensors[name] = stream.norm(norm)
        if normed:
            back = stream.lift(handed, given) * constant / CONSTANT
            self._tensors["layers.0.hidden_norm.weight"][stream.constant] = back
        self._tensors["norm.weight"][stream.constant] = stream.lift(constant if normed else handed, state)
        lm_head = stored(tensors, LM_HEAD)
        self._lm_head(LM_HEAD, lm_head)
        self._map(self._ids(ids, _rows(lm_head)), config.model)
        self._changed |= {
            "target_hidden_size": stream.wide,
            _IDS: [self.base.layers[tap] + 1 if isinstance(tap, int) and tap >= 0 else 0 for tap in config.taps],
        }

    def _sizes(self, config: Eagle3Config, tensors: Mapping[str, Tensor]) -> tuple[float, float, float]:
        """Of fused features, of the states that a draft step hands on, and of what comes before the final norm."""
        small, cpu = self.base.small, torch.device("cpu")
        head = Eagle3Head(config, tensors, cpu, torch.float32)
        before = Eagle3Head(replace(config, flags=config.flags - {"norm_output"}), tensors, cpu, torch.float32)
        assert config.taps is not None
        features = head.fuse([small.states[tap] for tap in config.taps])
        count = len(features) - 1
        bias = torch.full((count, count), -torch.inf).triu(1)
        own = small.embedding.float()[torch.tensor(small.tokens[1:])]

        def step(network: Eagle3Head, states: Tensor) -> Tensor:
            return network.forward(states, own, slice(0, count), network.new_kv(count), 0, bias)

        given = step(head, features[:count])
        return row_size(features), row_size(given), row_size(step(before, given if config.flags else features[:count]))

    def _map(self, ids: Tensor | None, model: ModelConfig) -> None:
        self._changed |= settings(model, {}, self.base.shape, self.stream) | {"draft_vocab_size": self.rows}
        if ids is not None:
            member = torch.zeros(self.base.shape.vocab, dtype=torch.bool).index_fill_(0, ids, True)
            self._tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": member}

    def _medusa(self) -> None:
        config, tensors, ids = read_medusa(self.folder)
        stream, constant = self.stream, torch.tensor([self.stream.constant])
        for name in config.shapes():
            if name.endswith(".bias"):
                self._tensors[name] = stream.vector(tensors[name])
            elif name.startswith("blocks."):
                sheet = self._sheet_of(stream.wide, stream.wide)
                sheet.silence(torch.cat((stream.real, constant)))
                sheet.put(stored(tensors, name), stream.real, stream.real)
                self._sheet(name, sheet)
            else:
                self._lm_head(name, stored(tensors, name))
        ids = self._ids(ids, config.draft_vocab_size)
        if ids is not None:
            self._tensors["token_map"] = ids
        self._changed = {
            "hidden_size": stream.wide, "vocab_size": self.base.shape.vocab, "truncated_vocab_size": self.rows,
        }  # fmt: skip


def _rows(weight: Matrix) -> int:
    return len(weight) if isinstance(weight, Tensor) else len(weight.codes)
