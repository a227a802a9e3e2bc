"""One decoder layer of a Llama, Mistral, Qwen2 or Qwen3 for calibration: dense batches ``[B, T, H]`` in fp32, no cache.

It is cut at the inputs of its linear layers, so that a layer can be quantized group by group, each group on inputs
that passed the already quantized ones. The decoder that generates is another one (``quantspec.models``): ragged and
row-exact.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.models.config import ModelConfig
from quantspec.models.rope import inverse_frequencies
from quantspec.numerics.activations import round_activations
from quantspec.numerics.kv import KVFormat

STAGES: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linear layers that read the same input, in the order they run. Engines fuse each group, so it has one scheme."""
PROJECTIONS = tuple(name for stage in STAGES for name in stage)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (arXiv 1910.07467) over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class DecoderLayer:
    """Layer ``index`` with fp32 ``weights`` under their names in the layer, like ``self_attn.q_proj.weight``, which
    attends keys and values as a cache in ``kv_format`` would hold them (None: as they are) and rounds the inputs of the
    linear layers named in ``rounded`` to int8."""

    def __init__(
        self, config: ModelConfig, index: int, weights: dict[str, Tensor], kv_format: KVFormat | None = None,
        rounded: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.config, self.weights, self.kv_format, self.rounded = config, weights, kv_format, rounded
        self.window = config.windows[index]
        self._inv_freq, self._rope_factor = inverse_frequencies(config.rope, config.head_dim)

    def linear(self, name: str, x: Tensor) -> Tensor:
        x = round_activations(x) if name in self.rounded else x
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def attention_input(self, hidden: Tensor) -> Tensor:
        """What q, k and v read: ``[B, T, H]``."""
        return rms_norm(hidden, self.weights["input_layernorm.weight"], self.config.rms_norm_eps)

    def attend(self, x: Tensor) -> Tensor:
        """What the output projection reads, ``[B, T, heads * head_dim]``, from ``attention_input``."""
        rows, length, _ = x.shape
        q, k, v = (
            self.linear(f"self_attn.{name}_proj", x).view(rows, length, -1, self.config.head_dim).transpose(1, 2)
            for name in "qkv"
        )
        if self.config.qk_norm:
            q = rms_norm(q, self.weights["self_attn.q_norm.weight"], self.config.rms_norm_eps)
            k = rms_norm(k, self.weights["self_attn.k_norm.weight"], self.config.rms_norm_eps)
        cos, sin = self._rotation(length, x.device)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if self.kv_format is not None:
            k, v = (self.kv_format.decode(self.kv_format.encode(rows)) for rows in (k, v))
        repeats = self.config.num_heads // self.config.num_kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        if self.window is None or self.window >= length:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            distance = torch.arange(length, device=x.device)[:, None] - torch.arange(length, device=x.device)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < self.window))
        return mixed.transpose(1, 2).flatten(2)

    def mlp_input(self, hidden: Tensor) -> Tensor:
        """What gate and up read: ``[B, T, H]``."""
        return rms_norm(hidden, self.weights["post_attention_layernorm.weight"], self.config.rms_norm_eps)

    def gated(self, x: Tensor) -> Tensor:
        """What the down projection reads, ``[B, T, intermediate]``, from ``mlp_input``."""
        # In place: for wide layers these are the largest temporaries of a forward.
        return F.silu(self.linear("mlp.gate_proj", x), inplace=True).mul_(self.linear("mlp.up_proj", x))

    def forward(self, hidden: Tensor) -> Tensor:
        """The layer's output ``[B, T, H]``."""
        hidden = hidden + self.linear("self_attn.o_proj", self.attend(self.attention_input(hidden)))
        return hidden + self.linear("mlp.down_proj", self.gated(self.mlp_input(hidden)))

    def _rotation(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin ``[T, head_dim / 2]``."""
        angles = torch.arange(length).float()[:, None] * self._inv_freq
        return (angles.cos() * self._rope_factor).to(device), (angles.sin() * self._rope_factor).to(device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + head_dim / 2) of ``x [B, heads, T, head_dim]``."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
