"""What a checkpoint takes of memory, while it is read and once it runs, from its headers and config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantspec.kernels import dispatch
from quantspec.kernels.cpu import packed
from quantspec.kernels.spans import LANES, round_up
from quantspec.models.cache import kv_format
from quantspec.models.config import ModelConfig, config_source, read_config
from quantspec.models.load import as_stored, usable_device
from quantspec.models.load_cpu import HEAD_SCHEME
from quantspec.models.quantization import EMBEDDING_MODULE, HEAD_MODULE, UnsupportedModel
from quantspec.models.stored import quantized_parts
from quantspec.models.tensors import TensorStore, open_store
from quantspec.models.weights import HEAD_SCHEMES, Fused, LayerNames
from quantspec.numerics.scheme import KVCacheDtype, Scheme

_FP32 = 4


@dataclass(frozen=True, slots=True)
class Price:
    """Bytes on the device: ``held`` as long as the model runs, ``peak`` the most while it is loaded."""

    held: int
    peak: int


@dataclass(frozen=True, slots=True)
class Priced:
    """A model that is not loaded: its ``config`` (None: transformers runs it), the ``backend`` that would run it, and
    the bytes that one element of its keys, values and activations takes."""

    folder: Path
    backend: str
    device: str
    config: ModelConfig | None
    price: Price
    itemsize: int = _FP32
    kv_cache_dtype: KVCacheDtype = "auto"

    def kv_bytes(self, tokens: int, nodes: int) -> int:
        """Keys and values of one sequence of so many ``tokens`` and drafts of so many ``nodes``."""
        if self.config is None:
            return _foreign_kv_bytes(read_config(self.folder), tokens + nodes)
        config, form = self.config, kv_format(self.config, self.kv_cache_dtype)
        row = config.head_dim * self.itemsize if form is None else form.row_bytes
        return config.num_layers * 2 * config.num_kv_heads * self._slots(tokens, nodes) * row

    def rope_bytes(self, tokens: int) -> int:
        """cos and sin of so many positions (``RopeTable``), and what they are made from."""
        return 0 if self.config is None else 6 * _FP32 * self.config.head_dim * _power_of_two(tokens) // 2

    def work_bytes(self, rows: int) -> int:
        """Of one forward of so many rows of which each gets logits: buffers between layers, logits, and what the draw
        makes of them."""
        if self.config is None:
            return 0
        config = self.config
        widths = config.hidden_size + 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
        between = _FORWARD_ROWS * (widths + 2 * config.intermediate_size) * _FP32
        # Logits, those over a temperature, noise, the sum of the two.
        return between + 4 * rows * config.vocab_size * _FP32

    def _slots(self, tokens: int, nodes: int) -> int:
        if self.backend in dispatch.PROVEN:
            return round_up(tokens + nodes + _TILE, _CHUNK)
        return round_up(tokens + nodes, LANES)


_FORWARD_ROWS = 128  # that go through the CPU kernels' layers together
_TILE, _CHUNK = 64, 256  # what ``triton_cache.slots_for`` rounds up to; Triton need not be there to ask


def price_model(
    folder: Path, *, device: str = "cpu", exact: bool, backend: str | None = None,
    activations: dispatch.Activations | None = None, dtype: str | None = None, head_bits: int | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
) -> Priced:  # fmt: skip
    """The price of what ``load_model`` makes of the same options. Raises as that does where a header is damaged, a
    tensor is missing or no backend serves."""
    device, _ = usable_device(device, named=backend is not None)
    kind, raw = torch.device(device).type, read_config(folder)
    try:
        config = ModelConfig.of(raw, config_source(folder))
    except UnsupportedModel:
        return Priced(folder, "transformers", device, None, _foreign_price(open_store(folder)))
    asked = dispatch.Request(
        kind, dtype, row_invariant=exact, activations=activations, head_bits=head_bits, kv_cache_dtype=kv_cache_dtype
    )
    request, _ = as_stored(asked, config, folder, named=backend is not None)
    chosen = dispatch.choose(request, backend)
    itemsize = getattr(torch, request.dtype or chosen.dtypes[0]).itemsize
    bits = request.head_bits or (chosen.head_bits[0] if request.bits != 16 else 16)
    price = _Reader(open_store(folder), config, chosen, itemsize, bits).price()
    return Priced(folder, chosen.name, device, config, price, itemsize, kv_cache_dtype)


@dataclass(frozen=True, slots=True)
class _Weight:
    """``[n, k]`` as stored: with a ``scheme`` whose scales take ``scale_bytes`` each, or dense (None) with elements of
    ``itemsize``. ``parts``: of how many it is put together."""

    n: int
    k: int
    itemsize: int
    scheme: Scheme | None = None
    scale_bytes: int = 2
    zeros: bool = False
    parts: int = 1

    @property
    def read(self) -> int:
        """Bytes once it is read: codes of any scheme take one each."""
        return self.n * self.k * (self.itemsize if self.scheme is None else 1)

    @property
    def joined(self) -> int:
        """The most while its parts are put together."""
        return self.read * (2 if self.parts > 1 else 1)

    def rounded(self, scheme: Scheme, scale_bytes: int) -> _Weight:
        return replace(self, scheme=scheme, scale_bytes=scale_bytes, zeros=False)


class _Reader:
    """Goes through a checkpoint as its loader does, adding up what it keeps."""

    def __init__(
        self, store: TensorStore, config: ModelConfig, backend: dispatch.Backend, itemsize: int, head_bits: int
    ) -> None:  # fmt: skip
        self._store, self._config, self._backend, self._itemsize = store, config, backend, itemsize
        self._head_bits = head_bits
        self._held = self._peak = 0
        self._eager = backend.name not in (*dispatch.NATIVE, *dispatch.PROVEN)  # plain torch, dense layers transposed

    def price(self) -> Price:
        config, hidden = self._config, self._config.hidden_size
        embedding = self._weight(((EMBEDDING_MODULE, config.vocab_size),), hidden)
        self._vocabulary(embedding, looked_up=True)
        for i in range(config.num_layers):
            names = LayerNames.of(config, i)
            for fused in (names.qkv, names.o):
                self._linear((self._fused(fused),))
            self._linear((self._fused(names.gate_up), self._fused(names.down)))  # read before either is packed
        if not config.tied:
            self._vocabulary(self._weight(((HEAD_MODULE, config.vocab_size),), hidden))
        elif self._eager or (self._backend.name in dispatch.PROVEN and (self._head_bits != 16 or embedding.scheme)):
            self._vocabulary(embedding)  # packed, or transposed, beside the dense one that tokens are looked up in
        return Price(self._held, self._peak)

    def _weight(self, parts: tuple[tuple[str, int], ...], k: int) -> _Weight:
        store, quantization, n = self._store, self._config.quantization, sum(size for _, size in parts)
        names = [name for name, _ in parts]
        quantized = [quantized_parts(store, name) for name in names]
        if not all(quantized) or quantization is None:
            sizes = {store.info(f"{name}.weight").dtype.itemsize if not any(quantized) else _FP32 for name in names}
            return _Weight(n, k, sizes.pop() if len(sizes) == 1 else _FP32, parts=len(parts))
        schemes = [quantization.scheme_of(name) for name in names]
        if len({replace(scheme, dtype="float32") for scheme in schemes}) > 1:
            return _Weight(n, k, _FP32, parts=len(parts))  # which run dequantized
        scales = next((f"{names[0]}.{part}" for part in _SCALES if part in quantized[0]), None)
        size = store.info(scales).dtype.itemsize if scales else 2
        return _Weight(n, k, _FP32, schemes[0], size, not schemes[0].symmetric, len(parts))

    def _fused(self, fused: Fused) -> _Weight:
        return self._weight(fused.parts, fused.in_features)

    def _vocabulary(self, weight: _Weight, *, looked_up: bool = False) -> None:
        """The embedding, or the LM head."""
        gpu, quantized = self._backend.name in dispatch.PROVEN, self._config.quantization is not None
        scheme = None
        if weight.scheme is None and gpu and not looked_up:
            scheme = HEAD_SCHEMES.get(self._head_bits)
        elif weight.scheme is None and self._backend.activations == "int8" and quantized:
            scheme = HEAD_SCHEME
        if looked_up and (gpu or self._eager):
            self._add(weight.n * weight.k * self._itemsize, 0 if gpu else weight.read)
        elif scheme is None:
            self._linear((weight,))
        else:
            rounded = weight.rounded(scheme, _FP32 if scheme is HEAD_SCHEME else 2)
            self._most(0 if gpu else weight.read + rounded.read)
            self._linear((rounded,))

    def _linear(self, weights: tuple[_Weight, ...]) -> None:
        """Weights that are read, and then packed or moved one after the other."""
        gpu, before = self._backend.name in dispatch.PROVEN, 0
        for weight in weights:
            self._most(0 if gpu else before + weight.joined)
            before += weight.read
        # A GPU gets codes one to a byte, and arranges them there; plain torch transposes what it has made dense.
        passing = max(2 * each.read if each.scheme else 0 for each in weights) if gpu else before
        if self._eager:
            passing += max(map(self._kept, weights))
        self._add(sum(map(self._kept, weights)), passing)

    def _kept(self, weight: _Weight) -> int:
        """Bytes of a weight in this backend's hands."""
        n, k, scheme, name = weight.n, weight.k, weight.scheme, self._backend.name
        if name in dispatch.NATIVE:
            if scheme is None:
                return packed.dense_bytes(n, k, weight.itemsize)
            return packed.quantized_bytes(n, k, scheme, weight.scale_bytes, zeros=weight.zeros)
        if scheme is None or name.startswith("reference"):
            return n * k * self._itemsize
        bits, groups = 4 if scheme.bits <= 4 else 8, n * scheme.num_groups(k)
        return n * k * bits // 8 + groups * (weight.scale_bytes + weight.zeros)

    def _most(self, passing: int) -> None:
        self._peak = max(self._peak, self._held + passing)

    def _add(self, count: int, passing: int) -> None:
        self._held += count
        self._most(passing)


