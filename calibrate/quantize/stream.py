"""A checkpoint folder read one decoder layer at a time, dense or pack-quantized."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from quantspec.calibrate.quantize.layer import DecoderLayer, rms_norm
from quantspec.errors import ModelError
from quantspec.models.cache import kv_format
from quantspec.models.config import ModelConfig
from quantspec.models.tensors import TensorStore
from quantspec.numerics.affine import dequantize
from quantspec.numerics.packing import unpack_weight
from quantspec.numerics.scheme import KVCacheDtype, Scheme

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}."


class StreamedModel:
    """Config and tensors of a model folder; nothing is held between calls. ``kv_cache_dtype``: what its layers keep
    keys and values in."""

    def __init__(self, folder: Path, device: str, kv_cache_dtype: KVCacheDtype = "auto") -> None:
        self.config = ModelConfig.load(folder)
        self.store = TensorStore(folder)
        self.device, self.kv_format = device, kv_format(self.config, kv_cache_dtype)
        self.head_name = EMBEDDING if self.config.tied else HEAD

    def embed(self, ids: Tensor) -> Tensor:
        """``ids [S, T]`` to hidden states ``[S, T, H]`` in fp32 on the CPU."""
        return self.store.get(EMBEDDING)[ids].float()

    def layer(self, index: int) -> DecoderLayer:
        """Layer ``index`` with its weights in fp32 on the device."""
        scheme = self.config.quantization.scheme if self.config.quantization else None
        weights = layer_weights(self.store, self.config, index, scheme, self.device)
        return DecoderLayer(self.config, index, weights, self.kv_format)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.store.get(FINAL_NORM).to(hidden), self.config.rms_norm_eps)


def layer_weights(
    store: TensorStore, config: ModelConfig, index: int, scheme: Scheme | None, device: str
) -> dict[str, Tensor]:
    """A layer's tensors in fp32 under their names in the layer; packed weights are dequantized by ``scheme``. Raises
    ``ModelError`` naming a tensor that is missing or has another shape than ``config`` says."""
    prefix, weights = layer_prefix(index), {}
    for name, shape in _shapes(config).items():
        stem = prefix + name.removesuffix("weight")
        if scheme is not None and f"{stem}weight_packed" in store:
            packed = {key.removeprefix(stem): store.get(key).to(device) for key in store if key.startswith(stem)}
            weight = dequantize(unpack_weight(packed, scheme))
        else:
            weight = store.get(prefix + name).to(device).float()
        if weight.shape != shape:
            raise ModelError(f"{prefix}{name} is {list(weight.shape)} where config.json says {list(shape)}")
        weights[name] = weight
    return weights


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of one decoder layer."""
    hidden, wide = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": size for name, size in sizes.items()}
    shapes |= {f"mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")} | {
        "mlp.down_proj.weight": (hidden, wide)
    }
    biased = ("q", "k", "v") * config.qkv_bias + ("o",) * config.o_bias
    shapes |= {f"self_attn.{name}_proj.bias": sizes[name][:1] for name in biased}
    if config.mlp_bias:
        shapes |= {"mlp.gate_proj.bias": (wide,), "mlp.up_proj.bias": (wide,), "mlp.down_proj.bias": (hidden,)}
    if config.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
    return shapes | {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
