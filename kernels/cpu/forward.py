"""The structs of ``src/forward.h``, and its functions with their C types."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int32, c_void_p
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantspec.kernels.cpu.library import bind, no_memory
from quantspec.kernels.cpu.packed import LinearStruct, PackedLinear


class _LayerStruct(ctypes.Structure):
    _fields_ = (
        ("input_norm", c_void_p), ("post_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p),
        ("qkv", LinearStruct), ("o", LinearStruct), ("gate_up", LinearStruct), ("down", LinearStruct),
        ("window", c_int32),
    )  # fmt: skip


class ModelStruct(ctypes.Structure):
    """``struct Model``."""

    _fields_ = (
        ("layers", c_void_p), ("norm", c_void_p), ("embedding", LinearStruct), ("head", LinearStruct),
        ("layer_count", c_int32), ("hidden", c_int32), ("inner", c_int32), ("heads", c_int32), ("kv_heads", c_int32),
        ("head_dim", c_int32), ("eps", c_float), ("int8", c_int32), ("kv_bits", c_int32),
    )  # fmt: skip


class RowsStruct(ctypes.Structure):
    """``struct Rows``: the rows of one forward and where their results go."""

    _fields_ = (
        ("n", c_int32), ("sequences", c_int32), ("tap_count", c_int32), ("numbers", c_void_p), ("caches", c_void_p),
        ("taps", c_void_p), ("cos", c_void_p), ("sin", c_void_p), ("logits", c_void_p),
        ("seconds", c_void_p),
    )  # fmt: skip


PARTS = ("embedding", "qkv", "attention", "o", "mlp", "head")
"""Of a forward, as ``enum Part`` numbers them: a norm counts to what it feeds."""


@dataclass(slots=True)
class PackedLayer:
    """Weights of one decoder layer; q, k and v, and gate and up, are fused. Norms are fp32 and contiguous."""

    input_norm: Tensor
    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: PackedLinear
    post_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear
    window: int | None

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down


def layer_structs(layers: Sequence[PackedLayer]) -> Any:
    """An array of ``struct Layer``, which points into ``layers`` and must not outlive them."""
    structs = [
        _LayerStruct(
            layer.input_norm.data_ptr(), layer.post_norm.data_ptr(), _pointer(layer.q_norm), _pointer(layer.k_norm),
            *(linear.struct for linear in layer.linears), layer.window or 0,
        )
        for layer in layers
    ]  # fmt: skip
    return (_LayerStruct * len(structs))(*structs)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def bind_forward() -> Any:
    return bind("qs_forward", no_memory, [c_void_p, c_void_p])


def bind_rms_norm() -> Any:
    return bind("qs_rms_norm", None, [c_void_p, c_void_p, c_int, c_int, c_float, c_void_p])
