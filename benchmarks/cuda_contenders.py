"""What ``bench kernels --device cuda`` compares: every backend's product, over its own form of the same weight.

Each holds so many copies of its matrix that one graph through all of them finds none in the second-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantspec.benchmarks.cuda_timing import copies_of
from quantspec.errors import QuantSpecError, Unavailable
from quantspec.numerics.affine import QuantizedWeight, dequantize
from quantspec.numerics.scheme import Scheme

Layer = Callable[[Tensor], object]


def random_weight(
    n_out: int, k: int, bits: int, dtype: torch.dtype, device: torch.device, group_size: int = 128, *,
    symmetric: bool = True,
) -> QuantizedWeight:  # fmt: skip
    """Codes, scales and zero points at random, every code as likely as any other; rows of the product have about the
    size of the input's."""
    scheme = Scheme(bits, group_size, symmetric, str(dtype).removeprefix("torch."))
    groups, (low, high) = scheme.num_groups(k), (scheme.q_min, scheme.q_max + 1)
    codes = torch.randint(low, high, (n_out, k), dtype=torch.int8, device=device)
    deviation = 12**0.5 / 2**bits / k**0.5  # of uniform codes: 2^bits / sqrt(12)
    scale = (torch.rand(n_out, groups, device=device) + 0.5) * deviation
    zeros = None if symmetric else torch.randint(low, high, (n_out, groups), dtype=torch.int8, device=device)
    return QuantizedWeight(codes, scale.to(dtype), zeros, scheme)


@dataclass(frozen=True)
class CudaContender:
    """A backend on one shape. ``nbytes``: weights that one product reads; ``group_size`` None: they are not quantized;
    ``layers``: a product each, by the copies."""

    backend: str
    mode: str
    group_size: int | None
    nbytes: int
    layers: list[Layer]


class CudaField:
    """Contenders for one weight K x N of 4 or 8 ``bits``, with activations of ``dtype``."""

    def __init__(
        self, shape: tuple[int, int], group_size: int, device: torch.device, *,
        bits: int = 4, dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        self.shape, self.group_size, self.bits, self.dtype, self.device = shape, group_size, bits, dtype, device

    def contender(self, backend: str) -> CudaContender:
        """Raises ``Unavailable`` if it does not run here, ``UsageError`` for a weight that it cannot hold."""
        makers = {
            "cuda": self._cuda, "triton": self._triton, "torch-bf16": self._dense,
            "gptqmodel-marlin": self._marlin, "bnb-nf4": self._nf4,
        }  # fmt: skip
        return makers[backend]()

    @cached_property
    def weight(self) -> QuantizedWeight:
        k, n_out = self.shape
        return random_weight(n_out, k, self.bits, self.dtype, self.device, self.group_size)

    def _packed(self, backend: str, nbytes: int, layers: list[Layer]) -> CudaContender:
        return CudaContender(backend, f"w{self.bits}a16", self.group_size, nbytes, layers)

    def _cuda(self) -> CudaContender:
        from quantspec.kernels.cuda.linear import CudaLinear, Workspace
        from quantspec.kernels.cuda.packed import pack

        workspace, packed = Workspace(self.device), pack(self.weight)
        copies = [replace(packed, tiles=packed.tiles.clone()) for _ in range(copies_of(packed.nbytes))]
        return self._packed("cuda", packed.nbytes, [CudaLinear(copy, workspace) for copy in copies])

    def _triton(self) -> CudaContender:
        if find_spec("triton") is None:
            raise Unavailable("the triton package is not installed")
        from quantspec.kernels.triton.linear import TritonLinear

        first = TritonLinear(self.weight, device=self.device)
        nbytes = sum(part.nbytes for part in vars(first).values() if isinstance(part, Tensor))
        return self._packed("triton", nbytes, [deepcopy(first) for _ in range(copies_of(nbytes))])

    def _dense(self) -> CudaContender:
        """torch's own product in the type of the activations, over the same numbers."""
        plain = dequantize(self.weight).to(self.dtype)
        copies = [plain.clone() for _ in range(copies_of(plain.nbytes))]
        return CudaContender("torch-bf16", "dense", None, plain.nbytes, [_bind(linear, copy) for copy in copies])

    def _marlin(self) -> CudaContender:
        from quantspec.kernels import gptqmodel

        if (why := gptqmodel.missing()) is not None:
            raise Unavailable(why)
        weight = self.weight
        nbytes = weight.codes.numel() * self.bits // 8 + weight.scale.nbytes
        layers: list[Layer] = [
            gptqmodel.MarlinLinear(weight, None, self.device, self.dtype) for _ in range(copies_of(nbytes))
        ]
        return self._packed("gptqmodel-marlin", nbytes, layers)

    def _nf4(self) -> CudaContender:
        if find_spec("bitsandbytes") is None:
            raise Unavailable("the bitsandbytes package is not installed")
        if self.bits != 4:
            raise Unavailable(f"bnb-nf4 has no {self.bits}-bit weights")
        import bitsandbytes

        functional: Any = bitsandbytes.functional
        quantized, state = functional.quantize_4bit(dequantize(self.weight).to(self.dtype), quant_type="nf4")
        nbytes = quantized.nbytes + state.absmax.nbytes

        def layer() -> Layer:
            own, mine = quantized.clone(), deepcopy(state)
            return lambda x: bitsandbytes.matmul_4bit(x, own.t(), mine)

        return CudaContender("bnb-nf4", "nf4a16", 64, nbytes, [layer() for _ in range(copies_of(nbytes))])


def reason(error: Exception) -> str:
    """One line on why a contender does not take part. What other packages raise is not ours to foresee."""
    text = str(error) if isinstance(error, QuantSpecError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0][:200] if text else type(error).__name__


def _bind(product: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> Layer:
    return lambda x: product(x, weight)
