"""The native decoder of Llama-like models: ragged rows and trees of several sequences in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.kernels import reference
from quantspec.kernels.reference import Linear, rms_norm, rotate, swiglu
from quantspec.kernels.spans import MAX_TREE, ROWS, Span, is_chain, make_span, round_up
from quantspec.models.base import Output
from quantspec.models.cache import KVCache
from quantspec.models.config import ModelConfig
from quantspec.models.rope import RopeTable
from quantspec.types import Batch, Tap

Attend = Callable[[Tensor, Tensor, Tensor, Span], Tensor]


@dataclass(slots=True)
class Layer:
    """Weights of one decoder layer; q, k and v, and gate and up, are fused. ``qk_norm [heads + kv_heads, head_dim]``
    holds the norm weights of every query and key head (Qwen3)."""

    input_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(slots=True)
class Rows:
    """Where a forward's rows belong: per sequence its rows, cache, first slot, and span by sliding window."""

    cos: Tensor
    sin: Tensor
    sequences: list[tuple[slice, KVCache, int, dict[int | None, tuple[Attend, Span]]]]


class Decoder:
    """A causal language model (see ``models.base.CausalModel``) for the architectures of ``config.NATIVE``.

    ``embed``, ``final_norm`` and ``head`` are there for drafters. In exact mode rows are bit-identical at any width,
    tree, chunking and batch.
    """

    def __init__(
        self, config: ModelConfig, embedding: Tensor, layers: list[Layer], norm: Tensor, head: Linear, *,
        weight_bytes: int, exact: bool, attend: Attend = reference.attend,
    ) -> None:  # fmt: skip
        self.config, self.layers, self.weight_bytes = config, layers, weight_bytes
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.max_positions, self.row_invariant = config.max_positions, exact
        self.embedding, self.norm, self._head = embedding, norm, head
        self.device = embedding.device
        self._rope = RopeTable(config.rope, config.head_dim, self.device, embedding.dtype)
        self._attend = attend if exact else reference.attend_fast
        self._windows = set(config.windows)
        self._row_multiple = ROWS if exact else 1

    def new_cache(self, max_length: int, max_nodes: int) -> KVCache:
        config = self.config
        return KVCache(
            config.num_layers, config.num_kv_heads, config.head_dim, max_length, max_nodes, self.device, self.embedding.dtype
        )

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """``[n, H]``."""
        return self.embedding[torch.tensor(tokens, device=self.device)]

    def final_norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[n, V]`` in fp32 of normed rows ``[n, H]``."""
        n = x.shape[0]
        return self._head(self._pad(x))[:n].float()

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: Sequence[KVCache], taps: Sequence[Tap] = ()) -> Output:
        """See ``CausalModel``. In exact mode pad rows, which belong to no sequence, fill up the last tile."""
        n = len(batch.tokens)
        rows = self._rows(batch, caches)
        x = self._pad(self.embed(batch.tokens))
        tapped = {"embed": x[:n]} if "embed" in taps else {}
        for i, layer in enumerate(self.layers):
            x = self._layer(i, layer, x, rows)
            if i in taps:
                tapped[i] = x[:n]
        if "norm" in taps:
            tapped["norm"] = self.final_norm(x)[:n]
        asked = [
            row for end, count in zip(batch.seq_starts[1:], batch.num_logits, strict=True) for row in range(end - count, end)
        ]
        x = x[:n] if len(asked) == n else x[asked]
        logits = self.head(self.final_norm(x)) if asked else x.new_empty(0, self.vocab_size, dtype=torch.float32)
        return Output(logits, tapped)

    def _pad(self, x: Tensor) -> Tensor:
        missing = -x.shape[0] % self._row_multiple
        return F.pad(x, (0, 0, 0, missing)) if missing else x.clone()

    def _rows(self, batch: Batch, caches: Sequence[KVCache]) -> Rows:
        positions = batch.positions()
        self._rope.grow(max(positions) + 1)
        missing = -len(positions) % self._row_multiple
        index = torch.tensor(positions + (0,) * missing, device=self.device)
        sequences = []
        for s, cache in enumerate(caches):
            start, end, cached = batch.seq_starts[s], batch.seq_starts[s + 1], batch.cached[s]
            assert cached == cache.length and cached + end - start <= cache.capacity, "the cache does not fit the batch"
            if end > start:
                parents = batch.parents[start:end]
                apart = self.row_invariant and len(parents) > MAX_TREE and not is_chain(parents)
                attend = reference.attend_singly if apart else self._attend
                spans = {window: (attend, make_span(cached, parents, window, self.device)) for window in self._windows}
                sequences.append((slice(start, end), cache, cached, spans))
        return Rows(self._rope.cos[index][:, None], self._rope.sin[index][:, None], sequences)

    def _layer(self, i: int, layer: Layer, x: Tensor, rows: Rows) -> Tensor:
        config = self.config
        heads, kv_heads, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
        qkv = layer.qkv(rms_norm(x, layer.input_norm, eps)).view(x.shape[0], -1, config.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, eps)
        qk = rotate(qk, rows.cos, rows.sin)
        mixed = x.new_zeros(x.shape[0], heads * config.head_dim)
        for part, cache, cached, spans in rows.sequences:
            end = cached + part.stop - part.start
            cache.keys[i, :, cached:end] = qk[part, heads:].transpose(0, 1)
            cache.values[i, :, cached:end] = v[part].transpose(0, 1)
            attend, span = spans[config.windows[i]]
            mixed[part] = attend(qk[part, :heads], cache.keys[i], cache.values[i], span)
        x = x + layer.o(mixed)
        return x + layer.down(swiglu(layer.gate_up(rms_norm(x, layer.post_norm, eps))))
