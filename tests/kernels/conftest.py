"""The Triton kernels are tested on the GPU where there is one, and else under Triton's interpreter on the CPU, which
must be chosen before triton is imported."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Tensors are made where the kernels run, and random ones are the same in every run."""
    if DEVICE == "cpu":
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield torch.device(DEVICE)


def _dot(builder: Any, a: Any, b: Any, c: Any, *options: object) -> Any:
    """``a @ b + c`` with every row of a treated alike, as by an ``mma`` instruction. The interpreter's own product is
    one of BLAS, where a row's bits change with its place, and takes the bits of bf16 for integers."""
    product = np.matmul(_fp32(a)[:, None, :], _fp32(b)[None])[:, 0]
    return type(c)(product + c.data, c.dtype.scalar)


def _fp32(operand: Any) -> NDArray[np.float32]:
    if operand.dtype.scalar.is_bf16():
        return (operand.data.astype(np.uint32) << 16).view(np.float32)
    return operand.data.astype(np.float32)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """``launches(module, kernel, ...)`` counts from now on how often these Triton kernels are launched."""

    def watch(module: ModuleType, *kernels: str) -> Counter[str]:
        counts: Counter[str] = Counter()
        for name in kernels:
            monkeypatch.setattr(module, name, _Watched(getattr(module, name), name, counts))
        return counts

    return watch


class _Watched:
    def __init__(self, kernel: Any, name: str, counts: Counter[str]) -> None:
        self.kernel, self.name, self.counts = kernel, name, counts

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.counts[self.name] += 1
        return self.kernel[grid]
