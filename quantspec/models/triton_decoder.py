"""The native decoder on Triton's kernels: packed weights, and a forward that is one CUDA graph for up to 64 rows."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.kernels.draws import Layout
from quantspec.kernels.triton.attention import attention
from quantspec.kernels.triton.norm import rms_norm
from quantspec.kernels.triton.rope import rope
from quantspec.kernels.triton.rows import ALIGNMENT
from quantspec.kernels.triton.sampling import draw
from quantspec.kernels.triton.swiglu import swiglu
from quantspec.models.base import Cache, Drawing, Output
from quantspec.models.config import ModelConfig
from quantspec.models.rope import RopeTable
from quantspec.models.rotation import ResidualRotation
from quantspec.models.triton_cache import Storage, TritonCache, allocate_kv, slots_for
from quantspec.models.triton_frame import TILES, Frame, tile_for
from quantspec.models.triton_graphs import Graphs, current
from quantspec.models.triton_rounds import Round, rounds_of
from quantspec.numerics.kv import KVFormat
from quantspec.types import Batch, Tap

Matmul = Callable[[Tensor], Tensor]
"""``[n, K]`` to ``[n, N]``, by a kernel whose rows do not depend on n."""
_SPARE_CACHES = 2


@dataclass(frozen=True, slots=True)
class TritonLayer:
    """Weights of one decoder layer; q, k and v, and gate and up, are fused. ``qk_norm [heads + kv_heads, head_dim]``
    holds the norm weights of every query and key head (Qwen3); ``window`` is that of its attention."""

    input_norm: Tensor
    qkv: Matmul
    qk_norm: Tensor | None
    o: Matmul
    post_norm: Tensor
    gate_up: Matmul
    down: Matmul
    window: int | None


class TritonDecoder:
    """A causal language model (see ``models.base.CausalModel``) whose rows are bit-identical at any width, tree,
    chunking and batch, as far as the kernels keep their word on the device.

    Activations, keys and values have the dtype of ``embedding [V, H]``; keys and values with a ``kv_format`` that one.
    Taps are handed out in fp32. ``head`` gives fp32. ``embed``, ``final_norm`` and ``head`` are there for drafters.
    """

    row_invariant = True
    backend = "triton"

    def __init__(
        self, config: ModelConfig, embedding: Tensor, layers: Sequence[TritonLayer], norm: Tensor, head: Matmul, *,
        weight_bytes: int, kv_format: KVFormat | None = None,
    ) -> None:  # fmt: skip
        self.kv_format = kv_format
        self.config, self.weight_bytes = config, weight_bytes
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.max_positions, self.notes = config.max_positions, tuple[str, ...]()
        self.rotation: ResidualRotation | None = None
        self.device, self.dtype = embedding.device, embedding.dtype
        self._embedding, self._layers, self._norm, self._head = embedding, tuple(layers), norm, head
        self._next_norms = (*(layer.input_norm for layer in layers[1:]), norm)
        self._rope = RopeTable(config.rope, config.head_dim, self.device, torch.float32)
        self._graphs = Graphs(self.device)
        self._spare: deque[Storage] = deque(maxlen=_SPARE_CACHES)
        self._lock = threading.Lock()  # graphs share memory, and caches of one length their graphs

    def new_cache(self, max_length: int, max_nodes: int) -> TritonCache:
        """See ``CausalModel``. A cache that is gone leaves its memory, and the graphs that hold its address, to the
        next of the same size. Raises ``ResourceError``: no memory."""
        config, slots = self.config, slots_for(max_length, max_nodes)
        form = self.kv_format
        row, stored = (config.head_dim, self.dtype) if form is None else (form.row_bytes, torch.uint8)
        shape = (config.num_layers, 2 * config.num_kv_heads, slots, row)
        with self._lock:
            storage = next((spare for spare in tuple(self._spare) if spare.kv.shape == shape), None)
            if storage is not None:
                self._spare.remove(storage)
            else:
                self._spare.clear()
                self._rope.grow(slots)
                kv = allocate_kv(shape, self.device, stored)
                storage = Storage(kv, self._rope.cos, self._rope.sin)
        cache = TritonCache(storage, max_length, max_nodes)
        weakref.finalize(cache, self._spare.append, storage)
        return cache

    def leave_graphs(self) -> bool:
        """Launch kernels one by one from now on. False: so it did already."""
        used, self._graphs.usable = self._graphs.usable, False
        return used

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """``[n, H]``."""
        return self._embedding[self._numbers(tokens)].float()

    def embed_rows(self, tokens: Tensor) -> Tensor:
        """``[n, H]`` in the type of the activations, of tokens ``[n]`` that are on the device."""
        return F.embedding(tokens, self._embedding)

    def final_norm(self, x: Tensor) -> Tensor:
        """``[n, H]`` to ``[n, H]``: the head's input, and the "norm" tap."""
        rows = _aligned(x.to(self.dtype).contiguous())
        with current(self.device):
            return rms_norm(rows, self._norm, self.config.rms_norm_eps)[0].float()

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[n, V]`` in fp32 of normed rows ``[n, H]``."""
        with current(self.device):
            return self._head(_aligned(x.to(self.dtype).contiguous()))

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap] = ()) -> Output:
        """See ``CausalModel``. Up to 64 rows of one sequence are a graph from the second time on; other batches, and
        long prompts in rounds, are launched kernel by kernel."""
        return self._forward(batch, caches, taps, None)

    @torch.inference_mode()
    def draw(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap], drawing: Drawing) -> Output:
        """See ``DrawingModel``: the draws are a part of the same graphs."""
        return self._forward(batch, caches, taps, drawing)

    def _forward(
        self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap], drawing: Drawing | None
    ) -> Output:  # fmt: skip
        n, storages, asked = len(batch.tokens), self._storages(batch, caches), self._taps(taps)
        logits = torch.empty(sum(batch.num_logits), self.vocab_size, device=self.device)
        tapped = {tap: torch.empty(n, self.hidden_size, device=self.device) for tap in asked}
        draws = None
        if drawing is not None:
            draws = torch.empty(len(logits), drawing.layout.width, dtype=torch.int32, device=self.device)
        with self._lock, current(self.device):
            for part in rounds_of(batch):
                held = [storages[s] for s in part.sequences]
                short = len(held) == 1 and part.n <= TILES[-1]
                output = self._short(part, held[0], asked, drawing) if short else self._long(part, held, asked, drawing)
                # Copies, since the next replay writes over its results. Those of a whole batch lie in its order.
                whole = part.n == n
                places = slice(None) if whole else self._numbers(part.logits)
                logits[places] = output.logits
                if draws is not None and output.draws is not None:
                    draws[places] = output.draws
                for tap, rows in output.taps.items():
                    tapped[tap][slice(None) if whole else self._numbers(part.rows)] = rows[: part.n]
        return Output(logits, tapped, draws)

    def _short(self, part: Round, storage: Storage, taps: tuple[Tap, ...], drawing: Drawing | None) -> Output:
        """Rows of one sequence, filled up to a tile; by a graph, if there is one. Logits of its last rows are kept."""
        frame, layout = storage.frame(tile_for(part.n)), drawing.layout if drawing else None
        frame.fill_round(part, drawing)
        key = tile_for(part.n), taps, layout

        def run() -> Output:
            return self._run(frame, [storage], taps, layout)

        if self._graphs.usable and key in storage.graphs and storage.graphs[key] is None:
            storage.graphs[key] = self._graphs.capture(run)
            self.notes += () if self._graphs.usable else (self._graphs.failure,)
        replay = storage.graphs.setdefault(key, None)
        output = run() if replay is None else replay()
        kept = slice(part.n - len(part.logits), part.n)
        return Output(output.logits[kept], output.taps, None if output.draws is None else output.draws[kept])

    def _long(
        self, part: Round, storages: list[Storage], taps: tuple[Tap, ...], drawing: Drawing | None
    ) -> Output:  # fmt: skip
        frame = Frame([len(parents) for parents in part.parents], self.device)
        frame.fill_round(part, drawing)
        asked = None if len(part.with_logits) == part.n else self._numbers(part.with_logits)
        return self._run(frame, storages, taps, drawing.layout if drawing else None, asked)

    def _run(
        self, frame: Frame, storages: Sequence[Storage], taps: tuple[Tap, ...], layout: Layout | None,
        asked: Tensor | None = None,
    ) -> Output:  # fmt: skip
        """All launches of a forward, none of which waits for the device. ``asked``: rows with logits; None: all."""
        x = self.embed_rows(frame.tokens)
        tapped: dict[Tap, Tensor] = {"embed": x.float()} if "embed" in taps else {}
        eps = self.config.rms_norm_eps
        normed, stream = rms_norm(x, self._layers[0].input_norm, eps)
        for i, layer in enumerate(self._layers):
            mixed = self._attend(i, layer, layer.qkv(normed), frame, storages)
            normed, stream = rms_norm(layer.o(mixed), layer.post_norm, eps, stream)
            inner = layer.down(swiglu(layer.gate_up(normed)))
            normed, stream = rms_norm(inner, self._next_norms[i], eps, stream)
            if i in taps:
                tapped[i] = stream.float()
        if "norm" in taps:
            tapped["norm"] = normed.float()
        logits = self._head(normed if asked is None else normed.index_select(0, asked))
        if layout is None:
            return Output(logits, tapped)
        dials, positions = frame.dials, frame.positions()
        if asked is not None:
            dials, positions = dials.select(asked), positions.index_select(0, asked)
        return Output(logits, tapped, draw(logits, dials, positions, layout))

    def _attend(self, i: int, layer: TritonLayer, qkv: Tensor, frame: Frame, storages: Sequence[Storage]) -> Tensor:
        """``[n, heads * head_dim]``, sequence by sequence."""
        results, config = [], self.config
        for part, rows, storage in zip(qkv.split(frame.sizes), frame.rows, storages, strict=True):
            per_head, kv = _aligned(part).view(len(rows), -1, config.head_dim), storage.kv[i]
            q = rope(per_head, storage.cos, storage.sin, rows, kv, layer.qk_norm, config.rms_norm_eps, self.kv_format)
            keys, values = kv.chunk(2)
            results.append(attention(q, keys, values, rows, layer.window, self.kv_format))
        return results[0] if len(results) == 1 else torch.cat(results)

    def _numbers(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(self.device, non_blocking=True)

    def _taps(self, taps: Sequence[Tap]) -> tuple[Tap, ...]:
        known = ("embed", *range(self.config.num_layers), "norm")
        assert all(tap in known for tap in taps), f"a tap that is none of {known}"
        return tuple(dict.fromkeys(taps))

    def _storages(self, batch: Batch, caches: Sequence[Cache]) -> list[Storage]:
        storages, starts = [], batch.seq_starts
        assert len(caches) == len(batch.cached), "one cache per sequence"
        assert all(0 <= token < self.vocab_size for token in batch.tokens), "a token outside the vocabulary"
        for s, cache in enumerate(caches):
            assert isinstance(cache, TritonCache)
            assert batch.cached[s] == cache.length, "the batch was made for another state of the cache"
            assert cache.length + starts[s + 1] - starts[s] <= cache.capacity, "more rows than the cache was made for"
            storages.append(cache.storage)
        return storages


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()
