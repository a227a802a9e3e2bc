"""Tensors of a checkpoint by what the architecture needs: shapes checked, and none left over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantspec.errors import ModelError
from quantspec.models.config import ModelConfig
from quantspec.models.quantization import EMBEDDING_MODULE, HEAD_MODULE
from quantspec.models.stored import quantized_parts, read_quantized
from quantspec.models.tensors import open_store
from quantspec.numerics.affine import QuantizedWeight, dequantize, quantize
from quantspec.numerics.scheme import Scheme

_MISMATCH = "config.json and the weights belong to different models"
HEAD_SCHEMES = {bits: Scheme(bits, group_size=128, symmetric=True, dtype="bfloat16") for bits in (4, 8)}
"""What a GPU's backends round an LM head to, by its bits. Scales have fp32's range: rows of rare tokens are small."""
_CHUNK = 4096  # rows of a head that are rounded at a time, in fp32


@dataclass(frozen=True, slots=True)
class Fused:
    """Linear layers that read the same input and run as one. ``parts`` are their names and output sizes."""

    parts: tuple[tuple[str, int], ...]
    in_features: int
    bias: bool


@dataclass(frozen=True, slots=True)
class LayerNames:
    """What one decoder layer is made of: names of its tensors, and its linear layers as they are fused."""

    input_norm: str
    qkv: Fused
    o: Fused
    post_norm: str
    gate_up: Fused
    down: Fused

    @classmethod
    def of(cls, config: ModelConfig, i: int) -> LayerNames:
        layer, hidden, inner = f"model.layers.{i}.", config.hidden_size, config.intermediate_size
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention, mlp = layer + "self_attn.", layer + "mlp."
        qkv = (attention + "q_proj", q_size), (attention + "k_proj", kv_size), (attention + "v_proj", kv_size)
        gate_up = (mlp + "gate_proj", inner), (mlp + "up_proj", inner)
        return cls(
            input_norm=layer + "input_layernorm.weight",
            qkv=Fused(qkv, hidden, config.qkv_bias),
            o=Fused(((attention + "o_proj", hidden),), q_size, config.o_bias),
            post_norm=layer + "post_attention_layernorm.weight",
            gate_up=Fused(gate_up, hidden, config.mlp_bias),
            down=Fused(((mlp + "down_proj", hidden),), inner, config.mlp_bias),
        )


class Weights:
    """Takes tensors out of a checkpoint, checks their shapes and remembers which were taken. Everything raises
    ``ModelError`` with the tensor and the folder named."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._store, self._config = open_store(folder), config
        self._taken: set[str] = set()
        self._packed = False
        self.bytes = 0
        self.unfused = 0
        """Fused layers whose quantized parts do not go together, and so are dequantized."""

    @property
    def folder(self) -> Path:
        return self._store.folder

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor in fp32."""
        return self.stored(name, shape).float()

    def stored(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor in the floating type that it is stored in."""
        self._check(name, self._store.shape(name), shape)
        tensor = self._take(name)
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ModelError(f"{self.folder}: {name} is stored as {tensor.dtype}, which is not supported")
        return tensor

    def linear(self, name: str, shape: tuple[int, int]) -> Tensor | QuantizedWeight:
        """The weight of one linear layer, or of the embedding, as it is stored."""
        quantized = read_quantized(self._store, name, self._config.quantization, self._take)
        if quantized is None:
            return self.stored(f"{name}.weight", shape)
        self._packed = True
        self._check(name, tuple(quantized.codes.shape), shape)
        if not torch.isfinite(quantized.scale).all():
            raise ModelError(f"{self.folder}: the scales of {name} are not finite", hint="quantize the model again")
        return quantized

    def fused(self, layer: Fused) -> Tensor | QuantizedWeight:
        """Layers of one input, one below the other; where they are stored in different ways, in fp32."""
        parts = [self.linear(name, (size, layer.in_features)) for name, size in layer.parts]
        whole = fuse(parts)
        self.unfused += isinstance(whole, Tensor) and not any(isinstance(part, Tensor) for part in parts)
        return whole

    def notes(self) -> tuple[str, ...]:
        """That layers run dequantized, where packed ones were asked for."""
        why = "their parts have schemes or activation orders of their own"
        return (f"{self.unfused} fused layers run dequantized: {why}",) if self.unfused else ()

    def bias(self, layer: Fused) -> Tensor | None:
        """The biases of fused layers in fp32, one after the other; None where the architecture has none."""
        if not layer.bias:
            return None
        return torch.cat([self.dense(f"{name}.bias", (size,)) for name, size in layer.parts])

    def qk_norm(self, i: int) -> Sequence[Tensor]:
        """Norm weights ``[head_dim]`` of layer i's queries and keys."""
        return [self.dense(f"model.layers.{i}.self_attn.{x}_norm.weight", (self._config.head_dim,)) for x in "qk"]

    def _take(self, name: str) -> Tensor:
        tensor = self._store.get(name)
        self._taken.add(name)
        self.bytes += self._store.size(name)
        return tensor

    def _check(self, name: str, found: tuple[int, ...], implied: tuple[int, ...]) -> None:
        if found != implied:
            message = f"{name} has shape {list(found)}, config.json implies {list(implied)}"
            raise ModelError(f"{self.folder}: {message}", hint=_MISMATCH)

    def refuse_leftovers(self) -> None:
        """At the end. Weights that the architecture does not use mean that config.json describes another model, and so
        does a quantization of which no weight is."""
        if self._config.quantization is not None and not self._packed:
            what = f"config.json says {self._config.quantization.format}, and no weight is packed"
            hint = "remove quantization_config if the weights are meant to be dense, or get the packed ones"
            raise ModelError(f"{self.folder}: {what}", hint=hint)
        if self._config.tied:
            self._refuse_another_head()
        harmless = ("rotary_emb.inv_freq",) + (("lm_head.weight",) if self._config.tied else ())
        left = [name for name in sorted(set(self._store.keys()) - self._taken) if not name.endswith(harmless)]
        left = [name for name in left if not self._is_zero_bias(name)]
        if left:
            unused = f"{len(left)} tensors that {self._config.architecture} does not use, such as {left[0]}"
            raise ModelError(f"{self.folder} has {unused}", hint=_MISMATCH)

    def _refuse_another_head(self) -> None:
        """A tied model may hold its head twice, but not another one than its embedding."""
        store, names = self._store, (f"{HEAD_MODULE}.weight", f"{EMBEDDING_MODULE}.weight")
        if not all(name in store for name in names):
            return
        head, embedding = (store.shape(name) for name in names)
        starts = range(0, head[0] if head else 0, _CHUNK)
        parts = (range(start, min(start + _CHUNK, head[0])) for start in starts)
        if head != embedding or not all(
            torch.equal(store.rows(names[0], part).float(), store.rows(names[1], part).float()) for part in parts
        ):
            what = f"config.json ties {names[0]} to the embedding, and the two differ"
            raise ModelError(f"{self.folder}: {what}", hint="set tie_word_embeddings to false if the head is its own")

    def _is_zero_bias(self, name: str) -> bool:
        """Whether this is what AutoGPTQ writes for each quantized layer without a bias. Raises ``ModelError``: other
        numbers."""
        module = name.removesuffix(".bias")
        if module == name or not quantized_parts(self._store, module):
            return False
        if self._store.get(name).any():
            what = f"{name} is not zero, and config.json gives that layer no bias"
            raise ModelError(f"{self.folder}: {what}", hint=_MISMATCH)
        return True


