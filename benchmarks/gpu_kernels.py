"""The CUDA kernels on a GPU: are they right, are rows the same at every width, and how fast are they?

Everything is checked on fresh random data against fp64, with outputs poisoned beforehand; then timed in CUDA graphs
that go round enough copies of each weight to leave none in the second-level cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantspec.errors import VerificationError
from quantspec.kernels.cuda.linear import CudaLinear, Workspace
from quantspec.kernels.cuda.packed import pack
from quantspec.numerics.affine import QuantizedWeight, dequantize
from quantspec.numerics.scheme import Scheme

CHECKED = [(256, 128), (300, 384), (4096, 4096), (6144, 4096), (4096, 14336), (1000, 8192)]
"""Shapes ``[N, K]``: less than a tile for each multiprocessor, ragged rows, many blocks to a row block."""
TIMED = {
    "8b qkv": (6144, 4096, 4),
    "8b o": (4096, 4096, 4),
    "8b gate_up": (28672, 4096, 4),
    "8b down": (4096, 14336, 4),
    "8b head": (128256, 4096, 8),
    "8192 square": (8192, 8192, 4),
    "70b gate_up": (57344, 8192, 4),
    "70b down": (8192, 28672, 4),
}
"""``(N, K, bits)`` of matrices of Llama 3.1."""
ROWS = (1, 2, 4, 8, 16, 32, 48, 64)
ROTATED = 240 << 20
"""Bytes of weights that one graph goes through, at least: four times the second-level cache of an H200."""
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Relative error against fp64, the rounding of the output included."""


@dataclass(frozen=True)
class Timed:
    """One product: median and least seconds, ``read_fraction`` of the measured read bandwidth, ``v`` over one row, and
    how many times torch's dense product of the same type takes."""

    matrix: str
    dtype: str
    n: int
    seconds: float
    least: float
    gbps: float
    read_fraction: float
    v: float
    tflops: float
    dense_ratio: float


def measure(rounds: int = 15) -> dict[str, Any]:
    """Build, check, time. Raises ``Unavailable`` if they do not run here, ``VerificationError`` if they are wrong."""
    device = torch.device("cuda", torch.cuda.current_device())
    errors = check(device)
    workspace, read = Workspace(device), read_bandwidth(device)
    times = [
        timed
        for name, (n_out, k, bits) in TIMED.items()
        for timed in time_matrix(name, n_out, k, bits, workspace, device, read, rounds)
    ]
    return {"errors": errors, "read_gbps": read / 1e9, "products": [asdict(timed) for timed in times]}


