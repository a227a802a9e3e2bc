"""Fixtures of the tests of kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


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
