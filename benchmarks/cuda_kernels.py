"""``bench kernels --device cuda``: the cost curve v(n) of one product by every backend, in CUDA graphs, alternated.

A graph multiplies with each copy of the weight once, and its time is divided by their number: launches as they are in a
decoder's graph, and no weight in the second-level cache. The bound is the longer of reading the weights at the best
bandwidth measured in the same run and of doing the multiply-adds at the rate of torch's bf16 product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantspec.benchmarks import cuda_timing
from quantspec.benchmarks.config import CUDA_BACKENDS, KernelBench
from quantspec.benchmarks.cuda_contenders import CudaContender, CudaField, reason
from quantspec.benchmarks.kernels import Machine, Measured, Notice
from quantspec.errors import QuantSpecError


@dataclass(frozen=True)
class Accelerator(Machine):
    """A device, whose multiply-adds bound every product alike. ``readers``: GB/s by each way of reading."""

    readers: tuple[dict[str, Any], ...] = ()
    copy_gbps: float | None = None
    name: str = ""

    def bound(self, nbytes: int, macs: int, mode: str) -> float:
        assert self.peak_macs is not None
        return max(nbytes / self.bandwidth, macs / self.peak_macs)

    def json(self) -> dict[str, Any]:
        return {
            **super().json(),
            "read_bandwidths": list(self.readers),
            "copy_bandwidth_gbps": self.copy_gbps,
            "device": "cuda",
            "device_name": self.name,
            "torch": torch.__version__,
        }


def look_at_device(device: torch.device) -> Accelerator:
    """Measure it. Takes a second or so."""
    readers = cuda_timing.read_bandwidths(device)
    return Accelerator(
        readers[0]["gbps"] * 1e9,
        peak_macs=cuda_timing.dense_rate(device),
        readers=tuple(readers),
        copy_gbps=cuda_timing.copy_bandwidth(device),
        name=torch.cuda.get_device_name(device),
    )


def entrants(
    field: CudaField, backends: Sequence[str], left_out: dict[str, str], *, asked: bool
) -> list[CudaContender]:
    """Those that can take part; the others go to ``left_out`` with their reason, unless they were ``asked`` for."""
    found = []
    for backend in backends:
        try:
            found.append(field.contender(backend))
        except QuantSpecError as error:
            if asked:
                raise
            left_out[backend] = reason(error)
        except Exception as error:
            if backend in ("cuda", "triton"):  # ours: not to be passed over
                raise
            left_out[backend] = reason(error)
    return found


def measure(
    field: CudaField, entered: Sequence[CudaContender], widths: Sequence[int], rounds: int, seed: int,
    left_out: dict[str, str],
) -> list[Measured]:  # fmt: skip
    """Seconds of one product by backend and width."""
    k, n_out = field.shape
    graphs: dict[tuple[str, int], Callable[[], object]] = {}
    for one in entered:
        for n in widths:
            x = torch.randn(n, k, device=field.device).to(field.dtype)
            try:
                graphs[one.backend, n] = cuda_timing.graph([partial(layer, x) for layer in one.layers])
            except RuntimeError as error:  # a foreign kernel that no graph can hold
                if one.backend in ("cuda", "triton"):
                    raise
                left_out[one.backend] = reason(error)
                graphs = {key: call for key, call in graphs.items() if key[0] != one.backend}
                break
    times = cuda_timing.alternate(graphs, rounds, seed=seed)

    def measured(one: CudaContender) -> Measured:
        spent = {n: [time / len(one.layers) for time in times[one.backend, n]] for n in widths}
        return Measured(one.backend, one.mode, field.shape, one.group_size, one.nbytes, k * n_out, spent)

    return [measured(one) for one in entered if (one.backend, widths[0]) in times]


def run(
    config: KernelBench, notice: Notice = lambda line: None, *, bits: int = 4, dtype: torch.dtype = torch.bfloat16,
    machine: Accelerator | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure; returns what ``--json`` prints. ``machine``: what an earlier call found the device to do.

    Raises ``UsageError`` without a CUDA device and for a weight that a backend asked for by name cannot hold,
    ``Unavailable`` for one that does not run here.
    """
    device = cuda_timing.current_device()
    widths = sorted({1, *config.widths})
    if machine is None:
        notice("measuring what this device can do")
        machine = look_at_device(device)
    measured: list[Measured] = []
    left_out: dict[str, str] = {}
    for shape in config.shapes:
        notice(f"measuring {shape[0]}x{shape[1]}")
        field = CudaField(shape, config.group_size, device, bits=bits, dtype=dtype)
        entered = entrants(field, config.backends or CUDA_BACKENDS, left_out, asked=bool(config.backends))
        measured += measure(field, entered, widths, config.rounds, config.seed, left_out)
        torch.cuda.empty_cache()
    return {
        **machine.json(),
        "threads": None,
        "group_size": config.group_size,
        "bits": bits,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": config.rounds,
        "left_out": left_out,
        "rows": [row for one in measured for row in one.rows(machine)],
    }