def random_weight(n_out: int, k: int, bits: int, dtype: torch.dtype, device: torch.device) -> QuantizedWeight:
    """Codes and scales at random: group 128, every code as likely as any other."""
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n_out, k), dtype=torch.int8, device=device)
    scale = (torch.rand(n_out, k // 128, device=device) + 0.5).to(dtype) / 64
    return QuantizedWeight(codes, scale, None, Scheme(bits, 128, True, _name(dtype)))


def check(device: torch.device) -> dict[str, float]:
    """The largest relative error of each kind, having compared rows at n = 1..64 with the same rows among 64.

    Raises ``VerificationError`` where one is too large, or rows differ.
    """
    worst: dict[str, float] = {}
    workspace = Workspace(device)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    try:
        for bits in (4, 8):
            for dtype in BOUNDS:
                for n_out, k in CHECKED:
                    error = _check_matrix(n_out, k, bits, dtype, workspace, device)
                    kind = f"w{bits} {_name(dtype)}"
                    worst[kind] = max(worst.get(kind, 0.0), error)
    finally:
        torch.use_deterministic_algorithms(False)
    return worst


def _check_matrix(
    n_out: int, k: int, bits: int, dtype: torch.dtype, workspace: Workspace, device: torch.device
) -> float:
    weight = random_weight(n_out, k, bits, dtype, device)
    bias = torch.randn(n_out, device=device)
    layer = CudaLinear(pack(weight), workspace, bias)
    x = torch.randn(64, k, device=device).to(dtype)
    expected = x.double() @ dequantize(weight).double().T + bias
    where = f"{bits}-bit weight [{n_out}, {k}], {dtype}"
    widest = layer(x)
    error = ((widest.double() - expected).norm() / expected.norm()).item()
    if not error <= BOUNDS[dtype]:  # NaN too
        raise VerificationError(f"{where}: relative error {error:.2e} against fp64")
    for n in range(1, 65):
        first = random.randrange(65 - n)
        if not torch.equal(layer(x[first : first + n]), widest[first : first + n]):
            raise VerificationError(f"{where}: rows change between n = {n} and n = 64")
    return error


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s at which torch reads a GiB to sum it up: the best of 20."""
    data = torch.ones(1 << 28, device=device)
    return data.nbytes / min(_times({"sum": lambda: data.sum()}, 1, 20)["sum"])


def time_matrix(
    name: str, n_out: int, k: int, bits: int, workspace: Workspace, device: torch.device, read: float, rounds: int
) -> list[Timed]:
    """All ``ROWS`` in half and bfloat, alternated with torch's dense product."""
    timed = []
    for dtype in BOUNDS:
        weight = random_weight(n_out, k, bits, dtype, device)
        packed, plain = pack(weight), dequantize(weight).to(dtype)
        copies = [replace(packed, tiles=packed.tiles.clone()) for _ in range(-(-ROTATED // packed.nbytes))]
        layers = [CudaLinear(copy, workspace) for copy in copies]
        dense = [plain.clone() for _ in range(-(-ROTATED // plain.nbytes))]
        inputs = {n: torch.randn(n, k, device=device).to(dtype) for n in ROWS}
        graphs = {("packed", n): _graph([partial(layer, x) for layer in layers]) for n, x in inputs.items()}
        graphs |= {("dense", n): _graph([partial(linear, x, plain) for plain in dense]) for n, x in inputs.items()}
        times = _times(graphs, rounds, 3)
        one = median(times["packed", 1])
        for n in ROWS:
            each = [time / len(layers) for time in times["packed", n]]
            seconds, rate = median(each), packed.nbytes / median(each)
            timed.append(
                Timed(
                    matrix=name,
                    dtype=_name(dtype),
                    n=n,
                    seconds=seconds,
                    least=min(each),
                    gbps=rate / 1e9,
                    read_fraction=rate / read,
                    v=median(times["packed", n]) / one,
                    tflops=2e-12 * n * n_out * k / seconds,
                    dense_ratio=median(times["dense", n]) / len(dense) / seconds,
                )
            )
    return timed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _graph(calls: list[Callable[[], Tensor]]) -> Callable[[], object]:
    """One graph of all the calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # so that nothing is loaded while the graph is captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _times(calls: Mapping[Any, Callable[[], object]], rounds: int, repeats: int) -> dict[Any, list[float]]:
    """Seconds of each call on the device, by events; every round in a new order, after one call untimed."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    order = list(calls)
    for _ in range(rounds):
        random.shuffle(order)
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


def table(report: Mapping[str, Any]) -> str:
    """What ``measure`` returned, as Markdown."""
    lines = [f"Read bandwidth {report['read_gbps']:.0f} GB/s; relative errors {report['errors']}", ""]
    lines += ["| matrix | type | n | us | GB/s | of read | v(n) | TFLOP/s | dense / ours |", "|---|---|" + "---:|" * 7]
    for row in report["products"]:
        timed = Timed(**row)
        lines.append(
            f"| {timed.matrix} | {timed.dtype} | {timed.n} | {timed.seconds * 1e6:.1f} | {timed.gbps:.0f} | "
            f"{timed.read_fraction:.0%} | {timed.v:.2f} | {timed.tflops:.0f} | {timed.dense_ratio:.2f} |"
        )
    return "\n".join(lines)
