"""The native decoder of Llama-like models: ragged rows and trees of several sequences in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.kernels import reference
from quantspec.kernels.invariance import attention_is_invariant, choose_tiling, elementwise_is_invariant
from quantspec.kernels.reference import Linear, Tiling, rms_norm, rotate, swiglu
from quantspec.kernels.spans import MAX_TREE, ROWS, Span, is_chain, make_spans
from quantspec.models.base import Cache, Output
from quantspec.models.cache import KVCache
from quantspec.models.config import ModelConfig
from quantspec.models.rope import RopeTable
from quantspec.models.rotation import ResidualRotation
from quantspec.numerics.kv import KVFormat
from quantspec.types import Batch, Tap

Matmul = Callable[[Tensor], Tensor]
"""``[n, K]`` to ``[n, N]``: a ``reference.Linear``, or a layer of packed weights in its place."""
Attend = Callable[[Tensor, Tensor, Tensor, Span], Tensor]


@dataclass(slots=True)
class Layer:
    """Weights of one decoder layer; q, k and v, and gate and up, are fused. ``qk_norm [heads + kv_heads, head_dim]``
    holds the norm weights of every query and key head (Qwen3)."""

    input_norm: Tensor
    qkv: Matmul
    qk_norm: Tensor | None
    o: Matmul
    post_norm: Tensor
    gate_up: Matmul
    down: Matmul


@dataclass(slots=True)
class Part:
    """One sequence in a forward: its rows of the batch, its cache, its first slot, and its spans by sliding window."""

    rows: slice
    cache: KVCache
    cached: int
    attend: Attend
    spans: dict[int | None, tuple[Span, ...]]


class Decoder:
    """A causal language model (see ``models.base.CausalModel``) for the architectures of ``config.NATIVE``.

    ``embed``, ``final_norm`` and ``head`` are there for drafters. Keys and values are kept in ``kv_format`` (None: as
    they come). With ``exact`` rows are bit-identical at any width, tree, chunking and batch; ``row_invariant`` says
    whether this machine's torch bore that out.
    """

    def __init__(
        self, config: ModelConfig, embedding: Tensor, layers: list[Layer], norm: Tensor, head: Matmul, *,
        weight_bytes: int, exact: bool, kv_format: KVFormat | None = None,
    ) -> None:  # fmt: skip
        self.config, self.layers, self.weight_bytes = config, layers, weight_bytes
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.max_positions = config.max_positions
        self.embedding, self.norm, self._head, self.device = embedding, norm, head, embedding.device
        self.backend = "reference-exact" if exact else "reference-fast"
        self.notes: tuple[str, ...] = ()
        self.rotation: ResidualRotation | None = None
        self._kv_format = kv_format
        self._rope = RopeTable(config.rope, config.head_dim, self.device, embedding.dtype)
        # Queries are scaled as they are rotated; values are rotated by cos 1 and sin 0, so that one operation does all.
        sizes = torch.tensor([config.num_heads, config.num_kv_heads, config.num_kv_heads])
        per_head = torch.tensor([[config.head_dim**-0.5, 0.0], [1.0, 0.0], [0.0, 1.0]]).repeat_interleave(sizes, 0)
        self._turn, self._keep = per_head.to(self.device)[:, :, None].unbind(1)
        self._row_multiple, self.row_invariant = (ROWS, self._is_invariant()) if exact else (1, False)
        self._attend = self._exact_attention() if exact else reference.attend_fast

    def _is_invariant(self) -> bool:
        """Choose for each linear layer how exact matmuls take their rows, and check the elementwise operations."""
        tilings: dict[torch.Size, Tiling] = {}
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        for linear in [*linears, self._head]:
            assert isinstance(linear, Linear), "another matmul gives no such promise"
            shape = linear.weight.shape
            if shape not in tilings:
                tilings[shape] = choose_tiling(linear)
            linear.tiling = tilings[shape]
        return elementwise_is_invariant(self.hidden_size, self.config.intermediate_size, self.embedding)

    def _exact_attention(self) -> Attend:
        config = self.config
        together = attention_is_invariant(config.num_heads, config.num_kv_heads, config.head_dim, self.embedding)
        return reference.attend if together else reference.attend_singly

    def new_cache(self, max_length: int, max_nodes: int) -> KVCache:
        """See ``CausalModel``."""
        config = self.config
        sizes = (config.num_layers, config.num_kv_heads, config.head_dim, max_length, max_nodes)
        return KVCache(*sizes, device=self.device, dtype=self.embedding.dtype, format=self._kv_format)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """``[n, H]``."""
        return self.embedding[torch.tensor(tokens, device=self.device)]

    def final_norm(self, x: Tensor) -> Tensor:
        """``[n, H]`` to ``[n, H]``: the head's input, and the "norm" tap."""
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[n, V]`` in fp32 of normed rows ``[n, H]``."""
        n = x.shape[0]
        return self._head(self._pad(x))[:n].float()

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap] = ()) -> Output:
        """See ``CausalModel``. In exact mode pad rows, which belong to no sequence, fill up the last tile."""
        n, parts = len(batch.tokens), self._parts(batch, caches)
        cos, sin = self._rotation(batch.positions())
        x = self._pad(self.embed(batch.tokens))
        tapped: dict[Tap, Tensor] = {"embed": x[:n]} if "embed" in taps else {}
        for i, layer in enumerate(self.layers):
            x = self._layer(i, layer, x, cos, sin, parts)
            if i in taps:
                tapped[i] = x[:n]
        if "norm" in taps:
            tapped["norm"] = self.final_norm(x)[:n]
        ends = zip(batch.seq_starts[1:], batch.num_logits, strict=True)
        asked = [row for end, count in ends for row in range(end - count, end)]
        if not asked:
            return Output(x.new_empty(0, self.vocab_size, dtype=torch.float32), tapped)
        return Output(self.head(self.final_norm(x[:n] if len(asked) == n else x[asked])), tapped)

    def _pad(self, x: Tensor) -> Tensor:
        """Rows that fill up the last tile, in memory of their own (exact matmuls want it aligned)."""
        return F.pad(x, (0, 0, 0, -x.shape[0] % self._row_multiple))

    def _rotation(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """cos and sin ``[n, heads + 2 kv_heads, head_dim]`` of every row, pad rows included."""
        self._rope.grow(max(positions) + 1)
        padded = [*positions, *(0 for _ in range(-len(positions) % self._row_multiple))]
        index = torch.tensor(padded, device=self.device)
        cos, sin = self._rope.cos[index][:, None], self._rope.sin[index][:, None]
        return (cos * self._turn).add_(self._keep), sin * self._turn

    def _parts(self, batch: Batch, caches: Sequence[Cache]) -> list[Part]:
        parts, group, windows = [], self.config.num_heads // self.config.num_kv_heads, set(self.config.windows)
        for s, cache in enumerate(caches):
            assert isinstance(cache, KVCache)
            start, end, cached = batch.seq_starts[s], batch.seq_starts[s + 1], batch.cached[s]
            assert cached == cache.length, "the batch was made for another state of the cache"
            assert cached + end - start <= cache.capacity, "more rows than the cache was made for"
            if start == end:
                continue
            parents = batch.parents[start:end]
            apart = self._row_multiple > 1 and len(parents) > MAX_TREE and not is_chain(parents)
            attend = reference.attend_singly if apart else self._attend
            spans = {window: make_spans(cached, parents, window, group, self.device) for window in windows}
            parts.append(Part(slice(start, end), cache, cached, attend, spans))
        return parts

    def _layer(self, i: int, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, parts: Sequence[Part]) -> Tensor:
        heads, eps = self.config.num_heads, self.config.rms_norm_eps
        qkv = layer.qkv(rms_norm(x, layer.input_norm, eps)).view(x.shape[0], -1, self.config.head_dim)
        if layer.qk_norm is not None:
            qk = qkv[:, : layer.qk_norm.shape[0]]
            qk.copy_(rms_norm(qk, layer.qk_norm, eps))
        qkv = rotate(qkv, cos, sin)
        mixed = x.new_zeros(x.shape[0], heads * self.config.head_dim)
        for part in parts:
            rows, spans, out = qkv[part.rows], part.spans[self.config.windows[i]], mixed[part.rows]
            part.cache.write(i, part.cached, rows[:, heads:])
            keys, values = part.cache.read(i, spans[-1].end)
            for span in spans:
                out[span.rows] = part.attend(rows[span.rows, :heads], keys, values, span)
        x = x + layer.o(mixed)
        return x + layer.down(swiglu(layer.gate_up(rms_norm(x, layer.post_norm, eps))))
