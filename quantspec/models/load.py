"""A model folder to a model that runs: natively where the architecture is native, through transformers elsewhere."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from quantspec.errors import ModelError, QuantSpecError, Unavailable, UsageError
from quantspec.kernels import dispatch
from quantspec.kernels.cpu import library
from quantspec.kernels.dispatch import Activations
from quantspec.kernels.memory import give_back_the_rest
from quantspec.kernels.reference import Linear
from quantspec.kernels.torch_int4 import TorchInt4Linear
from quantspec.models.atomic import verify_manifest
from quantspec.models.base import CausalModel
from quantspec.models.cache import KV_HINT, check_kv_cache, kv_format
from quantspec.models.config import ModelConfig, config_source, read_config
from quantspec.models.decoder import Decoder, Layer, Matmul
from quantspec.models.gguf.config import gguf_notes
from quantspec.models.gguf.reader import is_gguf
from quantspec.models.quantization import EMBEDDING_MODULE, HEAD_MODULE, UnsupportedModel
from quantspec.models.resolve import resolve
from quantspec.models.rotation import load_rotation
from quantspec.models.weights import Fused, LayerNames, Weights, to_dense
from quantspec.numerics.affine import QuantizedWeight
from quantspec.numerics.kv import KVFormat
from quantspec.numerics.scheme import KVCacheDtype

if TYPE_CHECKING:
    from quantspec.models.cpu_decoder import CpuDecoder
    from quantspec.models.triton_decoder import TritonDecoder

Packer = Callable[[QuantizedWeight, Tensor | None], Matmul]


def load_model(
    name: str | Path,
    *,
    device: str = "cpu",
    mode: str | None = None,
    backend: str | None = None,
    activations: Activations | None = None,
    dtype: str | None = None,
    head_bits: int | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
) -> CausalModel:
    """Load a folder, a GGUF file, a hub id or a name of the default family; logits and taps are fp32.

    ``mode`` ``"exact"`` makes rows bit-identical at any width; ``"fast"`` does not ask for it. Default: exact on a CPU,
    fast elsewhere. ``backend`` is a name of ``dispatch.BACKENDS`` (None: the fastest that serves), ``activations`` what
    activations are rounded to before they meet quantized weights, ``dtype`` what they are kept in, and ``head_bits``
    what an LM head that is stored unquantized is rounded to (None: as the backend does). ``kv_cache_dtype`` is what
    keys and values are kept in. The model's ``notes`` say why slower kernels run, where they do. What cannot be known
    beforehand is checked at load: exact mode of the reference, for the number of threads set then, and the backends of
    ``dispatch.PROVEN``, of which the next slower one runs where one fails.

    Raises ``ModelError`` for a folder that is missing, damaged, unsafe or of an unknown architecture, ``UsageError``
    for a backend that cannot run it.
    """
    if mode not in (None, "exact", "fast"):
        raise UsageError(f"mode must be exact or fast, not {mode!r}")
    device, lowered = usable_device(device, named=backend is not None)
    kind = torch.device(device).type
    exact = mode == "exact" or (mode is None and backend is None and kind == "cpu")
    folder = resolve(name)
    raw = read_config(folder)
    verify_manifest(folder)
    try:
        config = ModelConfig.of(raw, config_source(folder))
    except UnsupportedModel as error:
        if is_gguf(folder):
            raise  # which transformers does not get to see
        if kv_cache_dtype != "auto":
            raise UsageError(f"{error}: transformers keeps its keys and values", hint=KV_HINT) from error
        if backend or activations or dtype or head_bits:
            raise UsageError(f"{error}: it has no backends to choose from", hint="leave the choice out") from error
        return _load_foreign(folder, raw, device, lowered, error)
    asked = dispatch.Request(
        kind, dtype, row_invariant=exact, activations=activations, head_bits=head_bits, kv_cache_dtype=kv_cache_dtype
    )
    request, notes = as_stored(asked, config, folder, named=backend is not None)
    lowered += notes
    if is_gguf(folder):
        lowered += gguf_notes(folder)
    lowered += check_kv_cache(config, kv_cache_dtype, folder)
    with torch.no_grad():
        model = _load_fastest(folder, config, torch.device(device), request, backend)
    give_back_the_rest()  # what was read on the way, in blocks that the C library would keep
    model.rotation = load_rotation(folder, raw)
    model.notes = (*lowered, *model.notes)
    return model


def as_stored(
    request: dispatch.Request, config: ModelConfig, folder: Path, *, named: bool
) -> tuple[dispatch.Request, tuple[str, ...]]:
    """The request with what the checkpoint's weights are stored in, and lines about that; the backend may be named."""
    stored = config.quantization
    (bits, group_size), *more = [(each.bits, each.group_size) for each in stored.schemes] if stored else [(16, -1)]
    notes = stored.notes if stored else ()
    dtype, asked = request.dtype, request.activations
    if asked == "fp32" and request.device == "cuda":
        dtype = dtype or "float32"  # there activations are rounded to what they are kept in, and to nothing else
    request = replace(request, dtype=dtype, bits=bits, group_size=group_size, more=tuple(more))
    if asked is None and stored and stored.activation_bits == 8:
        meant = replace(request, activations="int8")
        if named or dispatch.serves(meant):
            return meant, notes
        notes += (f"{folder} is meant for int8 activations, which no kernel here has: they stay as they are",)
    return request, notes


