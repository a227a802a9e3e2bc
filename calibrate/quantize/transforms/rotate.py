"""Hadamard rotations folded into the weights (QuaRot, arXiv 2404.00456; SpinQuant's R1 and R2, arXiv 2405.16406).

R1 turns the residual stream: all that writes to it is rotated, all that reads it rotated back, so that no channel
towers over the others. It commutes with a norm that has no weight, so those are folded into the next layers first. The
LM head takes the final one, and is no longer the embedding. R2 turns the values of each head, from v_proj to o_proj.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from quantspec.calibrate.quantize.layer import DecoderLayer
from quantspec.calibrate.quantize.stream import EMBEDDING, FINAL_NORM, HEAD, StreamedModel
from quantspec.errors import UsageError
from quantspec.models.rotation import ROTATION, save_rotation
from quantspec.numerics.hadamard import Rotation

_READERS = {
    "input_layernorm.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm.weight": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_ROWS = 4096  # of the embedding and the head that are in fp32 at a time


class HadamardRotation:
    """See ``ModelTransform``."""

    def __init__(self, model: StreamedModel, seed: int) -> None:
        self.residual = Rotation.random(model.config.hidden_size, seed)
        self.values: Rotation | None
        try:
            self.values = Rotation.random(model.config.head_dim, seed + 1)
        except UsageError:  # R1 does most of the good
            self.values = None
        self._final_norm = model.store.get(FINAL_NORM).float()

    def layer(self, layer: DecoderLayer) -> Collection[str]:
        weights = layer.weights
        for norm, readers in _READERS.items():
            for reader in readers:
                weights[f"{reader}.weight"] = self.residual.apply(weights[f"{reader}.weight"] * weights[norm])
            weights[norm].fill_(1.0)
        for writer in _WRITERS:
            weights[f"{writer}.weight"] = self.residual.apply(weights[f"{writer}.weight"].T).T.contiguous()
            if (bias := f"{writer}.bias") in weights:
                weights[bias] = self.residual.apply(weights[bias])
        if self.values is not None:
            self._rotate_values(weights, self.values)
        return weights.keys()

    def _rotate_values(self, weights: dict[str, Tensor], rotation: Rotation) -> None:
        def by_head(x: Tensor) -> Tensor:
            return rotation.apply(x.unflatten(-1, (-1, rotation.size))).flatten(-2)

        weights["self_attn.v_proj.weight"] = by_head(weights["self_attn.v_proj.weight"].T).T.contiguous()
        weights["self_attn.o_proj.weight"] = by_head(weights["self_attn.o_proj.weight"])
        if (bias := "self_attn.v_proj.bias") in weights:
            weights[bias] = by_head(weights[bias])

    def hidden(self, hidden: Tensor) -> Tensor:
        return self.residual.apply(hidden)

    def rest(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        embedding, norm = tensors[EMBEDDING], tensors[FINAL_NORM]
        return tensors | {
            EMBEDDING: self._rotate_rows(embedding, None),
            HEAD: self._rotate_rows(tensors.get(HEAD, embedding), self._final_norm),
            FINAL_NORM: norm.new_ones(norm.shape),
        }

    def _rotate_rows(self, table: Tensor, columns: Tensor | None) -> Tensor:
        """``table [V, H]`` in its stored type, its ``columns [H]`` scaled first."""
        rotated = table.new_empty(table.shape)
        for rows, out in zip(table.split(_ROWS), rotated.split(_ROWS), strict=True):
            out.copy_(self.residual.apply(rows.float() if columns is None else rows.float() * columns))
        return rotated

    def config(self, raw: dict[str, object], folder: Path) -> dict[str, object]:
        name = save_rotation(folder, self.residual, self._final_norm)
        return raw | {"tie_word_embeddings": False, ROTATION: name}
