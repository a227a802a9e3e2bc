"""Where a factor per channel can move from a linear layer's input into what comes before it, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantspec.calibrate.quantize.layer import STAGES, DecoderLayer
from quantspec.calibrate.quantize.observe import Magnitude
from quantspec.errors import ModelError

_SAMPLE = 4096  # tokens of the calibration text to look at: factors settle on fewer
_SHARED_VALUES = "several query heads read each row of v_proj, which can take back one factor only"


@dataclass(frozen=True)
class Site:
    """Linear layers that read one input of K channels, and the norm or linear layer ``source`` that puts it out."""

    readers: tuple[str, ...]
    source: str

    def refusal(self, layer: DecoderLayer) -> str | None:
        """Why nothing can be moved here; None if it can."""
        shared = self.source == "self_attn.v_proj" and layer.config.num_heads != layer.config.num_kv_heads
        return _SHARED_VALUES if shared else None

    def fold(self, layer: DecoderLayer, factors: Tensor) -> set[str]:
        """Multiply the readers' columns by ``factors [K]``, divide the source by them, and name what changed."""
        weights, source = layer.weights, f"{self.source}.weight"
        for reader in self.readers:
            weights[f"{reader}.weight"] = weights[f"{reader}.weight"] * factors
        is_norm = weights[source].dim() == 1
        weights[source] = weights[source] / (factors if is_norm else factors[:, None])
        changed = {source, *(f"{reader}.weight" for reader in self.readers)}
        if (bias := f"{self.source}.bias") in weights:
            weights[bias] = weights[bias] / factors
            changed.add(bias)
        return changed


# SwiGLU is linear in up_proj's output, and attention in v_proj's: their rows may take a factor of the next layer.
_SOURCES = ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj")
SITES = tuple(Site(readers, source) for readers, source in zip(STAGES, _SOURCES, strict=True))
"""One for each of ``STAGES``."""


def site_inputs(layer: DecoderLayer, hidden: Tensor) -> Iterator[Tensor]:
    """For each of ``SITES`` the input ``[S', T, K]`` of its readers, on about ``_SAMPLE`` tokens taken evenly from
    ``hidden [S, T, H]``. What was folded at one site is seen at the next."""
    every = -(-hidden.shape[0] * hidden.shape[1] // _SAMPLE)
    hidden = hidden[::every].to(layer.weights["input_layernorm.weight"].device)
    yield layer.attention_input(hidden)
    yield layer.attend(layer.attention_input(hidden))
    hidden = hidden + layer.linear("self_attn.o_proj", layer.attend(layer.attention_input(hidden)))
    yield layer.mlp_input(hidden)
    yield layer.gated(layer.mlp_input(hidden))


def magnitude(inputs: Tensor, site: Site) -> Magnitude:
    """Of each channel of ``inputs [.., K]``. Raises ``ModelError``: NaN or Inf."""
    seen = Magnitude(inputs.shape[-1], inputs.device)
    seen.add(inputs)
    if not torch.isfinite(seen.largest).all():
        hint = "is the model, or its text, damaged?"
        raise ModelError(f"the inputs of {site.readers[0]} are NaN or Inf on the calibration text", hint=hint)
    return seen
