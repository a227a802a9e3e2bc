"""A checkpoint to a ``TritonDecoder``: quantized weights stay packed, all others get the type of the activations."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quantspec.errors import UsageError
from quantspec.kernels.triton.dense import TritonDense
from quantspec.kernels.triton.linear import TritonLinear
from quantspec.models.config import ModelConfig
from quantspec.models.load_cpu import HEAD_SCHEME
from quantspec.models.triton_decoder import Matmul, TritonDecoder, TritonLayer
from quantspec.models.weights import Fused, LayerNames, Weights, fuse, join
from quantspec.numerics.affine import QuantizedWeight, quantize

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK = 4096  # rows of a head that are rounded at a time, in fp32


@torch.no_grad()
def load_triton_decoder(
    folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16, *, head_bits: int = 16
) -> TritonDecoder:
    """The decoder of a checkpoint on Triton's kernels, with activations, keys and values of ``dtype``.

    ``head_bits`` 8: an LM head that is stored unquantized is rounded to ``HEAD_SCHEME``; 16: it stays.

    Raises ``ModelError``: a tensor is missing, misshapen or left over; ``UsageError``: a dtype, device or scheme that
    the kernels do not have.
    """
    if dtype not in DTYPES or head_bits not in (8, 16):
        raise UsageError(f"no Triton kernels for activations of {dtype} and an LM head of {head_bits} bits")
    loader = _Loader(folder, config, device, dtype)
    weights, sizes = loader.weights, (config.vocab_size, config.hidden_size)
    stored = weights.stored("model.embed_tokens.weight", sizes)
    embedding = stored.to(device, dtype).contiguous()
    layers = [loader.layer(i) for i in range(config.num_layers)]
    norm = loader.norm("model.norm.weight")
    head_weight = stored if config.tied else weights.linear("lm_head", sizes)
    if isinstance(head_weight, Tensor) and head_bits == 8:
        head_weight = join([quantize(rows, HEAD_SCHEME) for rows in head_weight.float().split(_CHUNK)])
    head = loader.head(embedding if head_weight is stored else head_weight)
    weights.refuse_leftovers()
    return TritonDecoder(config, embedding, layers, norm, head, weight_bytes=weights.bytes)


class _Loader:
    def __init__(self, folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.weights = Weights(folder, config)
        self._config, self._device, self._dtype = config, device, dtype

    def layer(self, i: int) -> TritonLayer:
        names = LayerNames.of(self._config, i)
        return TritonLayer(
            input_norm=self.norm(names.input_norm),
            qkv=self._linear(names.qkv),
            qk_norm=self._qk_norm(i) if self._config.qk_norm else None,
            o=self._linear(names.o),
            post_norm=self.norm(names.post_norm),
            gate_up=self._linear(names.gate_up),
            down=self._linear(names.down),
            window=self._config.windows[i],
        )

    def norm(self, name: str) -> Tensor:
        return self.weights.dense(name, (self._config.hidden_size,)).to(self._device)

    def head(self, weight: Tensor | QuantizedWeight) -> Matmul:
        """Logits in fp32: in bf16, the best two of a large vocabulary are often equal."""
        if isinstance(weight, Tensor):
            return TritonDense(weight.to(self._device, self._dtype), out_dtype=torch.float32)
        packed = TritonLinear(weight, device=self._device)
        return lambda x: packed(x.float())

    def _linear(self, fused: Fused) -> Matmul:
        weight = fuse([self.weights.linear(name, (size, fused.in_features)) for name, size in fused.parts])
        bias = self.weights.bias(fused)
        if isinstance(weight, QuantizedWeight):
            return TritonLinear(weight, bias, self._device)
        return TritonDense(weight.to(self._device, self._dtype), bias)

    def _qk_norm(self, i: int) -> Tensor:
        q, k = self.weights.qk_norm(i)
        heads = q.expand(self._config.num_heads, -1), k.expand(self._config.num_kv_heads, -1)
        return torch.cat(heads).to(self._device)
