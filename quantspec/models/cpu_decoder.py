"""The native decoder on the CPU kernels: packed weights, and a whole forward in one call."""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from quantspec.kernels.cpu.forward import (
    ModelStruct,
    PackedLayer,
    RowsStruct,
    bind_forward,
    bind_rms_norm,
    layer_structs,
)
from quantspec.kernels.cpu.packed import PackedLinear
from quantspec.models.base import Cache, Output
from quantspec.models.cache import KVCache
from quantspec.models.config import ModelConfig
from quantspec.models.rope import RopeTable
from quantspec.models.rotation import ResidualRotation
from quantspec.numerics.kv import KVFormat
from quantspec.types import Batch, Tap

_CPU = torch.device("cpu")


class CpuDecoder:
    """A causal language model (see ``models.base.CausalModel``) whose rows are bit-identical at any width, tree,
    chunking, batch and number of threads.

    ``integer``: quantized weights meet int8 activations; else fp32 ones. ``embed``, ``final_norm`` and ``head`` are
    there for drafters. ``packed_bytes`` is what a decode step reads of the weights. Keys and values are kept in
    ``kv_format`` (None: fp32). Safe to call from several threads, each with caches of its own.
    """

    device = _CPU
    row_invariant = True

    def __init__(
        self, config: ModelConfig, embedding: PackedLinear, layers: Sequence[PackedLayer], norm: Tensor,
        head: PackedLinear, *, weight_bytes: int, integer: bool, kv_format: KVFormat | None = None,
    ) -> None:  # fmt: skip
        self.config, self.weight_bytes = config, weight_bytes
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.max_positions = config.max_positions
        self.backend = "cpu-int8" if integer else "cpu-fp32"
        self.notes: tuple[str, ...] = ()
        self.rotation: ResidualRotation | None = None
        self._embedding, self._layers, self._norm, self._head = embedding, tuple(layers), norm, head
        linears = [linear for layer in layers for linear in layer.linears]
        self.packed_bytes = sum(linear.nbytes for linear in (*linears, head))

        self._kv_format = kv_format
        row = config.head_dim if kv_format is None else kv_format.row_bytes
        self._cache_sizes = (config.num_layers, 2 * config.num_kv_heads, row)
        self._rope = RopeTable(config.rope, config.head_dim, _CPU, torch.float32)
        self._rotation = (self._rope.cos, self._rope.sin)
        self._growing = threading.Lock()
        self._layer_structs = layer_structs(self._layers)
        self._model = ModelStruct(
            ctypes.addressof(self._layer_structs), norm.data_ptr(), embedding.struct, head.struct, config.num_layers,
            config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim,
            config.rms_norm_eps, int(integer), kv_format.bits if kv_format else 32,
        )  # fmt: skip
        self._model_address = ctypes.addressof(self._model)
        self._forward, self._rms_norm = bind_forward(), bind_rms_norm()

    def new_cache(self, max_length: int, max_nodes: int) -> KVCache:
        """See ``CausalModel``."""
        config = self.config
        sizes = (config.num_layers, config.num_kv_heads, config.head_dim, max_length, max_nodes)
        return KVCache(*sizes, device=_CPU, dtype=torch.float32, format=self._kv_format)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """``[n, H]``."""
        return self._embedding.rows(torch.tensor(tokens, dtype=torch.int32))

    def final_norm(self, x: Tensor) -> Tensor:
        """``[n, H]`` to ``[n, H]``: the head's input, and the "norm" tap."""
        assert (x.shape[1:], x.dtype) == ((self.hidden_size,), torch.float32)
        x, eps = x.contiguous(), self.config.rms_norm_eps
        out = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), self._norm.data_ptr(), x.shape[0], self.hidden_size, eps, out.data_ptr())
        return out

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[n, V]`` in fp32 of normed rows ``[n, H]``."""
        return self._head(x)

    def forward(
        self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap] = (), seconds: Tensor | None = None
    ) -> Output:
        """See ``CausalModel``. ``seconds`` float64 ``[len(PARTS)]``: the time of each part is added to it."""
        n, asked = len(batch.tokens), sum(batch.num_logits)
        logits = torch.empty(asked, self.vocab_size, dtype=torch.float32)
        tapped = {tap: torch.empty(n, self.hidden_size, dtype=torch.float32) for tap in taps}
        if n == 0:
            return Output(logits, tapped)
        places, longest = self._places(batch, caches)
        cos, sin = self._rotation_of(longest)
        numbers = array("i", batch.tokens)
        assert 0 <= min(numbers) <= max(numbers) < self.vocab_size, "a token outside the vocabulary"
        for more in (batch.parents, batch.seq_starts, batch.cached, batch.num_logits):
            numbers.extend(more)
        targets = array("q")
        for tap, rows in tapped.items():
            targets.extend((self._tap_layer(tap), rows.data_ptr()))
        rows_struct = RowsStruct(
            n, len(caches), len(tapped), numbers.buffer_info()[0], places.buffer_info()[0], targets.buffer_info()[0],
            cos.data_ptr(), sin.data_ptr(), logits.data_ptr(), None if seconds is None else seconds.data_ptr(),
        )  # fmt: skip
        self._forward(self._model_address, ctypes.addressof(rows_struct))
        return Output(logits, tapped)

    def _places(self, batch: Batch, caches: Sequence[Cache]) -> tuple[array[int], int]:
        """Where each sequence's keys and values lie (struct Cache), and the most slots that a sequence then holds."""
        places, longest, starts = array("q"), 0, batch.seq_starts
        assert len(caches) == len(batch.cached), "one cache per sequence"
        for s, cache in enumerate(caches):
            assert isinstance(cache, KVCache)
            end = batch.cached[s] + starts[s + 1] - starts[s]
            assert batch.cached[s] == cache.length, "the batch was made for another state of the cache"
            assert end <= cache.capacity, "more rows than the cache was made for"
            longest = max(longest, end)
            layers, heads, _, row = cache.kv.shape
            assert (layers, heads, row) == self._cache_sizes, "a cache of another model"
            assert cache.format == self._kv_format, "a cache of another precision"
            layer_stride, head_stride, *_ = (size * cache.kv.element_size() for size in cache.kv.stride())
            places.extend((cache.kv.data_ptr(), layer_stride, head_stride))
        return places, longest

    def _tap_layer(self, tap: Tap) -> int:
        """A tap as struct TapTarget numbers it."""
        named = {"embed": -1, "norm": self.config.num_layers}
        if isinstance(tap, str):
            assert tap in named, f"no tap {tap!r}"
            return named[tap]
        assert 0 <= tap < self.config.num_layers, f"no layer {tap}"
        return tap

    def _rotation_of(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin for positions below ``positions``. Other threads may be using shorter tables meanwhile."""
        rotation = self._rotation
        if positions > rotation[0].shape[0]:
            with self._growing:
                self._rope.grow(positions)
                rotation = self._rotation = (self._rope.cos, self._rope.sin)
        return rotation