_SCALES = ("weight_scale", "scales", "s")


def price_head(folder: Path, store: TensorStore, device: str, *, native: bool) -> Price:
    """Of a drafter's head: all of it is read, and then packed (``native``) or made fp32."""
    read = held = 0
    for name in store:
        info, codes = store.info(name), name.endswith((".weight_packed", ".qweight"))
        size = store.size(name)
        # Packed codes pass through one byte each, and through fp32: whoever reads a head may ask for its numbers.
        read += size + (2 * size * (1 + _FP32) if codes else 0)
        keep = native and not name.startswith("embed_tokens")
        held += size if keep or codes else math.prod(info.shape) * _FP32
    return Price(held, held + (read if torch.device(device).type == "cpu" else 0))


def _foreign_price(store: TensorStore) -> Price:
    """transformers keeps floating-point numbers in fp32 here, and quantized ones as they are."""
    sizes = {name: store.info(name) for name in store}
    held = sum(
        math.prod(info.shape) * _FP32 if info.dtype.is_floating_point else info.end - info.begin
        for info in sizes.values()
    )
    return Price(held, held + max((info.end - info.begin for info in sizes.values()), default=0))


def _foreign_kv_bytes(raw: dict[str, Any], tokens: int) -> int:
    """As far as the usual keys tell; 0 where there are none, as of models that keep a state instead."""

    def size(*keys: str) -> int:
        return next((raw[key] for key in keys if isinstance(raw.get(key), int)), 0)

    layers, heads = size("num_hidden_layers", "n_layer"), size("num_attention_heads", "n_head")
    width = size("head_dim") or size("hidden_size", "n_embd") // max(heads, 1)
    return layers * 2 * size("num_key_value_heads", "num_attention_heads", "n_head") * width * tokens * _FP32


def _power_of_two(count: int) -> int:
    return 1 << (max(count, 256) - 1).bit_length()
