"""A checkpoint to a ``CpuDecoder``: linear layers are packed as they are read, and no full fp32 copy ever exists."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quantspec.errors import ModelError
from quantspec.kernels.cpu import packed
from quantspec.kernels.cpu.forward import PackedLayer
from quantspec.kernels.cpu.packed import Arena, PackedLinear
from quantspec.kernels.dispatch import Activations
from quantspec.models.config import ModelConfig
from quantspec.models.cpu_decoder import CpuDecoder
from quantspec.models.quantization import EMBEDDING_MODULE, HEAD_MODULE
from quantspec.models.weights import Fused, LayerNames, Weights, fold_order, round_rows
from quantspec.numerics.affine import QuantizedWeight
from quantspec.numerics.kv import KVFormat
from quantspec.numerics.scheme import Scheme

HEAD_SCHEME = Scheme(bits=8, group_size=128, symmetric=True, dtype="float32")
"""What a quantized model's LM head and embedding, stored unquantized, are rounded to where activations are int8."""


def refusal(config: ModelConfig) -> str | None:
    """Why this checkpoint cannot be packed, as far as its config.json tells; None if it can."""
    schemes = config.quantization.schemes if config.quantization else ()
    return next(filter(None, map(packed.refusal, schemes)), None)


@torch.no_grad()
def load_cpu_decoder(
    folder: Path, config: ModelConfig, activations: Activations, kv_format: KVFormat | None = None
) -> CpuDecoder:
    """The packed decoder of a checkpoint. ``activations`` ``"int8"``: quantized weights meet int8 activations, and LM
    head and embedding of a quantized model are rounded to ``HEAD_SCHEME``. ``"fp32"``: weights exactly as stored.
    ``kv_format``: of keys and values (None: fp32).

    Raises ``ModelError``: a tensor is missing, misshapen, left over, or of a kind that cannot be packed.
    """
    why = refusal(config)
    if why is not None:
        raise ModelError(f"{folder}: the CPU kernels cannot hold this model, it {why}")
    packer = _Packer(folder, config, integer=activations == "int8")
    weights, hidden = packer.weights, config.hidden_size
    embedding = packer.vocabulary(weights.linear(EMBEDDING_MODULE, (config.vocab_size, hidden)))
    layers = [packer.layer(i) for i in range(config.num_layers)]
    norm = weights.dense("model.norm.weight", (hidden,))
    head = embedding if config.tied else packer.vocabulary(weights.linear(HEAD_MODULE, (config.vocab_size, hidden)))
    weights.refuse_leftovers()
    model = CpuDecoder(
        config, embedding, layers, norm, head, weight_bytes=weights.bytes, integer=activations == "int8",
        kv_format=kv_format,
    )  # fmt: skip
    model.notes = weights.notes()
    return model


class _Packer:
    def __init__(self, folder: Path, config: ModelConfig, *, integer: bool) -> None:
        self.weights = Weights(folder, config)
        self._config, self._arena, self._integer = config, Arena(), integer

    def layer(self, i: int) -> PackedLayer:
        config, weights, names = self._config, self.weights, LayerNames.of(self._config, i)
        q_norm, k_norm = weights.qk_norm(i) if config.qk_norm else (None, None)
        mlp = weights.fused(names.gate_up), weights.bias(names.gate_up), weights.fused(names.down)
        gate_up, gate_up_bias, down = fold_order(*mlp)
        return PackedLayer(
            input_norm=weights.dense(names.input_norm, (config.hidden_size,)),
            qkv=self._linear(names.qkv),
            q_norm=q_norm,
            k_norm=k_norm,
            o=self._linear(names.o),
            post_norm=weights.dense(names.post_norm, (config.hidden_size,)),
            gate_up=self._pack(gate_up, gate_up_bias),
            down=self._pack(down, weights.bias(names.down)),
            window=config.windows[i],
        )

    def _linear(self, fused: Fused) -> PackedLinear:
        return self._pack(self.weights.fused(fused), self.weights.bias(fused))

    def vocabulary(self, weight: Tensor | QuantizedWeight) -> PackedLinear:
        """The embedding or the LM head."""
        if isinstance(weight, Tensor) and self._integer and self._config.quantization is not None:
            weight = round_rows(weight, HEAD_SCHEME)
        return self._pack(weight, None)

    def _pack(self, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> PackedLinear:
        return packed.pack(weight, bias, arena=self._arena, integer=self._integer)
