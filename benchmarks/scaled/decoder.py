"""A small Llama checkpoint written as one of a larger shape that says the same: one decoder layer in memory at a
time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantspec.benchmarks.scaled.places import MASKED, Heads, Stream, check, layer_places, settings
from quantspec.benchmarks.scaled.sheet import Noise, Sheet, SheetOf
from quantspec.benchmarks.shapes import ModelShape
from quantspec.calibrate.export.source import Shard, Source
from quantspec.calibrate.quantize.checkpoint import copy_sidecars, write_index
from quantspec.calibrate.quantize.stream import EMBEDDING, FINAL_NORM, HEAD, layer_prefix
from quantspec.models import atomic
from quantspec.models.config import ModelConfig
from quantspec.models.load import load_model
from quantspec.models.quantization import EMBEDDING_MODULE, HEAD_MODULE
from quantspec.models.weights import to_dense
from quantspec.numerics.affine import QuantizedWeight
from quantspec.types import Batch, Tap

Places = dict[str, tuple[Tensor, Tensor, Tensor]]
"""By a linear layer's name: where its rows and columns go, and columns that it gets nothing from."""
LABEL = {"label": "shape-scaled"}
_PROBED = 64
"""Tokens by which the size of a model's states is known well enough, which is to a factor of 16."""


@dataclass(frozen=True)
class Small:
    """A model to be scaled. ``states``: what its layers ``taps`` put out for ``tokens``, and its last layer."""

    source: Source
    embedding: Tensor
    head: Tensor
    tokens: list[int]
    states: Mapping[Tap, Tensor]

    @classmethod
    def open(cls, folder: Path, seed: int) -> Small:
        """Raises ``ModelError`` as ``load_model``."""
        source = Source.open(folder)
        config, generator = source.config, torch.Generator().manual_seed(seed)
        tokens = torch.randint(config.vocab_size, (_PROBED,), generator=generator).tolist()
        model = load_model(folder, backend="reference-fast")
        taps: list[Tap] = [*range(config.num_layers), "norm"]
        states = model.forward(Batch.chain(tokens, 0, num_logits=1), [model.new_cache(_PROBED, 0)], taps).taps
        weights, vocabulary = source.weights(), (config.vocab_size, config.hidden_size)
        embedding, head = (
            to_dense(weights.linear(name, vocabulary)) for name in (EMBEDDING_MODULE, _head_module(config))
        )
        return cls(source, embedding, head, tokens, states)

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    def stream(self, shape: ModelShape) -> Stream:
        return Stream(self.config.hidden_size, shape.hidden)

    @property
    def constant(self) -> float:
        """A power of two whose square is lost beside that of any embedding in a sum in fp32."""
        least = float(self.embedding.norm(dim=1).clamp(min=1e-6).quantile(0.01))
        return 2.0 ** math.floor(math.log2(least * 2.0**-16))

    @property
    def last(self) -> float:
        """The size of rows before the final norm."""
        return row_size(self.states[self.config.num_layers - 1])


def quantized(settings: dict[str, Any] | None) -> dict[str, Any]:
    """What config.json says of it."""
    return {} if settings is None else {"quantization_config": settings}


def _head_module(config: ModelConfig) -> str:
    return EMBEDDING_MODULE if config.tied else HEAD_MODULE


def row_size(rows: Tensor) -> float:
    """The median of the rows' euclidean norms."""
    return float(rows.norm(dim=1).median())


def write_layer(
    sheet_of: SheetOf, prefix: str, shapes: Mapping[str, tuple[int, int]], places: Places,
    weights: Mapping[str, Tensor | QuantizedWeight],
) -> dict[str, Tensor]:  # fmt: skip
    """A layer's linear layers, from those of the small one."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        sheet, (rows, cols, silent) = sheet_of(*shape), places[name]
        sheet.silence(silent)
        sheet.put(weights[f"{prefix}{name}.weight"], rows, cols)
        tensors |= sheet.tensors(f"{prefix}{name}")
    return tensors


def linear_shapes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """``[N, K]`` of a decoder layer's linear layers."""
    hidden, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    mlp = {"gate": (shape.inner, hidden), "up": (shape.inner, hidden), "down": (hidden, shape.inner)}
    named = {f"self_attn.{name}_proj": size for name, size in attention.items()}
    return named | {f"mlp.{name}_proj": size for name, size in mlp.items()}


def linear_places(small: ModelConfig, shape: ModelShape, read: Tensor, silent: Tensor, stream: Stream) -> Places:
    """Of a layer whose queries, keys and values ``read`` those columns, and get nothing from ``silent`` ones."""
    heads, real, inner = Heads.of(small, shape), stream.real, torch.arange(small.intermediate_size)
    places = {
        f"self_attn.{name}_proj": (rows, read, silent)
        for name, rows in zip("qkv", (heads.q, heads.k, heads.v), strict=True)
    }
    places |= {f"mlp.{name}_proj": (inner, real, real) for name in ("gate", "up")}
    return places | {
        "self_attn.o_proj": (real, heads.o, heads.o_live),
        "mlp.down_proj": (real, inner, inner),
    }


