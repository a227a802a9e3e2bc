"""Where the parts of a small Llama stand in a larger one: residual stream, heads, rotary pairs, layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantspec.benchmarks.shapes import ModelShape
from quantspec.errors import UsageError
from quantspec.models.config import ModelConfig

MASKED = -(2.0**15)
"""In the LM head's rows of tokens that the small model does not have, in the column of the constant."""
CONSTANT = 2.0**-5
"""About what that column reads: small beside a feature's other values, of which it has about one each."""


@dataclass(frozen=True)
class Stream:
    """A residual stream of ``size`` values at the front of a larger one of ``wide``.

    The rest is zero throughout, but for the value at ``constant``: that of the embedding, which no layer adds to. It
    is too small to show in a norm's sum of squares; the final norm lifts it to about ``CONSTANT``, and the LM head
    takes tokens that the small model does not have out of every softmax by it.
    """

    size: int
    wide: int

    @property
    def real(self) -> Tensor:
        return torch.arange(self.size)

    @property
    def constant(self) -> int:
        return self.size

    def norm(self, weight: Tensor, constant: float = 0.0) -> Tensor:
        """An RMSNorm's weight in fp32. The mean of squares falls to size / wide of what it was, and the eps goes with
        it: where wide / size is a power of four, all this is exact; elsewhere it is rounded."""
        placed = torch.zeros(self.wide)
        placed[: self.size] = weight.double() * math.sqrt(self.size / self.wide)
        placed[self.constant] = constant
        return placed

    def vector(self, values: Tensor) -> Tensor:
        """A bias, or a row: zeros behind it."""
        return torch.nn.functional.pad(values, (0, self.wide - self.size))

    def lift(self, constant: float, size: float) -> float:
        """The weight of a norm, of rows whose euclidean norm is about ``size``, that turns the constant into
        ``CONSTANT``."""
        return CONSTANT * size / (constant * math.sqrt(self.wide))


@dataclass(frozen=True)
class Heads:
    """Places of query, key and value heads: rows of their projections, and columns of the output's."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    o_live: Tensor
    """All columns of ``o`` whose inputs are not zero: a padded query head beside a real one averages real values."""

    @classmethod
    def of(cls, small: ModelConfig, large: ModelShape) -> Heads:
        """Key-value head j stays j, its query heads come first in its group, and rotary pair j of a head becomes pair
        j * hd' / hd, which turns as fast; values have no pairs, and stay at the front."""
        size, wide, ratio = small.head_dim, large.head_dim, large.head_dim // small.head_dim
        half = torch.arange(size // 2) * ratio
        paired = torch.cat((half, wide // 2 + half))
        group, wide_group = small.num_heads // small.num_kv_heads, large.heads // large.kv_heads
        queries = torch.arange(small.num_heads)
        queries = queries // group * wide_group + queries % group
        keys, beside = torch.arange(small.num_kv_heads), torch.arange(small.num_kv_heads * wide_group)

        def places(heads: Tensor, within: Tensor) -> Tensor:
            return (heads[:, None] * wide + within).flatten()

        front = torch.arange(size)
        return cls(
            q=places(queries, paired), k=places(keys, paired), v=places(keys, front), o=places(queries, front),
            o_live=places(beside, front),
        )  # fmt: skip


def check(small: ModelConfig, large: ModelShape, group: int) -> None:
    """Raises ``UsageError``: the model does not go into that shape."""
    group_of = small.num_heads // small.num_kv_heads
    for what, fits in (
        (f"hidden sizes are multiples of {group}", large.hidden % group == small.hidden_size % group == 0),
        (f"hidden is above {small.hidden_size}", large.hidden > small.hidden_size),
        (f"inner is a multiple of {group}, at least {small.intermediate_size}", large.inner % group == 0),
        (f"inner is at least {small.intermediate_size}", large.inner >= small.intermediate_size),
        (f"layers are at least {small.num_layers}", large.layers >= small.num_layers),
        (f"kv_heads are at least {small.num_kv_heads}", large.kv_heads >= small.num_kv_heads),
        (f"a key-value head has at least {group_of} heads", large.heads // large.kv_heads >= group_of),
        (f"head_dim is a multiple of {small.head_dim}", large.head_dim % small.head_dim == 0),
        (f"heads fill whole groups of {group}", large.heads * large.head_dim % group == 0),
        (f"vocab is at least {small.vocab_size}", large.vocab >= small.vocab_size),
        ("the model is a plain Llama", _plain(small)),
    ):
        if not fits:
            raise UsageError(f"the model does not go into that shape, where {what}", hint="choose a larger shape")


def _plain(config: ModelConfig) -> bool:
    odd = config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, any(config.windows)
    return config.architecture == "llama" and config.rope.kind == "default" and not any(odd)


def layer_places(small: int, large: int) -> list[int]:
    """Which layer each of the small model's becomes; those between hand on what they get."""
    return [layer * large // small for layer in range(small)]


def settings(small: ModelConfig, raw: dict[str, Any], large: ModelShape, stream: Stream) -> dict[str, Any]:
    """The keys of config.json that change."""
    changed: dict[str, Any] = {
        "hidden_size": stream.wide,
        "intermediate_size": large.inner,
        "num_attention_heads": large.heads,
        "num_key_value_heads": large.kv_heads,
        "head_dim": large.head_dim,
        "vocab_size": large.vocab,
        "rms_norm_eps": small.rms_norm_eps * stream.size / stream.wide,
        "max_position_embeddings": max(small.max_positions, _POSITIONS),
    }
    if large.head_dim != small.head_dim:
        changed["rope_scaling"] = _stretched(small.rope.theta, large.head_dim, large.head_dim // small.head_dim)
    return raw | changed


_POSITIONS = 2**15


def _stretched(theta: float, head_dim: int, ratio: int) -> dict[str, Any]:
    """Scores are divided by the root of the head's size, so queries and keys together have to grow by that of
    ``ratio``. Weights could only do that rounded, but YaRN multiplies what it rotates by 0.1 ln(factor) + 1, and
    leaves the frequencies of pairs alone that turn often in the original context: all of them, if that is so long."""
    factor = math.exp(10 * (ratio**0.25 - 1))
    slowest = 0.78  # of head_dim pairs, of which there are half: the number of the first one to be stretched
    original = 64 * math.pi * theta ** (2 * slowest)  # which turns 32 times in it, YaRN's beta_fast
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": round(original)}
