"""The cost curve v(n) of one matrix product: every backend, alternated in one run, against what the machine can do.

A product of n rows cannot be quicker than its weights can be read, nor than its multiply-adds can be done:
``bound = max(bytes / B, n K N / P)``, B the best read bandwidth measured in the same run, P the rate of the int8
kernel's inner loop out of the first-level cache. Backends that do not compute in int8 are held against bytes / B alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import c_int
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from quantspec.benchmarks.config import BACKENDS, KernelBench
from quantspec.benchmarks.contenders import Contender, Field
from quantspec.calibrate.cost.timing import alternate
from quantspec.errors import Unavailable, UsageError
from quantspec.kernels.cpu import library, probes
from quantspec.models.load import usable_device

Notice = Callable[[str], object]


@dataclass(frozen=True)
class Machine:
    """What it can do: ``bandwidth`` in bytes/s and multiply-adds/s ``tile_macs`` of our inner loop, ``peak_macs`` of
    the bare instruction (None: not known)."""

    bandwidth: float
    tile_macs: float | None = None
    peak_macs: float | None = None
    readings: tuple[probes.Reading, ...] = ()

    def bound(self, nbytes: int, macs: int, mode: str) -> float:
        """Least seconds for reading ``nbytes`` of weights and doing ``macs`` multiply-adds."""
        reading = nbytes / self.bandwidth
        return max(reading, macs / self.tile_macs) if mode == "int8" and self.tile_macs else reading

    def json(self) -> dict[str, Any]:
        return {
            "read_bandwidth_gbps": self.bandwidth / 1e9,
            "tile_gmacs": self.tile_macs and self.tile_macs / 1e9,
            "raw_peak_gmacs": self.peak_macs and self.peak_macs / 1e9,
            "read_bandwidths": [asdict(reading) for reading in self.readings],
        }


def look_at_machine(threads: int, group_size: int = 128) -> Machine:
    """Measure it. Takes three seconds or so."""
    readings = probes.read_bandwidth(threads)
    return Machine(
        readings[0].gbps * 1e9,
        probes.tile_macs(threads, group_size=group_size),
        probes.peak_macs(threads),
        tuple(readings),
    )


def best(one: Machine, other: Machine) -> Machine:
    """The higher of each figure: another process can lower them, nothing can raise them."""
    fastest = max(one, other, key=lambda machine: machine.bandwidth)
    return Machine(
        fastest.bandwidth,
        max(one.tile_macs or 0, other.tile_macs or 0) or None,
        max(one.peak_macs or 0, other.peak_macs or 0) or None,
        fastest.readings,
    )


def set_threads(native: int, torch_threads: int) -> None:
    """Of the native kernels (0: all cores) and of torch."""
    library.bind("qs_set_threads", None, [c_int])(native)
    torch.set_num_threads(torch_threads)


@dataclass(frozen=True)
class Measured:
    """One backend on one weight K x N (``shape``; None for a whole model) of ``nbytes``, with ``macs`` multiply-adds a
    row: the seconds of all its calls, by their number of rows."""

    backend: str
    mode: str
    shape: tuple[int, int] | None
    group_size: int | None
    nbytes: int
    macs: int
    times: Mapping[int, Sequence[float]]

    def rows(self, machine: Machine) -> list[dict[str, Any]]:
        """Figures for every width, from the least time of each; width 1 must be among them."""
        k, n_out = self.shape or (None, None)
        rows = []
        for n in sorted(self.times):
            seconds, bound = min(self.times[n]), machine.bound(self.nbytes, n * self.macs, self.mode)
            rows.append(
                {
                    "backend": self.backend,
                    "mode": self.mode,
                    "K": k,
                    "N": n_out,
                    "group_size": self.group_size,
                    "n": n,
                    "ms": seconds * 1e3,
                    "v": seconds / min(self.times[1]),
                    "gbps": self.nbytes / seconds / 1e9,
                    "bandwidth_fraction": self.nbytes / seconds / machine.bandwidth,
                    "bound_ms": bound * 1e3,
                    "over_bound": seconds / bound,
                    "ms_median": median(self.times[n]) * 1e3,
                    "samples": len(self.times[n]),
                    "weight_bytes": self.nbytes,
                }
            )
        return rows


def measure(field: Field, config: KernelBench, left_out: dict[str, str]) -> list[Measured]:
    """All backends at all widths on one weight, alternated. Those that do not run here go to ``left_out``, unless they
    were asked for by name."""
    entrants: list[Contender] = []
    for backend in config.backends or BACKENDS:
        try:
            entrants.append(field.contender(backend))
        except Unavailable as error:
            if config.backends:
                raise
            left_out[backend] = str(error)
    widths = sorted({1, *config.widths})
    calls = {(one.backend, n): one.product(n) for one in entrants for n in widths}
    times = alternate(calls, config.rounds, config.seed)

    def measured(one: Contender) -> Measured:
        spent, (k, n_out) = {n: times[one.backend, n] for n in widths}, field.shape
        return Measured(one.backend, one.mode, field.shape, one.group_size, one.nbytes, k * n_out, spent)

    return [measured(one) for one in entrants]


def run(config: KernelBench, notice: Notice = lambda line: None, *, nbytes: int | None = None) -> dict[str, Any]:
    """Measure; returns what ``--json`` prints. ``nbytes``: of all copies of a matrix (None: enough to defeat caches).

    Raises ``UsageError`` for a device that is not there, ``Unavailable`` for a backend asked for by name that does not
    run here, and where there is no compiler.
    """
    check_device(config.device)
    if config.device == "cuda":
        from quantspec.benchmarks import cuda_kernels

        return cuda_kernels.run(config, notice)
    threads = config.threads or probes.cores()
    set_threads(threads, threads)
    notice(f"measuring what {threads} threads of this machine can do")
    machine = look_at_machine(threads, config.group_size)
    measured: list[Measured] = []
    left_out: dict[str, str] = {}
    for shape in config.shapes:
        notice(f"measuring {shape[0]}x{shape[1]}")
        measured += measure(Field(shape, config.group_size, config.seed, nbytes), config, left_out)
    machine = best(machine, look_at_machine(threads, config.group_size))
    return {
        **machine.json(),
        "threads": threads,
        "group_size": config.group_size,
        "rounds": config.rounds,
        "left_out": left_out,
        "rows": [row for one in measured for row in one.rows(machine)],
    }


def check_device(device: str) -> None:
    """Raises ``UsageError`` if nothing can be measured there: the figures of a CPU in its place would be no answer."""
    if usable_device(device)[0] != device:
        raise UsageError("there is no CUDA device that torch can use", hint="leave --device away to measure the CPU")
