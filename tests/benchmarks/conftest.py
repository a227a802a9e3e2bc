"""What a CUDA device would do for the benchmarks, done here: graphs that run their calls, times by the host's clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import pytest
import torch

from quantspec.benchmarks import cuda_decode, cuda_timing

CPU = torch.device("cpu")


def _graph(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    def replay() -> None:
        for call in calls:
            call()

    replay()
    return replay


def _alternate(
    calls: Mapping[Any, Callable[[], object]], rounds: int, repeats: int = 3, seed: int = 0
) -> dict[Any, list[float]]:
    times = {}
    for key, call in calls.items():
        began = perf_counter()
        call()
        times[key] = [perf_counter() - began]
    return times


@pytest.fixture
def pretended_cuda(monkeypatch: pytest.MonkeyPatch, triton_device: torch.device) -> None:
    """Benchmarks of CUDA run, without meaning of their figures, under Triton's interpreter."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(cuda_timing, "current_device", lambda: CPU)
    monkeypatch.setattr(cuda_timing, "graph", _graph)
    monkeypatch.setattr(cuda_timing, "alternate", _alternate)
    monkeypatch.setattr(cuda_decode, "WARM_UP", 0)
    monkeypatch.setattr(cuda_timing, "ROTATED", 1 << 8)
    monkeypatch.setattr(cuda_timing, "_READ_BYTES", 1 << 17)
    monkeypatch.setattr(cuda_timing, "_SQUARE", 64)
