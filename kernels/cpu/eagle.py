"""A whole forward of a decoder layer of an EAGLE head in one native call."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from quantspec.kernels.cpu.library import bind, no_memory
from quantspec.kernels.cpu.packed import Arena, LinearStruct, pack_any
from quantspec.numerics.affine import QuantizedWeight

_PARTS = ("fc", "qkv", "o", "gate_up", "down")


class _EagleStruct(ctypes.Structure):
    """``struct EagleLayer`` of ``src/eagle.h``."""

    _fields_ = (
        *((name, LinearStruct) for name in _PARTS),
        ("norm", c_void_p), ("input_norm", c_void_p), ("hidden_norm", c_void_p), ("eps", c_float), ("heads", c_int32),
        ("kv_heads", c_int32), ("head_dim", c_int32), ("residual_normed", c_int32),
        ("integer", c_int32),
    )  # fmt: skip


class EagleKernel:
    """The layer's weights, packed: ``qkv`` (queries unscaled) with its bias, ``o``, ``gate_up`` and ``down``; ``norm
    [H]`` before the MLP. Dense in their own type or quantized, with fp32
    activations or, ``integer``, int8 ones.

    EAGLE-1/2: attention reads what ``fc [H, 2H]`` with its bias makes of embedding and feature. EAGLE-3 has no ``fc``
    here: its first layer reads both side by side, after ``input_norm`` and ``hidden_norm [H]``; its others read their
    features after ``input_norm``. ``residual_normed``: the residual stream starts from the normed feature.
    """

    def __init__(
        self, weights: Mapping[str, tuple[Tensor | QuantizedWeight, Tensor | None]], norm: Tensor, *, eps: float,
        heads: int, kv_heads: int, head_dim: int, input_norm: Tensor | None = None, hidden_norm: Tensor | None = None,
        residual_normed: bool = False, integer: bool = False,
    ) -> None:  # fmt: skip
        arena = Arena()
        self._linears = {name: pack_any(*weights[name], arena=arena) for name in _PARTS if name in weights}
        norms = {"norm": norm, "input_norm": input_norm, "hidden_norm": hidden_norm}
        self._norms = {name: each.float().contiguous() for name, each in norms.items() if each is not None}
        assert ("fc" in weights) == (input_norm is None), "either fc or norms make what attention reads"
        assert hidden_norm is not None or not residual_normed
        self._hidden = self._linears["o"].shape[0]
        self._reads_embeddings = input_norm is None or hidden_norm is not None
        self._struct = _EagleStruct(
            **{name: linear.struct for name, linear in self._linears.items()},
            **{name: each.data_ptr() for name, each in self._norms.items()},
            eps=eps, heads=heads, kv_heads=kv_heads, head_dim=head_dim, residual_normed=int(residual_normed),
            integer=int(integer),
        )  # fmt: skip
        self._address = ctypes.addressof(self._struct)
        pointer, size = c_void_p, c_int64
        arguments = [pointer, c_int, *[pointer] * 4, size, pointer, size, c_int, pointer, c_int, pointer]
        self._forward = bind("qs_eagle_forward", no_memory, arguments)

    def __call__(
        self, features: Tensor, embeddings: Tensor | None, cos: Tensor, sin: Tensor, kv: Tensor, start: int,
        bias: Tensor,
    ) -> Tensor:  # fmt: skip
        """``EagleHead.forward``: outputs ``[m, H]``. ``cos`` and ``sin [m or 1, head_dim]`` are those of the slots, the
        first half of sin negated; ``kv [2, kv_heads, capacity, head_dim]`` gets slots ``start`` on. All fp32."""
        m, width = bias.shape
        features, bias = features.contiguous(), bias.contiguous()
        assert features.shape == (m, self._hidden), "one feature per slot"
        if self._reads_embeddings:
            assert embeddings is not None
            embeddings = embeddings.contiguous()
            assert (embeddings.shape, embeddings.dtype) == (features.shape, torch.float32), "one embedding per slot"
        assert width <= start + m <= kv.shape[2], "slots that the cache does not have"
        assert kv.is_contiguous()
        assert features.dtype == bias.dtype == kv.dtype == cos.dtype == torch.float32
        assert cos.is_contiguous()
        assert cos.shape == sin.shape == (len(cos), kv.shape[3])
        assert len(cos) in (1, m)
        out = torch.empty_like(features)
        self._forward(
            self._address, m, features.data_ptr(), None if embeddings is None else embeddings.data_ptr(),
            cos.data_ptr(), sin.data_ptr(), 0 if cos.shape[0] == 1 else cos.shape[1], kv.data_ptr(), kv.shape[2], start,
            bias.data_ptr(), width, out.data_ptr(),
        )  # fmt: skip
        return out