def to_dense(weight: Tensor | QuantizedWeight) -> Tensor:
    """``[N, K]`` in fp32."""
    return weight.float() if isinstance(weight, Tensor) else dequantize(weight)


def join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Quantized weights of one scheme, input and activation order, one below the other."""
    assert all(_go_together(weights[0], weight) for weight in weights)
    zero_points = [weight.zero_point for weight in weights if weight.zero_point is not None]
    return QuantizedWeight(
        torch.cat([weight.codes for weight in weights]),
        torch.cat([weight.scale for weight in weights]),
        torch.cat(zero_points) if zero_points else None,
        weights[0].scheme,
        weights[0].order,
    )


def _go_together(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    if one.order is None or other.order is None:
        return one.scheme == other.scheme and one.order is other.order
    return one.scheme == other.scheme and torch.equal(one.order, other.order)


def take_rows(weight: Tensor | QuantizedWeight, rows: Tensor) -> Tensor | QuantizedWeight:
    """Some output rows of a weight, in the order of ``rows``."""
    if isinstance(weight, Tensor):
        return weight[rows.to(weight.device)]
    zeros = None if weight.zero_point is None else weight.zero_point[rows]
    return replace(weight, codes=weight.codes[rows], scale=weight.scale[rows], zero_point=zeros)


def fold_order(
    gate_up: Tensor | QuantizedWeight, bias: Tensor | None, down: Tensor | QuantizedWeight
) -> tuple[Tensor | QuantizedWeight, Tensor | None, Tensor | QuantizedWeight]:
    """The same MLP with the activation order of ``down`` moved into the rows of gate and up (and their bias), which
    costs nothing at run time."""
    if isinstance(down, Tensor) or down.order is None:
        return gate_up, bias, down
    rows = torch.cat((down.order, down.order + len(down.order)))
    return take_rows(gate_up, rows), None if bias is None else bias[rows], replace(down, order=None)


def round_head(weight: Tensor, bits: int) -> QuantizedWeight:
    """An LM head ``[V, H]`` that is stored unquantized, in ``HEAD_SCHEMES[bits]``."""
    return round_rows(weight, HEAD_SCHEMES[bits])


def round_rows(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """A weight ``[N, K]`` in a symmetric scheme, a few rows at a time: no copy of it in fp32 is made."""
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.int8)
    scale = torch.empty(n, scheme.num_groups(k), dtype=getattr(torch, scheme.dtype))
    for start in range(0, n, _CHUNK):
        part = quantize(weight[start : start + _CHUNK].float(), scheme)
        codes[start : start + _CHUNK], scale[start : start + _CHUNK] = part.codes, part.scale
    return QuantizedWeight(codes, scale, None, scheme)


def fuse(parts: list[Tensor | QuantizedWeight]) -> Tensor | QuantizedWeight:
    """Layers of one input, one below the other; where they are stored in different ways, in fp32."""
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len(quantized) == len(parts) and all(_go_together(quantized[0], part) for part in quantized):
        return join(quantized)
    dense = [part for part in parts if isinstance(part, Tensor)]
    same = len(dense) == len(parts) and len({part.dtype for part in dense}) == 1
    return torch.cat(dense if same else [to_dense(part) for part in parts])
