"""A model folder to a model that runs: natively where the architecture is native, through transformers elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantspec.errors import UsageError
from quantspec.kernels import dispatch
from quantspec.kernels.cpu import library
from quantspec.kernels.dispatch import Activations
from quantspec.kernels.reference import Linear
from quantspec.kernels.torch_int4 import TorchInt4Linear
from quantspec.models.atomic import verify_manifest
from quantspec.models.base import CausalModel
from quantspec.models.config import ModelConfig, UnsupportedModel, read_config
from quantspec.models.decoder import Decoder, Layer, Matmul
from quantspec.models.resolve import resolve
from quantspec.models.weights import Fused, LayerNames, Weights, join, to_dense
from quantspec.numerics.affine import QuantizedWeight

if TYPE_CHECKING:
    from quantspec.models.cpu_decoder import CpuDecoder

Packer = Callable[[QuantizedWeight, Tensor | None], Matmul]


def load_model(
    name: str | Path,
    *,
    device: str = "cpu",
    mode: str | None = None,
    backend: str | None = None,
    activations: Activations | None = None,
) -> CausalModel:
    """Load a folder, a hub id or a name of the default family; inputs and outputs are fp32.

    ``mode`` ``"exact"`` makes rows bit-identical at any width; ``"fast"`` does not ask for it. Default: exact on a CPU,
    fast elsewhere. ``backend`` is a name of ``dispatch.BACKENDS`` (None: the fastest that serves) and ``activations``
    what activations are rounded to before they meet quantized weights (None: as the backend does). The model's
    ``notes`` say why slower kernels run, where they do. Exact mode of the reference is checked at load, for the number
    of threads set then.

    Raises ``ModelError`` for a folder that is missing, damaged, unsafe or of an unknown architecture, ``UsageError``
    for a backend that cannot run it.
    """
    if mode not in (None, "exact", "fast"):
        raise UsageError(f"mode must be exact or fast, not {mode!r}")
    kind = _device_kind(device)
    exact = mode == "exact" or (mode is None and backend is None and kind == "cpu")
    folder = resolve(name)
    raw = read_config(folder)
    verify_manifest(folder)
    try:
        config = ModelConfig.of(raw, str(folder / "config.json"))
    except UnsupportedModel as error:
        if backend or activations:
            raise UsageError(f"{error}: it has no backends to choose from", hint="leave the choice out") from error
        from quantspec.models.hf import HFModel

        return HFModel.load(folder, device=device)
    scheme = config.quantization.scheme if config.quantization else None
    bits, group_size = (scheme.bits, scheme.group_size) if scheme else (16, -1)
    request = dispatch.Request(kind, "float32", bits, group_size, row_invariant=exact, activations=activations)
    chosen = dispatch.choose(request, backend)
    with torch.no_grad():
        model = _load(folder, config, torch.device(device), chosen)
    if chosen.name in dispatch.NATIVE:
        note = library.notice()
    else:
        missing = None if backend else dispatch.passed_over(request, chosen)
        note = f"slower kernels run: {missing}" if missing else None
    model.notes = (note,) if note else ()
    return model


def _load(folder: Path, config: ModelConfig, device: torch.device, backend: dispatch.Backend) -> Decoder | CpuDecoder:
    if backend.name in dispatch.NATIVE:
        from quantspec.models.load_cpu import load_cpu_decoder

        return load_cpu_decoder(folder, config, backend.activations)
    decoder = load_decoder(folder, config, device, backend.row_invariant, _packer(backend.name, device))
    decoder.backend = backend.name
    return decoder


def _packer(backend: str, device: torch.device) -> Packer | None:
    """What keeps quantized weights packed in the eager decoder; None: they are expanded."""
    if backend == "torch-int4":
        return TorchInt4Linear
    if backend == "triton":
        from quantspec.kernels.triton.linear import TritonLinear

        return partial(TritonLinear, device=device)
    return None


def _device_kind(device: str) -> str:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"device must be cpu or cuda, not {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device that torch can use", hint="use device cpu, or see quantspec doctor")
    return kind


def load_decoder(
    folder: Path, config: ModelConfig, device: torch.device, exact: bool, pack: Packer | None = None
) -> Decoder:
    """The eager decoder of a checkpoint. ``pack`` makes the layers whose weights are quantized. Raises ``ModelError``:
    a tensor is missing, misshapen or left over."""
    weights, hidden = Weights(folder, config), config.hidden_size

    def dense(name: str, *shape: int) -> Tensor:
        return weights.dense(name, shape).to(device)

    def linear(fused: Fused) -> Matmul:
        parts = [weights.linear(name, (size, fused.in_features)) for name, size in fused.parts]
        bias = weights.bias(fused)
        packed = [part for part in parts if isinstance(part, QuantizedWeight)]
        if pack is not None and len(packed) == len(parts):
            return pack(join(packed), bias)
        dense = torch.cat([to_dense(part) for part in parts])
        return Linear(dense.to(device), None if bias is None else bias.to(device))

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
