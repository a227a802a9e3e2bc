"""A model folder to a model that runs: natively where the architecture is native, through transformers elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantspec.errors import ModelError, UsageError
from quantspec.kernels import dispatch
from quantspec.kernels.reference import Linear
from quantspec.models.atomic import verify_manifest
from quantspec.models.base import CausalModel
from quantspec.models.config import ModelConfig, UnsupportedModel, read_config
from quantspec.models.decoder import Decoder, Layer
from quantspec.models.resolve import resolve
from quantspec.models.tensors import TensorStore
from quantspec.numerics.affine import dequantize
from quantspec.numerics.packing import unpack_weight

_MISMATCH = "config.json and the weights belong to different models"
_PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def load_model(name: str | Path, *, device: str = "cpu", mode: str | None = None) -> CausalModel:
    """Load a folder, a hub id or a name of the default family, in fp32.

    ``mode`` ``"exact"`` makes rows bit-identical at any width; ``"fast"`` does not, and is quicker. Default: exact on a
    CPU, fast elsewhere. Exact mode is checked at load, for the number of threads set then. Raises ``ModelError`` for a
    folder that is missing, damaged, unsafe or of an unknown architecture.
    """
    if mode not in (None, "exact", "fast"):
        raise UsageError(f"mode must be exact or fast, not {mode!r}")
    kind = _device_kind(device)
    exact = mode == "exact" or (mode is None and kind == "cpu")
    folder = resolve(name)
    raw = read_config(folder)
    verify_manifest(folder)
    try:
        config = ModelConfig.of(raw, str(folder / "config.json"))
    except UnsupportedModel:
        from quantspec.models.hf import HFModel

        return HFModel.load(folder, device=device)
    scheme = config.quantization.scheme if config.quantization else None
    bits, group_size = (scheme.bits, scheme.group_size) if scheme else (16, -1)
    backend = dispatch.choose(dispatch.Request(kind, "float32", bits, group_size, row_invariant=exact))
    with torch.no_grad():
        return load_decoder(folder, config, torch.device(device), backend.row_invariant)


def _device_kind(device: str) -> str:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"device must be cpu or cuda, not {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device that torch can use", hint="use device cpu, or see quantspec doctor")
    return kind


def load_decoder(folder: Path, config: ModelConfig, device: torch.device, exact: bool) -> Decoder:
    """The native decoder of a checkpoint. Raises ``ModelError``: a tensor is missing, misshapen or left over."""
    weights = _Weights(folder, config, device)
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embedding = weights.dense("model.embed_tokens.weight", (config.vocab_size, hidden))
    layers = []
    for i in range(config.num_layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        qkv = [(attention + "q_proj", q_size), (attention + "k_proj", kv_size), (attention + "v_proj", kv_size)]
        gate_up = [(mlp + "gate_proj", inner), (mlp + "up_proj", inner)]
        layers.append(
            Layer(
                input_norm=weights.dense(f"model.layers.{i}.input_layernorm.weight", (hidden,)),
                qkv=weights.linear(qkv, hidden, config.qkv_bias),
                qk_norm=weights.qk_norm(attention) if config.qk_norm else None,
                o=weights.linear([(attention + "o_proj", hidden)], q_size, config.o_bias),
                post_norm=weights.dense(f"model.layers.{i}.post_attention_layernorm.weight", (hidden,)),
                gate_up=weights.linear(gate_up, hidden, config.mlp_bias),
                down=weights.linear([(mlp + "down_proj", hidden)], inner, config.mlp_bias),
            )
        )
    norm = weights.dense("model.norm.weight", (hidden,))
    head = Linear(embedding) if config.tied else weights.linear([("lm_head", config.vocab_size)], hidden, False)
    weights.refuse_leftovers()
    return Decoder(config, embedding, layers, norm, head, weight_bytes=weights.bytes, exact=exact)


class _Weights:
    """Takes tensors out of a checkpoint, checks their shapes and remembers which were taken."""

    def __init__(self, folder: Path, config: ModelConfig, device: torch.device) -> None:
        self._store, self._config, self._device = TensorStore(folder), config, device
        self._taken: set[str] = set()
        self.bytes = 0

    def _take(self, name: str) -> Tensor:
        tensor = self._store.get(name)
        self._taken.add(name)
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor in fp32."""
        self._check(name, self._store.shape(name), shape)
        tensor = self._take(name)
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ModelError(f"{self._store.folder}: {name} is stored as {tensor.dtype}, which is not supported")
        return tensor.float().to(self._device)

    def qk_norm(self, attention: str) -> Tensor:
        """Norm weights of all query heads, then all key heads: ``[heads + kv_heads, head_dim]``."""
        config = self._config
        q, k = (self.dense(f"{attention}{name}_norm.weight", (config.head_dim,)) for name in "qk")
        return torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)))

    def linear(self, parts: Sequence[tuple[str, int]], in_features: int, bias: bool) -> Linear:
        """Layers that read the same input, fused into one. ``parts`` are names and output sizes."""
        weight = torch.cat([self._weight(name, (size, in_features)) for name, size in parts])
        biases = [self.dense(f"{name}.bias", (size,)) for name, size in parts] if bias else []
        return Linear(weight, torch.cat(biases) if biases else None)

    def _weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        quantization = self._config.quantization
        if quantization is None or f"{name}.weight_packed" not in self._store:
            return self.dense(f"{name}.weight", shape)
        suffixes = [suffix for suffix in _PACKED if f"{name}.{suffix}" in self._store]
        quantized = unpack_weight({suffix: self._take(f"{name}.{suffix}") for suffix in suffixes}, quantization.scheme)
        self._check(name, tuple(quantized.codes.shape), shape)
        return dequantize(quantized).to(self._device)

    def _check(self, name: str, found: tuple[int, ...], implied: tuple[int, ...]) -> None:
        if found != implied:
            message = f"{name} has shape {list(found)}, config.json implies {list(implied)}"
            raise ModelError(f"{self._store.folder}: {message}", hint=_MISMATCH)

    def refuse_leftovers(self) -> None:
        """Weights that the architecture does not use mean that config.json describes another model."""
        harmless = ("rotary_emb.inv_freq",) + (("lm_head.weight",) if self._config.tied else ())
        left = sorted(name for name in set(self._store.keys()) - self._taken if not name.endswith(harmless))
        if left:
            unused = f"{len(left)} tensors that {self._config.architecture} does not use, such as {left[0]}"
            raise ModelError(f"{self._store.folder} has {unused}", hint=_MISMATCH)
