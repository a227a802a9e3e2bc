"""Packed products on a GPU: are they right, and are rows the same at every width?

Everything is checked on fresh random data against fp64, with outputs poisoned beforehand. It is held to norms of whole
outputs; ``tests/kernels`` look at single entries.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantspec.benchmarks.cuda_contenders import random_weight
from quantspec.errors import UsageError, VerificationError
from quantspec.numerics.affine import QuantizedWeight, dequantize

if TYPE_CHECKING:
    from quantspec.models.load_triton import Kernels

BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
"""Relative error against fp64, the rounding of the output included."""
MOST_ROWS = 64


@dataclass(frozen=True)
class Case:
    """A weight ``[n_out, k]``."""

    n_out: int
    k: int
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    @property
    def kind(self) -> str:
        return f"w{self.bits} g{self.group_size}{'' if self.symmetric else ' with zero points'}"

    def weight(self, scales: torch.dtype, device: torch.device) -> QuantizedWeight:
        symmetric = self.symmetric
        return random_weight(self.n_out, self.k, self.bits, scales, device, self.group_size, symmetric=symmetric)


CASES = (
    Case(256, 128),
    Case(300, 384),  # ragged rows
    Case(4096, 4096),
    Case(6144, 4096),
    Case(4096, 14336),  # many blocks to a row block
    Case(1000, 8192, bits=8),
    Case(2048, 4096, group_size=32),
    Case(2048, 4096, group_size=64),
    Case(2048, 4096, symmetric=False),
    Case(520, 1056, group_size=32, symmetric=False),  # K of no whole tile
)
Product = Callable[[Tensor], Tensor]


def product(kernels: Kernels, weight: QuantizedWeight, bias: Tensor | None, device: torch.device) -> Product:
    """A layer of one kind of kernels. Raises ``UsageError`` for a weight that they cannot hold."""
    if kernels == "triton":
        from quantspec.kernels.triton.linear import TritonLinear

        return TritonLinear(weight, bias, device)
    from quantspec.kernels.cuda.linear import CudaLinear, Workspace
    from quantspec.kernels.cuda.packed import pack

    return CudaLinear(pack(weight), Workspace(device), bias)


def check(
    kernels: Kernels, device: torch.device, dtypes: Sequence[torch.dtype], cases: Sequence[Case] = CASES,
    widths: Iterable[int] = range(1, MOST_ROWS + 1),
) -> dict[str, float | str]:  # fmt: skip
    """The largest relative error of each kind, having compared rows at every width with the same rows among 64; or, for
    a kind that these kernels do not have, why.

    Raises ``VerificationError`` where an error is too large, or rows differ.
    """
    found: dict[str, float | str] = {}
    widths = tuple(widths)
    with poisoned():
        for case in cases:
            for dtype in dtypes:
                kind = f"{case.kind} {name_of(dtype)}"
                try:
                    error = check_case(kernels, case, dtype, device, widths)
                except UsageError as refusal:
                    found.setdefault(kind, str(refusal))
                    continue
                worst = found.get(kind, 0.0)
                found[kind] = max(worst, error) if isinstance(worst, float) else error
    return found


def check_case(kernels: Kernels, case: Case, dtype: torch.dtype, device: torch.device, widths: Iterable[int]) -> float:
    """The relative error of 64 rows; see ``check``."""
    scales = torch.bfloat16 if dtype == torch.float32 else dtype
    weight = case.weight(scales, device)
    bias = torch.randn(case.n_out, device=device)
    layer = product(kernels, weight, bias, device)
    x = torch.randn(MOST_ROWS, case.k, device=device).to(dtype)
    expected = x.double() @ dequantize(weight).double().T + bias
    where = f"{kernels}, {case.kind} [{case.n_out}, {case.k}], {name_of(dtype)}"
    widest = layer(x)
    error = relative_error(widest, expected)
    if not error <= BOUNDS[dtype]:  # NaN too
        raise VerificationError(f"{where}: relative error {error:.2e} against fp64")
    for n in widths:
        first = random.randrange(MOST_ROWS + 1 - n)
        if not torch.equal(layer(x[first : first + n]), widest[first : first + n]):
            raise VerificationError(f"{where}: rows change between n = {n} and n = {MOST_ROWS}")
    return error


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN, so that an entry that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
