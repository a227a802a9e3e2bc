"""A model folder to a model that runs: natively where the architecture is native, through transformers elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quantspec.errors import UsageError
from quantspec.kernels import dispatch
from quantspec.kernels.reference import Linear
from quantspec.models.atomic import verify_manifest
from quantspec.models.base import CausalModel
from quantspec.models.config import ModelConfig, UnsupportedModel, read_config
from quantspec.models.decoder import Decoder, Layer
from quantspec.models.resolve import resolve
from quantspec.models.weights import Fused, LayerNames, Weights, to_dense


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
    weights, hidden = Weights(folder, config), config.hidden_size

    def dense(name: str, *shape: int) -> Tensor:
        return weights.dense(name, shape).to(device)

    def linear(fused: Fused) -> Linear:
        parts = [to_dense(weights.linear(name, (size, fused.in_features))) for name, size in fused.parts]
        bias = weights.bias(fused)
        return Linear(torch.cat(parts).to(device), None if bias is None else bias.to(device))

    def qk_norm(i: int) -> Tensor:
        q, k = weights.qk_norm(i)
        return torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1))).to(device)

    embedding = dense("model.embed_tokens.weight", config.vocab_size, hidden)
    layers = []
    for i in range(config.num_layers):
        names = LayerNames.of(config, i)
        layers.append(
            Layer(
                input_norm=dense(names.input_norm, hidden),
                qkv=linear(names.qkv),
                qk_norm=qk_norm(i) if config.qk_norm else None,
                o=linear(names.o),
                post_norm=dense(names.post_norm, hidden),
                gate_up=linear(names.gate_up),
                down=linear(names.down),
            )
        )
    norm = dense("model.norm.weight", hidden)
    head = Linear(embedding) if config.tied else linear(Fused((("lm_head", config.vocab_size),), hidden, bias=False))
    weights.refuse_leftovers()
    return Decoder(config, embedding, layers, norm, head, weight_bytes=weights.bytes, exact=exact)
