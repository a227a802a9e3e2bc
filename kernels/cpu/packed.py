"""Linear layers packed for the CPU kernels (layout: ``src/linear.h``), in 2 MB pages where the system has them."""

from __future__ import annotations

import ctypes
import math
import mmap
from ctypes import c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from quantspec.errors import ModelError, UsageError
from quantspec.kernels.cpu.library import bind, no_memory
from quantspec.numerics.affine import QuantizedWeight, dequantize
from quantspec.numerics.scheme import CHANNEL, Scheme

PANEL = 32
"""Output rows that lie together; N is filled up to a multiple."""
GROUPS = (128, 64, 32)
"""Group sizes of the kernels; other sizes are split into the largest of these that divides them."""
_Q4, _Q8 = 0, 1
_DTYPES = {torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}
_HUGE = 2 * 2**20


class LinearStruct(ctypes.Structure):
    """``struct Linear`` of ``src/linear.h``."""

    _fields_ = (
        ("panels", c_void_p), ("bias", c_void_p), ("order", c_void_p), ("rows", c_int32), ("cols", c_int32),
        ("format", c_int32), ("group", c_int32), ("scale_type", c_int32), ("asymmetric", c_int32),
    )  # fmt: skip


class Arena:
    """Hands out memory for packed weights from chunks that ask for 2 MB pages; many small mappings would get none."""

    def __init__(self, chunk: int = 32 * _HUGE) -> None:
        self._chunk, self._free = chunk, torch.empty(0, dtype=torch.uint8)

    def take(self, count: int) -> Tensor:
        """``count`` zeroed bytes, aligned to 64."""
        size = math.ceil(count / 64) * 64
        if size > self._free.shape[0]:
            self._free = _huge_pages(max(size, self._chunk))
        taken, self._free = self._free[:count], self._free[size:]
        return taken


def _huge_pages(count: int) -> Tensor:
    size = math.ceil(count / _HUGE) * _HUGE
    try:
        # Private: Python's default is a shared mapping, which Linux gives large pages only where it was set up to.
        memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # as torch would say it
        raise MemoryError(f"no room for {size} bytes of packed weights") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + size]


def refusal(scheme: Scheme) -> str | None:
    """Why a weight of this scheme cannot be packed; None if it can."""
    if scheme.group_size != CHANNEL and scheme.group_size % GROUPS[-1]:
        return f"has groups of multiples of {GROUPS[-1]} alone, not of {scheme.group_size}"
    return None


