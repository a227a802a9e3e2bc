"""Times on a CUDA device: graphs that go round enough copies to find none in a cache, events, alternated order; and the
bandwidth and the rate that they are held against, measured in the same run."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

Key = TypeVar("Key")

ROTATED = 240 << 20
"""Bytes of weights that one graph goes through, at least: four times the second-level cache of an H200."""
_READ_BYTES, _SQUARE = 1 << 30, 8192


def current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def copies_of(nbytes: int) -> int:
    """How many copies of a weight of ``nbytes`` one graph must go through."""
    return -(-ROTATED // nbytes)


def graph(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One CUDA graph of all the calls, as a call, which keeps what they read. The first one runs beforehand, so that
    nothing is compiled or loaded while the graph is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()

    def replay(_alive: object = calls) -> None:
        captured.replay()

    return replay


def alternate(
    calls: Mapping[Key, Callable[[], object]], rounds: int, repeats: int = 3, seed: int = 0
) -> dict[Key, list[float]]:
    """Seconds that each of ``calls`` took on the device, ``repeats`` figures a round: every round goes through all of
    them in a new order, each after one untimed call."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order, shuffle = list(calls), random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for key in order:
            calls[key]()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
            marks[0].record()
            for mark in marks[1:]:
                calls[key]()
                mark.record()
            torch.cuda.synchronize()
            times[key] += [before.elapsed_time(mark) / 1e3 for before, mark in pairwise(marks)]
    return times


def read_bandwidths(device: torch.device) -> list[dict[str, Any]]:
    """GB/s at which a GiB is read to sum it up, by each way of doing so; the fastest first."""
    data = torch.ones(_READ_BYTES // 4, device=device)
    readers: dict[str, Callable[[], object]] = {
        "torch sum of fp32": data.sum,
        "torch sum of fp32 by rows": lambda: data.view(-1, 1 << 14).sum(1),
        "torch maximum of int64": data.view(torch.int64).amax,
    }
    if (read := _triton_reader(data)) is not None:
        readers["triton"] = read
    times = alternate(readers, rounds=7)
    found = [{"reader": name, "gbps": data.nbytes / min(times[name]) / 1e9} for name in readers]
    return sorted(found, key=lambda each: -each["gbps"])


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a copy of a GiB, read and written bytes together."""
    source = torch.ones(_READ_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(alternate({0: lambda: target.copy_(source)}, rounds=7)[0]) / 1e9


def dense_rate(device: torch.device) -> float:
    """Multiply-adds/s of torch's bf16 product of random matrices of 8192 rows and columns. Not of zeros: they run
    faster."""
    a, b = (torch.randn(_SQUARE, _SQUARE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return _SQUARE**3 / min(alternate({0: lambda: linear(a, b)}, rounds=5)[0])


def _triton_reader(data: Tensor) -> Callable[[], object] | None:
    try:
        from quantspec.benchmarks.triton_read import reader
    except ImportError:
        return None
    return reader(data)
