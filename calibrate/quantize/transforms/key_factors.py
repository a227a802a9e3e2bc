"""Keys made alike for a cache of few bits: channels that tower over the others would set the scale of them all.

Each channel of a key is divided by the largest magnitude that it had on the calibration text, and the queries' channel
multiplied by it. Both channels of a RoPE pair share a factor, so that it passes through the rotation, and all of it
folds into weights: those of q and k and their biases, or, where queries and keys are normed last (Qwen3), the norms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.evaluate import batches
from quantspec.calibrate.quantize.layer import DecoderLayer, rms_norm
from quantspec.calibrate.quantize.transforms.base import Folded
from quantspec.errors import ModelError
from quantspec.numerics.scheme import Scheme

_LEAST = 2.0**-10
"""Of a head's largest magnitude: below it a channel is as good as silent."""


def fold_key_factors(
    layer: DecoderLayer, hidden: Tensor, schemes: Callable[[str], Scheme | None], options: MethodOptions
) -> Folded:
    """See ``LayerTransform``."""
    config, weights = layer.config, layer.weights
    largest = _largest_pairs(layer, hidden)
    if config.qk_norm:  # one weight for all heads
        factors = key_factors(largest.amax(0)).repeat(2)
        weights["self_attn.q_norm.weight"] *= factors
        weights["self_attn.k_norm.weight"] /= factors
        return Folded({"self_attn.q_norm.weight", "self_attn.k_norm.weight"})
    factors = key_factors(largest).repeat(1, 2)
    kinds = ("weight", "bias") if config.qkv_bias else ("weight",)
    queries = factors.repeat_interleave(config.num_heads // config.num_kv_heads, 0)
    for kind in kinds:
        q, k = weights[f"self_attn.q_proj.{kind}"], weights[f"self_attn.k_proj.{kind}"]
        q *= queries.flatten().view(-1, *(1,) * (q.dim() - 1))
        k /= factors.flatten().view(-1, *(1,) * (k.dim() - 1))
    return Folded({f"self_attn.{name}_proj.{kind}" for name in "qk" for kind in kinds})


def key_factors(largest: Tensor) -> Tensor:
    """What to divide keys by, ``[.., head_dim / 2]`` with a geometric mean of 1 in each head, for the ``largest``
    magnitudes of its pairs."""
    peak = largest.amax(-1, keepdim=True)
    alive = largest.clamp_min(_LEAST * peak).where(peak > 0, 1.0)
    return alive / alive.log().mean(-1, keepdim=True).exp()


def _largest_pairs(layer: DecoderLayer, hidden: Tensor) -> Tensor:
    """The largest magnitude of each key head's RoPE pairs, ``[kv_heads, head_dim / 2]``: no rotation changes it."""
    config = layer.config
    largest = torch.zeros(
        config.num_kv_heads, config.head_dim // 2, device=layer.weights["input_layernorm.weight"].device
    )
    for states in batches(hidden):
        keys = layer.linear("self_attn.k_proj", layer.attention_input(states.to(largest.device)))
        keys = keys.view(-1, config.num_kv_heads, config.head_dim)
        if config.qk_norm:
            keys = rms_norm(keys, layer.weights["self_attn.k_norm.weight"], config.rms_norm_eps)
        first, second = keys.chunk(2, -1)
        largest = torch.maximum(largest, torch.hypot(first, second).amax(0))
    if not torch.isfinite(largest).all():
        raise ModelError("keys are NaN or Inf on the calibration text", hint="is the model, or its text, damaged?")
    return largest
