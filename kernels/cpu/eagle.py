"""A whole forward of an EAGLE-1/2 head in one native call."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from quantspec.kernels.cpu.library import bind, no_memory
from quantspec.kernels.cpu.packed import Arena, LinearStruct, pack

_PARTS = ("fc", "qkv", "o", "gate_up", "down")


class _EagleStruct(ctypes.Structure):
    """``struct EagleLayer`` of ``src/eagle.h``."""

    _fields_ = (
        *((name, LinearStruct) for name in _PARTS),
        ("norm", c_void_p), ("eps", c_float), ("heads", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32),
    )  # fmt: skip


class EagleKernel:
    """The layer's weights, packed: ``fc [H, 2H]`` with its bias, ``qkv`` (queries unscaled) with its bias, ``o``,
    ``gate_up`` and ``down``; ``norm [H]``. Dense in their own type, with fp32 activations."""

    def __init__(
        self, weights: dict[str, tuple[Tensor, Tensor | None]], norm: Tensor, *, eps: float, heads: int, kv_heads: int,
        head_dim: int,
    ) -> None:  # fmt: skip
        arena = Arena()
        self._linears = {name: pack(*weights[name], arena=arena) for name in _PARTS}
        self._norm = norm.float().contiguous()
        self._struct = _EagleStruct(
            **{name: linear.struct for name, linear in self._linears.items()},
            norm=self._norm.data_ptr(), eps=eps, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        )  # fmt: skip
        self._address = ctypes.addressof(self._struct)
        pointer, size = c_void_p, c_int64
        arguments = [pointer, c_int, *[pointer] * 4, size, pointer, size, c_int, pointer, c_int, pointer]
        self._forward = bind("qs_eagle_forward", no_memory, arguments)

    def __call__(
        self, features: Tensor, embeddings: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, start: int, bias: Tensor
    ) -> Tensor:
        """``EagleHead.forward``: outputs ``[m, H]``. ``cos`` and ``sin [m or 1, head_dim]`` are those of the slots, the
        first half of sin negated; ``kv [2, kv_heads, capacity, head_dim]`` gets slots ``start`` on. All fp32."""
        m, width = bias.shape
        features, embeddings, bias = features.contiguous(), embeddings.contiguous(), bias.contiguous()
        assert features.shape == embeddings.shape == (m, self._struct.fc.rows), "one feature and embedding per slot"
        assert width <= start + m <= kv.shape[2], "slots that the cache does not have"
        assert kv.is_contiguous()
        assert features.dtype == embeddings.dtype == bias.dtype == kv.dtype == cos.dtype == torch.float32
        assert cos.is_contiguous()
        assert cos.shape == sin.shape == (len(cos), kv.shape[3])
        assert len(cos) in (1, m)
        out = torch.empty_like(features)
        self._forward(
            self._address, m, features.data_ptr(), embeddings.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            0 if cos.shape[0] == 1 else cos.shape[1], kv.data_ptr(), kv.shape[2], start, bias.data_ptr(), width,
            out.data_ptr(),
        )  # fmt: skip
        return out
