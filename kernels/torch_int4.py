"""torch's own int4 matmul on the CPU (tinygemm's layout) behind the call of ``reference.Linear``.

The operator computes ``x @ W.T`` with ``W = (u - 8) * scale + zero`` for codes u of 0 to 15 and one (scale, zero) pair
per group and output. It wants N in multiples of 16 and K in whole groups: both are padded here. Its rows change with
the width of a call, so it is not row-invariant.

Inputs, scales and outputs are rounded to bf16: the operator has vector code for that type alone. On 4096 x 4096 one row
takes 0.43 ms (AVX-512) or 1.0 ms (AVX2) with it, 14 to 18 ms in fp32 or fp16, dense fp32 3.9 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quantspec.numerics.affine import QuantizedWeight

_COLUMNS = 16
_MIDDLE = 8
"""The unsigned code that the operator takes for 0."""


class TorchInt4Linear:
    """``x [n, K] @ W [N, K].T + bias [N]`` over 4-bit codes in groups of 32, 64, 128 or 256."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        scheme, (n, k) = weight.scheme, weight.codes.shape
        assert scheme.bits == 4, "dispatch chose this backend"
        assert scheme.group_size in (32, 64, 128, 256), "dispatch chose this backend"
        self.out_features, self.bias = n, bias
        self._group, self._more_k, more_n = scheme.group_size, -k % scheme.group_size, -n % _COLUMNS
        codes = F.pad(weight.codes.int() + _MIDDLE, (0, self._more_k, 0, more_n))
        scale = F.pad(weight.scale.float(), (0, 0, 0, more_n))
        zero = torch.zeros_like(scale)
        if weight.zero_point is not None:
            zero[:n] = -scale[:n] * weight.zero_point
        self._order = weight.order
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self._scale_and_zero = torch.stack((scale.t(), zero.t()), dim=-1).bfloat16().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self._order is None else x.index_select(1, self._order)
        padded = F.pad(x, (0, self._more_k)).bfloat16().contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(padded, self._packed, self._group, self._scale_and_zero)
        y = y[:, : self.out_features].float()
        return y if self.bias is None else y + self.bias