def _load_foreign(
    folder: Path, raw: dict[str, Any], device: str, notes: tuple[str, ...], why: UnsupportedModel
) -> CausalModel:
    """Through transformers; ``why`` not natively."""
    from quantspec.models.hf import HFModel

    try:
        model = HFModel.load(folder, device=device)
    except QuantSpecError as error:
        hint = error.hint if isinstance(error, Unavailable) else why.hint or error.hint
        raise type(error)(f"{why}; through transformers: {error}", hint=hint) from error
    model.rotation, model.notes = load_rotation(folder, raw), (*notes, *model.notes)
    return model


def usable_device(device: str, *, named: bool = False) -> tuple[str, tuple[str, ...]]:
    """The device, or the CPU and a line that says so where there is no GPU; that stays an error (of ``choose``) for a
    backend that was ``named``. Raises ``UsageError``: no such device."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device must be cpu or cuda, not {device!r}") from error
    if wanted.type != "cuda" or named:
        return device, ()
    if not torch.cuda.is_available():
        return "cpu", ("there is no CUDA device that torch can use: the CPU runs instead",)
    if wanted.index is not None and wanted.index >= torch.cuda.device_count():
        raise UsageError(f"there is no {device}", hint=f"this machine has {torch.cuda.device_count()} CUDA devices")
    return device, ()


def _load_fastest(
    folder: Path, config: ModelConfig, device: torch.device, request: dispatch.Request, name: str | None
) -> Decoder | CpuDecoder | TritonDecoder:
    """On the backend of that name, or on the fastest that serves and does not fail."""
    failed: dict[str, str] = {}
    while True:
        chosen = dispatch.choose(request, name, failed)
        loaded = _attempt(folder, config, device, chosen, request)
        if not isinstance(loaded, str):
            break
        if name is not None:
            raise dispatch.refused(request, chosen, loaded)
        failed[chosen.name] = loaded
        gc.collect()  # the memory of a model that failed half way
        torch.cuda.empty_cache()
    notes = [f"slower kernels run: {backend}: {reason}" for backend, reason in failed.items()]
    if chosen.name in dispatch.NATIVE:
        notes += [library.notice() or ""]
    elif name is None and not failed:
        missing = dispatch.passed_over(request, chosen)
        notes += [f"slower kernels run: {missing}" if missing else ""]
    loaded.notes = (*filter(None, notes), *loaded.notes)
    return loaded


def _attempt(
    folder: Path, config: ModelConfig, device: torch.device, backend: dispatch.Backend, request: dispatch.Request
) -> Decoder | CpuDecoder | TritonDecoder | str:
    """The model, or why the backend, one that must prove itself, cannot run it here."""
    kv = kv_format(config, request.kv_cache_dtype)
    if backend.name not in dispatch.PROVEN:
        return _load(folder, config, device, backend, kv)
    from quantspec.models.load_triton import Kernels, load_proven

    dtype = getattr(torch, request.dtype or backend.dtypes[0])
    head_bits = request.head_bits or (backend.head_bits[0] if request.bits != 16 else 16)
    try:
        return load_proven(folder, config, device, dtype, head_bits, cast("Kernels", backend.name), kv)
    except ModelError:
        raise
    except Exception as error:  # of compilers, drivers and devices that may never have been seen
        last = backend.name == dispatch.PROVEN[-1]
        if last and _out_of_memory(error):  # what is slower takes more
            raise
        return _reason(error)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error)


def _reason(error: Exception) -> str:
    if _out_of_memory(error):
        return "out of memory"
    said = str(error).strip().partition("\n")[0]
    return said if isinstance(error, QuantSpecError) else f"{type(error).__name__}: {said}"


def _load(
    folder: Path, config: ModelConfig, device: torch.device, backend: dispatch.Backend, kv: KVFormat | None
) -> Decoder | CpuDecoder:
    if backend.name in dispatch.NATIVE:
        from quantspec.models.load_cpu import load_cpu_decoder

        assert backend.activations != "bf16", "torch's operator alone"
        return load_cpu_decoder(folder, config, backend.activations, kv)
    packer = TorchInt4Linear if backend.name == "torch-int4" else None
    decoder = load_decoder(folder, config, device, backend.row_invariant, packer, kv)
    decoder.backend = backend.name
    return decoder


def load_decoder(
    folder: Path, config: ModelConfig, device: torch.device, exact: bool, pack: Packer | None = None,
    kv_format: KVFormat | None = None,
) -> Decoder:  # fmt: skip
    """The eager decoder of a checkpoint. ``pack`` makes the layers whose weights are quantized. Raises ``ModelError``:
    a tensor is missing, misshapen or left over."""
    weights, hidden = Weights(folder, config), config.hidden_size

    def dense(name: str, *shape: int) -> Tensor:
        return weights.dense(name, shape).to(device)

    def linear(fused: Fused) -> Matmul:
        weight, bias = weights.fused(fused), weights.bias(fused)
        if pack is not None and isinstance(weight, QuantizedWeight):
            return pack(weight, bias)
        return Linear(to_dense(weight).to(device), None if bias is None else bias.to(device))

    def qk_norm(i: int) -> Tensor:
        q, k = weights.qk_norm(i)
        return torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1))).to(device)

    embedding = to_dense(weights.linear(EMBEDDING_MODULE, (config.vocab_size, hidden))).to(device)
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
    head = Linear(embedding) if config.tied else linear(Fused(((HEAD_MODULE, config.vocab_size),), hidden, bias=False))
    weights.refuse_leftovers()
    decoder = Decoder(
        config, embedding, layers, norm, head, weight_bytes=weights.bytes, exact=exact, kv_format=kv_format
    )  # fmt: skip
    decoder.notes += weights.notes() if pack is not None else ()
    return decoder