class Scaled:
    """Writes one model. ``sheet_of`` makes its linear layers."""

    def __init__(self, small: Small, shape: ModelShape, sheet_of: SheetOf, noise: Noise, group: int) -> None:
        check(small.config, shape, group)
        self.small, self.shape, self.stream = small, shape, small.stream(shape)
        self._sheet_of, self._noise = sheet_of, noise

    def write(self, out: Path, quantization: dict[str, Any] | None, note: Mapping[str, Any]) -> None:
        """``quantization``: of config.json; ``note`` is added to its label."""
        atomic.make_folder(out)
        copy_sidecars(self.small.source.folder, out)
        count = self.shape.layers + 2 - self.shape.tied
        for number, shard in enumerate(self._shards(), 1):
            atomic.save_tensors(out / f"model-{number:05d}-of-{count:05d}.safetensors", shard)
        write_index(out)
        raw = {key: value for key, value in self.small.source.raw.items() if key != "quantization_config"}
        raw = settings(self.small.config, raw, self.shape, self.stream)
        raw |= {"num_hidden_layers": self.shape.layers, "tie_word_embeddings": self.shape.tied}
        raw |= {"quantspec": raw.get("quantspec", {}) | LABEL | dict(note)} | quantized(quantization)
        atomic.write_json(out / "config.json", raw)
        atomic.write_manifest(out)

    def _shards(self) -> Iterator[dict[str, Tensor]]:
        config, source = self.small.config, self.small.source.shards()
        taken = set(layer_places(config.num_layers, self.shape.layers))
        number = 0
        for index in range(self.shape.layers):
            if index in taken:
                yield self._layer(index, number, next(source))
                number += 1
            else:
                yield self._identity(index)
        vocabulary = next(source)
        yield self._embedding() | {FINAL_NORM: self._final_norm(vocabulary[FINAL_NORM])}
        if not self.shape.tied:
            yield {HEAD: self._head(self.small.head)}

    def _layer(self, index: int, number: int, shard: Shard) -> dict[str, Tensor]:
        old, prefix = layer_prefix(number), layer_prefix(index)
        weights = {prefix + name.removeprefix(old): weight for name, weight in shard.items()}
        real = self.stream.real
        places = linear_places(self.small.config, self.shape, real, real, self.stream)
        tensors = write_layer(self._sheet_of, prefix, linear_shapes(self.shape), places, weights)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = self.stream.norm(to_dense(weights[f"{prefix}{name}.weight"]))
        return tensors

    def _identity(self, index: int) -> dict[str, Tensor]:
        """A layer that computes on its real inputs like any other, and adds nothing."""
        prefix, tensors = layer_prefix(index), dict[str, Tensor]()
        for name, shape in linear_shapes(self.shape).items():
            sheet = self._sheet_of(*shape)
            if name.endswith(("o_proj", "down_proj")):
                sheet.silence(torch.arange(shape[1]))
            tensors |= sheet.tensors(prefix + name)
        ones = self.stream.norm(torch.ones(self.stream.size))
        return tensors | {f"{prefix}{name}_layernorm.weight": ones for name in ("input", "post_attention")}

    def _final_norm(self, weight: Tensor | QuantizedWeight) -> Tensor:
        return self.stream.norm(to_dense(weight), self.stream.lift(self.small.constant, self.small.last))

    def _embedding(self) -> dict[str, Tensor]:
        """Rows of the small model's tokens; the others are never looked up, and of a tied head they are masked."""
        table, stream, small = self._noise.floats(self.shape.vocab, self.shape.hidden), self.stream, self.small
        table[: len(small.embedding)] = 0
        table[: len(small.embedding), : stream.size] = small.embedding.to(table.dtype)
        table[: len(small.embedding), stream.constant] = small.constant
        table[len(small.embedding) :, stream.constant] = MASKED
        return {EMBEDDING: table}

    def _head(self, small: Tensor) -> Tensor:
        head, stream = self._noise.floats(self.shape.vocab, self.shape.hidden), self.stream
        head[: len(small), : stream.size] = small.to(head.dtype)
        head[: len(small), stream.constant] = 0
        head[len(small) :, stream.constant] = MASKED
        return head


def head_sheet(sheet: Sheet, rows: Tensor | QuantizedWeight, count: int, stream: Stream) -> Sheet:
    """An LM head of ``count`` rows, the small one's first and the others masked."""
    real, constant = stream.real, torch.tensor([stream.constant])
    used = len(rows) if isinstance(rows, Tensor) else len(rows.codes)
    sheet.silence(torch.cat((real, constant)))
    sheet.put(rows, torch.arange(used), real)
    sheet.mark(torch.arange(used, count), stream.constant, MASKED)
    return sheet
