"""The EAGLE-3 network (arXiv 2503.01840): streams of three layers of the target, fused into one, start a state that
draft steps hand on.

The first layer's queries, keys and values read ``[norm(embedding), norm(state)]``, twice the width; layers after it
are plain ones. The LM head is the head's own, on a vocabulary of its own. What a step hands on is its output before the
final norm, or after it (``norm_output``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.drafters.head_layer import HeadLayer, Weights, fuse_layer, layer_shapes, new_kv, rms_norm
from quantspec.drafters.head_tensors import Matrix, stored
from quantspec.kernels.cpu.eagle import EagleKernel
from quantspec.kernels.cpu.packed import pack_any
from quantspec.models.config import ModelConfig
from quantspec.models.rope import RopeTable
from quantspec.models.weights import to_dense
from quantspec.types import Tap

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor], Tensor]
"""The stream ``[m, H]`` after a layer, from that before it, embeddings ``[m, H]``, cos, sin, kv, start and bias (see
``feature_tree.Network``)."""

FLAGS = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")
"""Variants of the network: a norm on each tapped stream (3.1); handing on normed outputs (3.1); one norm on all tapped
streams together; a residual stream that starts from the normed state."""


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """Shape and rules of a head. ``layer`` is the config of its layers as it was read, for writing it again.

    ``model.vocab_size`` is the target's; ``taps`` are the target's layers, from 0, *after* which its stream is read
    (None: those of published heads); ``tau`` see ``tau.tau_at``.
    """

    model: ModelConfig
    layer: Mapping[str, Any]
    target_hidden_size: int
    draft_vocab_size: int
    taps: tuple[Tap, ...] | None = None
    flags: frozenset[str] = frozenset()
    tau: Mapping[float, float] = field(default_factory=dict)
    base: str | None = None
    """The weights of the target that it was trained on, for people."""

    @property
    def streams(self) -> int:
        """How many streams ``fc`` reads."""
        return 3 if self.taps is None else len(self.taps)

    def taps_of(self, layers: int | None) -> tuple[Tap, ...] | None:
        """The taps on a target of that many layers; None if neither says."""
        if self.taps is not None or layers is None:
            return self.taps
        # Published heads read the streams that enter layers 2, L // 2 and L - 3.
        return tuple("embed" if tap < 0 else tap for tap in (1, layers // 2 - 1, layers - 4))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor a head must have, besides its vocabulary map."""
        model, width = self.model, self.target_hidden_size
        hidden = model.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, self.streams * width)}
        if "fc_norm" in self.flags:
            shapes |= {f"fc_norm.{i}.weight": (width,) for i in range(self.streams)}
        if "norm_before_fc" in self.flags:
            shapes["input_norm.weight"] = (self.streams * width,)
        for i in range(model.num_layers):
            shapes |= layer_shapes(model, f"layers.{i}.", hidden if i else 2 * hidden)
            shapes[f"layers.{i}.input_layernorm.weight"] = (hidden,)
        shapes["layers.0.hidden_norm.weight"] = (hidden,)
        return shapes | {"norm.weight": (hidden,), "lm_head.weight": (self.draft_vocab_size, hidden)}