def quantized_bytes(n: int, k: int, scheme: Scheme, scale_bytes: int, *, zeros: bool) -> int:
    """What ``pack`` makes of a quantized weight ``[n, k]``; ``zeros``: that has zero points."""
    group = _kernel_group(_source_group(scheme, k))
    per_group = PANEL * (scale_bytes + (group // 2 if scheme.bits <= 4 else group)) + (64 if zeros else 0)
    return math.ceil(n / PANEL) * math.ceil(k / group) * per_group


def dense_bytes(n: int, k: int, itemsize: int) -> int:
    """What ``pack`` makes of a dense weight ``[n, k]``."""
    return math.ceil(n / PANEL) * PANEL * k * itemsize


def _source_group(scheme: Scheme, k: int) -> int:
    """Width of the weight's own groups; one that spans a row ends with a panel."""
    return scheme.group(k) if scheme.group(k) < k else math.ceil(k / PANEL) * PANEL


def _kernel_group(source_group: int) -> int:
    return next(size for size in GROUPS if source_group % size == 0)


class PackedLinear:
    """``x [n, K] @ weight [N, K].T + bias [N]`` with the weight in panels.

    ``integer`` says whether quantized weights meet int8 activations (one scale per row and group, codes within +-127)
    or fp32 ones. Either way a row of the output has the same bits for every n and number of threads. ``nbytes`` is
    what one product reads. Safe to call from several threads.
    """

    def __init__(
        self, struct: LinearStruct, memory: Tensor, bias: Tensor | None, *, integer: bool, order: Tensor | None = None
    ) -> None:  # fmt: skip
        self.struct, self.integer = struct, integer
        self.shape = (struct.rows, struct.cols)
        self.nbytes = memory.shape[0]
        self._memory, self._bias, self._order = memory, bias, order  # which the struct points into

    @property
    def quantized(self) -> bool:
        return self.struct.format in (_Q4, _Q8)

    def __call__(self, x: Tensor) -> Tensor:
        """``[n, K]`` fp32 to ``[n, N]``. Raises ``UsageError`` for another shape, type, device or memory order."""
        n_out, k = self.shape
        if x.dim() != 2 or x.shape[1] != k or x.dtype != torch.float32 or x.device.type != "cpu" or x.stride(1) != 1:
            found = f"{list(x.shape)} of {x.dtype} on {x.device}, strides {x.stride()}"
            raise UsageError(f"a packed weight [{n_out}, {k}] needs rows [n, {k}] of float32 on the CPU, not {found}")
        y = x.new_empty(x.shape[0], n_out)
        if x.shape[0]:
            arguments = (x.data_ptr(), x.stride(0), x.shape[0], y.data_ptr(), n_out, 0, int(self.integer))
            _matmul()(ctypes.byref(self.struct), *arguments)
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Dequantized rows ``[n, K]`` of the weight for int32 ``ids [n]``: embeddings out of a tied LM head."""
        assert ids.dtype == torch.int32
        numbers = ids.numpy()  # whose min and max cost a tenth of torch's
        assert not len(numbers) or (numbers.flags.c_contiguous and 0 <= numbers.min() <= numbers.max() < self.shape[0])
        out = torch.empty(len(ids), self.shape[1])
        _embed()(ctypes.byref(self.struct), ids.data_ptr(), len(ids), out.data_ptr(), self.shape[1])
        return out


def pack(
    weight: QuantizedWeight | Tensor, bias: Tensor | None = None, *, arena: Arena | None = None, integer: bool = True
) -> PackedLinear:
    """Pack a weight ``[N, K]``: codes of up to 4 bits as nibbles, of 5 to 8 as bytes, plain tensors in their own type.

    K need not be a multiple of the group, nor N one of the panel. Raises ``ModelError`` for scales that are not finite,
    ``UsageError`` for shapes, types or schemes that the kernels do not have.
    """
    weight_shape = weight.shape if isinstance(weight, Tensor) else weight.codes.shape
    if bias is not None:
        if bias.shape != weight_shape[:1] or bias.device.type != "cpu":
            raise UsageError(f"a bias {list(bias.shape)} on {bias.device} does not fit a weight {list(weight_shape)}")
        bias = bias.float().contiguous()
    if isinstance(weight, Tensor):
        return _pack_dense(weight, bias, arena or Arena(0))
    return _pack_quantized(weight, bias, arena or Arena(0), integer)


def pack_any(
    weight: QuantizedWeight | Tensor, bias: Tensor | None = None, *, arena: Arena | None = None, integer: bool = False
) -> PackedLinear:
    """``pack``, for fp32 activations unless told otherwise; a scheme that the kernels do not have is dequantized, to
    bf16."""
    if isinstance(weight, QuantizedWeight) and refusal(weight.scheme) is not None:
        weight = dequantize(weight).bfloat16()
    return pack(weight, bias, arena=arena, integer=integer)


def _pack_dense(weight: Tensor, bias: Tensor | None, arena: Arena) -> PackedLinear:
    if weight.dim() != 2 or 0 in weight.shape or weight.dtype not in _DTYPES or weight.device.type != "cpu":
        raise UsageError(f"cannot pack a weight {list(weight.shape)} of {weight.dtype} on {weight.device}")
    n, k = weight.shape
    dense = weight.contiguous()
    struct = LinearStruct(rows=n, cols=k, format=_DTYPES[weight.dtype])
    memory = _allocate(struct, bias, arena, dense_bytes(n, k, weight.element_size()))
    bind("qs_pack_dense", None, [c_void_p, c_void_p])(ctypes.byref(struct), dense.data_ptr())
    return PackedLinear(struct, memory, bias, integer=False)


def _pack_quantized(weight: QuantizedWeight, bias: Tensor | None, arena: Arena, integer: bool) -> PackedLinear:
    (n, k), scheme = weight.codes.shape, weight.scheme
    why = refusal(scheme)
    if why is not None:
        raise UsageError(f"the CPU kernels cannot hold a weight [{n}, {k}]: {why}")
    zero_points, shape = weight.zero_point, (n, scheme.num_groups(k))
    fits = weight.scale.shape == shape and (zero_points is None or zero_points.shape == shape)
    if 0 in (n, k) or not fits or weight.codes.dtype != torch.int8 or weight.scale.dtype not in _DTYPES:
        raise UsageError(
            f"codes [{n}, {k}] of {weight.codes.dtype} with scales {list(weight.scale.shape)} of {weight.scale.dtype}"
            f"{'' if zero_points is None else f' and zero points {list(zero_points.shape)}'} are not a weight of "
            f"{scheme.bits} bits in groups of {scheme.group(k)}"
        )
    order = _checked_order(weight)
    if not torch.isfinite(weight.scale).all():
        raise ModelError(f"a weight [{n}, {k}] has scales that are not finite", hint="quantize the model again")
    source_group = _source_group(scheme, k)
    group = _kernel_group(source_group)
    codes, scale = weight.codes.contiguous(), weight.scale.contiguous()
    zeros = None if zero_points is None else zero_points.to(torch.int8).contiguous()
    struct = LinearStruct(
        rows=n, cols=k, format=_Q4 if scheme.bits <= 4 else _Q8, group=group, scale_type=_DTYPES[scale.dtype],
        asymmetric=int(zeros is not None), order=None if order is None else order.data_ptr(),
    )  # fmt: skip
    count = quantized_bytes(n, k, scheme, scale.element_size(), zeros=zeros is not None)
    memory = _allocate(struct, bias, arena, count)
    bind("qs_pack_quantized", None, [c_void_p] * 4 + [c_int])(
        ctypes.byref(struct),
        codes.data_ptr(),
        scale.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        source_group,
    )
    return PackedLinear(struct, memory, bias, integer=integer, order=order)


def _checked_order(weight: QuantizedWeight) -> Tensor | None:
    """The activation order as int32, which the kernels index inputs by."""
    (n, k), order = weight.codes.shape, weight.order
    if order is not None and not torch.equal(order.sort().values, torch.arange(k)):
        raise UsageError(f"the activation order of a weight [{n}, {k}] is not a permutation of its {k} inputs")
    return None if order is None else order.int().contiguous()


def _allocate(struct: LinearStruct, bias: Tensor | None, arena: Arena, count: int) -> Tensor:
    memory = arena.take(count)
    struct.panels, struct.bias = memory.data_ptr(), None if bias is None else bias.data_ptr()
    return memory


@cache
def _matmul() -> ctypes._NamedFuncPointer:
    arguments = [c_void_p, c_void_p, c_int64, c_int, c_void_p, c_int64, c_int, c_int]
    return bind("qs_matmul", no_memory, arguments)


@cache
def _embed() -> ctypes._NamedFuncPointer:
    return bind("qs_embed", None, [c_void_p, c_void_p, c_int, c_void_p, c_int64])
