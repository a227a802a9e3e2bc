"""Shapes of whole models to measure without their weights. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from quantspec.errors import UsageError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama decoder; ``tied``: the LM head is the embedding."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = True

    @property
    def layer_weights(self) -> int:
        """Numbers of weights of the linear layers in one decoder layer."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return self.hidden * (attention + 3 * self.inner)

    @property
    def memory(self) -> int:
        """Bytes that it takes, at 4 bits and 8 in the vocabulary, and while it is made, roughly."""
        vocabulary = self.vocab * self.hidden
        packed = 0.55 * self.layers * self.layer_weights + vocabulary * (1.1 if self.tied else 2.2)
        return int(packed + max(vocabulary, 2 * self.layer_weights)) + 2**29


SHAPES = {
    "1b": ModelShape(2048, 8192, 16, 32, 8, 64, 128256),
    "8b": ModelShape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "70b": ModelShape(8192, 28672, 80, 64, 8, 128, 128256, tied=False),
}
"""Llama 3.2 1B, Llama 3.1 8B and 70B."""


def parse_shape(text: str) -> ModelShape:
    """``1b``, ``8b``, or these with sizes of one's own: ``1b,layers=2,vocab=1000``. Raises ``UsageError``."""
    known = [field.name for field in fields(ModelShape)]
    shape = SHAPES["1b"]
    for number, part in enumerate(text.split(",")):
        key, equals, value = part.strip().partition("=")
        if number == 0 and not equals and key.lower() in SHAPES:
            shape = SHAPES[key.lower()]
        elif equals and key in known and value.isdigit():
            sizes: dict[str, Any] = {key: bool(int(value)) if key == "tied" else int(value)}
            shape = replace(shape, **sizes)
        else:
            hint = f"use {' or '.join(SHAPES)}, and KEY=NUMBER with {', '.join(known)}"
            raise UsageError(f"{part.strip()!r} is no part of a model's shape", hint=hint)
    least = min(shape.hidden, shape.inner, shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.vocab)
    if least < 1 or shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise UsageError(
            f"there is no model of shape {text!r}",
            hint="sizes are positive, heads a multiple of kv_heads, head_dim even",
        )
    return shape