class Eagle3Head:
    """The network: see ``feature_tree.Network``. ``kv`` has a leading dimension of layers."""

    def __init__(
        self, config: Eagle3Config, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        """``tensors`` by the names of ``config.shapes()``, and perhaps ``embed_tokens.weight``."""
        self.config, self.width, self._device, self._dtype = config, config.model.hidden_size, device, dtype
        self._rope = RopeTable(config.model.rope, config.model.head_dim, device, dtype)
        self._norms = {name: each.to(device, dtype) for name, each in tensors.items() if "norm" in name}
        own = tensors.get("embed_tokens.weight")
        self._embed_weight = None if own is None else own.to(device)  # as it is stored: few of its rows are ever read
        self._fc, self._lm_head = (self.linear(stored(tensors, name)) for name in ("fc.weight", "lm_head.weight"))
        self._layers = [
            self._layer(i, fuse_layer(config.model, tensors, f"layers.{i}.")) for i in range(config.model.num_layers)
        ]

    def linear(self, weight: Matrix) -> Callable[[Tensor], Tensor]:
        """Products ``[n, K] -> [n, N]`` with a weight ``[N, K]``."""
        held = to_dense(weight).to(self._device, self._dtype)
        return lambda x: F.linear(x, held)

    def embed(self, tokens: Sequence[int]) -> Tensor | None:
        """``[n, width]`` by its own embedding, None where it has none."""
        if self._embed_weight is None:
            return None
        return self._embed_weight[torch.tensor(tokens, device=self._device)].to(self._dtype)

    def _layer(self, i: int, weights: Weights) -> Layer:
        flags, name = self.config.flags, f"layers.{i}."
        norm = self._norms[f"{name}post_attention_layernorm.weight"]
        layer = HeadLayer(self.config.model, weights, norm, self._device, self._dtype)

        def forward(
            x: Tensor, embeddings: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, start: int, bias: Tensor
        ) -> Tensor:
            if i:
                return layer.forward(x, self._norm(x, f"{name}input_layernorm"), cos, sin, kv, start, bias)
            normed = self._norm(x, f"{name}hidden_norm")
            read = torch.cat((self._norm(embeddings, f"{name}input_layernorm"), normed), dim=1)
            return layer.forward(normed if "norm_before_residual" in flags else x, read, cos, sin, kv, start, bias)

        return forward

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self._norms[f"{name}.weight"], self.config.model.rms_norm_eps)

    def new_kv(self, capacity: int) -> Tensor:
        """Zeroed keys and values, ``[layers, 2, kv_heads, capacity, head_dim]``."""
        model = self.config.model
        return torch.stack([new_kv(model, capacity, self._device, self._dtype) for _ in range(model.num_layers)])

    def fuse(self, streams: Sequence[Tensor]) -> Tensor:
        """Features ``[n, width]`` from one stream ``[n, target_hidden_size]`` per tap."""
        flags = self.config.flags
        if "fc_norm" in flags:
            streams = [self._norm(stream, f"fc_norm.{i}") for i, stream in enumerate(streams)]
        fused = torch.cat(list(streams), dim=1)
        return self._fc(self._norm(fused, "input_norm") if "norm_before_fc" in flags else fused)

    def forward(
        self, features: Tensor, embeddings: Tensor, positions: slice, kv: Tensor, start: int, bias: Tensor
    ) -> Tensor:
        """See ``feature_tree.Network``."""
        self._rope.grow(positions.stop)
        cos, sin = self._rope.cos[positions], self._rope.sin[positions]
        x = features
        for layer, own in zip(self._layers, kv, strict=True):
            x = layer(x, embeddings, cos, sin, own, start, bias)
        return self._norm(x, "norm") if "norm_output" in self.config.flags else x

    def normed(self, outputs: Tensor) -> Tensor:
        """What the LM head reads ``[m, width]``, of outputs ``[m, width]``."""
        return outputs if "norm_output" in self.config.flags else self._norm(outputs, "norm")

    def logits(self, outputs: Tensor) -> Tensor:
        """``[m, draft_vocab_size]`` from outputs ``[m, width]``."""
        return self._lm_head(self.normed(outputs))


class NativeEagle3Head(Eagle3Head):
    """The same on the CPU kernels: one call per layer, weights as the checkpoint has them."""

    _integer = False

    def linear(self, weight: Matrix) -> Callable[[Tensor], Tensor]:
        return pack_any(weight, integer=self._integer)

    def _layer(self, i: int, weights: Weights) -> Layer:
        model, name = self.config.model, f"layers.{i}."
        return EagleKernel(
            weights, self._norms[f"{name}post_attention_layernorm.weight"], eps=model.rms_norm_eps,
            heads=model.num_heads, kv_heads=model.num_kv_heads, head_dim=model.head_dim,
            input_norm=self._norms[f"{name}input_layernorm.weight"],
            hidden_norm=None if i else self._norms[f"{name}hidden_norm.weight"],
            residual_normed=not i and "norm_before_residual" in self.config.flags, integer=self._integer,
        )  # fmt: skip


class IntegerEagle3Head(NativeEagle3Head):
    """With int8 activations, where the weights are quantized: beside a target that has them too."""

    _integer = True
