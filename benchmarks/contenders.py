"""What ``bench kernels`` compares: every backend's product, with its own form of the same weight.

Each holds enough copies of its matrix that a call never finds it in a cache: four times the last-level cache in all,
and at least 128 MB.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle

import torch

from quantspec.errors import Unavailable
from quantspec.kernels.cpu import library, probes
from quantspec.kernels.cpu.packed import Arena, PackedLinear, pack
from quantspec.numerics.affine import QuantizedWeight
from quantspec.numerics.scheme import Scheme

LEAST_BYTES = 128 * 2**20
Product = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """A backend on one shape. ``nbytes``: weights that one product reads; ``group_size`` None: they are not quantized.
    ``product(n)`` gives a call that multiplies n rows with the next copy of the matrix."""

    backend: str
    mode: str
    group_size: int | None
    nbytes: int
    product: Callable[[int], Product]


class Field:
    """Contenders for one weight, K x N. ``nbytes``: of all copies of one (None: enough to defeat the caches)."""

    def __init__(self, shape: tuple[int, int], group_size: int, seed: int, nbytes: int | None = None) -> None:
        self.shape, self.group_size = shape, group_size
        self._least = nbytes or max(LEAST_BYTES, 4 * probes.l3_bytes())
        self._generator = torch.Generator().manual_seed(seed)

    def contender(self, backend: str) -> Contender:
        """Raises ``Unavailable`` if it does not run here."""
        if backend.startswith("cpu-"):
            return self._native(backend)
        return self._torch_int4() if backend == "torch-int4" else self._dense(backend)

    def _copies(self, nbytes: int) -> int:
        """How many to make of a weight of ``nbytes``, besides itself."""
        return max(0, math.ceil(self._least / nbytes) - 1)

    @cached_property
    def _weight(self) -> QuantizedWeight:
        (k, n_out), scheme = self.shape, Scheme(4, self.group_size)
        codes = torch.randint(-8, 8, (n_out, k), generator=self._generator, dtype=torch.int8)
        scale = torch.rand(n_out, scheme.num_groups(k), generator=self._generator) * 0.01 + 0.005
        return QuantizedWeight(codes, scale.to(torch.bfloat16), None, scheme)

    @cached_property
    def _packed(self) -> list[PackedLinear]:
        arena = Arena()
        first = pack(self._weight, arena=arena)
        return [first, *(pack(self._weight, arena=arena) for _ in range(self._copies(first.nbytes)))]

    @cached_property
    def _turn(self) -> Iterator[PackedLinear]:
        """One for all native backends: with one each, a call could find in a cache what the other has just read."""
        return cycle(self._packed)

    def _native(self, backend: str) -> Contender:
        matmul = library.bind("qs_matmul", None, [c_void_p, c_void_p, c_int64, c_int, c_void_p, c_int64, c_int, c_int])
        (k, n_out), int8, turn = self.shape, int(backend == "cpu-int8"), self._turn

        def product(n: int) -> Product:
            x, y = torch.randn(n, k), torch.empty(n, n_out)
            arguments = (x.data_ptr(), k, n, y.data_ptr(), n_out, 0, int8)

            def call(_alive: object = (x, y)) -> None:
                matmul(ctypes.addressof(next(turn).struct), *arguments)

            return call

        return Contender(backend, "int8" if int8 else "fp32", self.group_size, self._packed[0].nbytes, product)

    def _dense(self, backend: str) -> Contender:
        (k, n_out), dtype = self.shape, torch.float32 if backend == "torch-fp32" else torch.bfloat16
        nbytes = k * n_out * dtype.itemsize
        weight = torch.randn(n_out, k, generator=self._generator).to(dtype)
        turn = cycle([weight, *(weight.clone() for _ in range(self._copies(nbytes)))])

        def product(n: int) -> Product:
            x = torch.randn(n, k).to(dtype)
            return lambda: torch.nn.functional.linear(x, next(turn))

        return Contender(backend, "dense", None, nbytes, product)

    def _torch_int4(self) -> Contender:
        from quantspec.kernels.torch_int4 import TorchInt4Linear

        if self.group_size not in (32, 64, 128, 256):
            raise Unavailable(f"torch-int4 has no groups of {self.group_size}")
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            raise Unavailable("this torch has no int4 operator")
        (k, n_out), weight = self.shape, self._weight
        nbytes = n_out * k // 2 + weight.scale.numel() * 8  # fp32 pairs of scale and zero point
        first = TorchInt4Linear(weight)
        turn = cycle([first, *(deepcopy(first) for _ in range(self._copies(nbytes)))])

        def product(n: int) -> Product:
            x = torch.randn(n, k)
            return lambda: next(turn)(x)

        return Contender("torch-int4", "fp32", self.group_size, nbytes, product)
