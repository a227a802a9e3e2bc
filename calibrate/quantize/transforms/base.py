"""What changes weights before they are rounded, and changes nothing in exact arithmetic.

A layer transform acts on one decoder layer, given the states that enter it; it folds what it divides out of a weight
into the norm or linear layer before. A model transform acts on all tensors, and on the states between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from quantspec.calibrate.quantize.config import MethodOptions
from quantspec.calibrate.quantize.layer import DecoderLayer
from quantspec.numerics.scheme import Scheme


@dataclass
class Folded:
    """What a layer transform did: the tensors it ``changed`` and, by linear layer (of this layer, like
    ``mlp.up_proj``), how strongly it scaled the inputs, or why it did not."""

    changed: set[str] = field(default_factory=set)
    sites: dict[str, float | str] = field(default_factory=dict)

    def add(self, readers: Collection[str], changed: Collection[str], found: float | str) -> None:
        self.changed.update(changed)
        self.sites |= dict.fromkeys(readers, found)


class LayerTransform(Protocol):
    def __call__(
        self, layer: DecoderLayer, hidden: Tensor, schemes: Callable[[str], Scheme | None], options: MethodOptions
    ) -> Folded:
        """Change ``layer.weights`` in place and say what was done.

        ``hidden [S, T, H]`` (CPU, not to be changed) passed the quantized layers before. ``schemes(name)`` is how the
        linear layer ``name`` (of this layer, like ``mlp.up_proj``) will be quantized, or None if it will not be.
        """


class ModelTransform(Protocol):
    def layer(self, layer: DecoderLayer) -> Collection[str]:
        """Change ``layer.weights`` in place and name the tensors that changed."""

    def hidden(self, hidden: Tensor) -> Tensor:
        """What the changed model's embedding gives where the original's gives ``hidden [S, T, H]``."""

    def rest(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors outside the decoder layers, changed, to be stored as they are."""

    def config(self, raw: dict[str, object], folder: Path) -> dict[str, object]:
        """The changed model's ``config.json`` for the original's ``raw``. Files that drafters need go into ``folder``,
        the model's."""
