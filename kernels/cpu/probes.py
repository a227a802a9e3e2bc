"""What this machine can do at most: its read bandwidth, its rate of byte multiply-adds, and that of our inner loop.

    python -m quantspec.kernels.cpu.probes

prints one JSON object. The bench holds the kernels against these figures; all are the best of several rounds, since
other processes can only lower them.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_double, c_int, c_int64, c_void_p
from dataclasses import asdict, dataclass
from pathlib import Path

from quantspec.kernels.cpu.library import bind

PREFETCH = (0, 512, 1024, 2048, 4096)
"""Bytes ahead of the reading; 0 leaves it to the processor."""
PAGE_BYTES = (4096, 2 * 2**20)
LEAST_BYTES = 256 * 2**20
TILE_ROWS = (4, 5, 6, 8, 10, 16, 20)
"""Numbers of rows whose inputs stay in the first-level cache beside the weights."""
DEFAULT_L3 = 32 * 2**20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Reading:
    """Bandwidth of one way to read memory: ``threads`` pinned, spinning threads, ``prefetch`` bytes ahead."""

    page_bytes: int
    prefetch: int
    threads: int
    gbps: float


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def l3_bytes() -> int:
    """Size of the last-level cache as Linux tells it, or 32 MB."""
    sizes = [_size(path.read_text()) for path in _CACHES.glob("index*/size")]
    return max(sizes, default=DEFAULT_L3)


def _size(text: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = text.strip()[:-1], text.strip()[-1:]
    return int(number) * units[unit] if number.isdigit() and unit in units else DEFAULT_L3


def page_sizes() -> tuple[int, ...]:
    """Page sizes that a program can ask for here."""
    try:
        huge = hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in _HUGE_PAGES.read_text()
    except OSError:
        huge = False
    return PAGE_BYTES if huge else PAGE_BYTES[:1]


def read_bandwidth(threads: int | None = None, *, nbytes: int | None = None, rounds: int = 3) -> list[Reading]:
    """Every way to read memory, best first: {page size} x {prefetch} x {1, ``threads``} (None: all cores).

    Each reads ``nbytes``, by default four times the last-level cache and at least 256 MB. Takes two seconds or so.
    """
    nbytes = nbytes or max(LEAST_BYTES, 4 * l3_bytes())
    counts = sorted({1, threads or cores()})
    probe = bind("qs_read_bandwidth", c_double, [c_void_p, c_int64, c_int, c_int, c_int])
    found = []
    for page_bytes in page_sizes():
        with _buffer(nbytes, page_bytes) as address:
            best = {(prefetch, count): 0.0 for prefetch in PREFETCH for count in counts}
            for _ in range(rounds):
                for prefetch, count in best:
                    gbps = probe(address, nbytes, count, prefetch, 32)
                    best[prefetch, count] = max(best[prefetch, count], gbps)
            found += [Reading(page_bytes, prefetch, count, gbps) for (prefetch, count), gbps in best.items()]
    return sorted(found, key=lambda reading: -reading.gbps)


@contextmanager
def _buffer(nbytes: int, page_bytes: int) -> Iterator[int]:
    """Address of ``nbytes`` that lie in pages of that size, written once: untouched memory is not there yet."""
    huge = PAGE_BYTES[-1]
    memory = mmap.mmap(-1, nbytes + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones get small pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE if page_bytes == huge else mmap.MADV_NOHUGEPAGE)
    view = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(view)
    start += -start % huge
    ctypes.memset(start, 1, nbytes)
    try:
        yield start
    finally:
        del view  # or the mapping could not be closed
        memory.close()


def peak_macs(threads: int | None = None, *, rounds: int = 5) -> float | None:
    """Byte multiply-adds per second of ``threads`` cores together (None: all), of the integer dot instruction alone
    (maddubs under AVX2, dpbusd under VNNI). None where the kernels have no such instruction."""
    probe = bind("qs_peak_macs", c_double, [c_int, c_int])
    return max(probe(threads or cores(), 20) for _ in range(rounds)) or None


def tile_macs(threads: int | None = None, *, group_size: int = 128, rounds: int = 3) -> float:
    """Multiply-adds per second of ``threads`` cores together (None: all) of the int8 kernel's own inner loop on 4-bit
    weights, everything it touches in the first-level cache; of the number of rows that suits it best."""
    import torch

    from quantspec.kernels.cpu.packed import pack
    from quantspec.numerics.affine import QuantizedWeight
    from quantspec.numerics.scheme import Scheme

    generator = torch.Generator().manual_seed(0)
    k = max(1, 1024 // group_size) * group_size  # a panel of half the first-level cache
    codes = torch.randint(-8, 8, (32, k), generator=generator, dtype=torch.int8)
    scale = torch.full((32, k // group_size), 0.01, dtype=torch.bfloat16)
    weight = pack(QuantizedWeight(codes, scale, None, Scheme(4, group_size)))
    probe = bind("qs_tile_rate", c_double, [c_void_p, c_int, c_int, c_int])
    address = ctypes.addressof(weight.struct)
    return max(probe(address, n, threads or cores(), 20) for _ in range(rounds) for n in TILE_ROWS)


def main() -> None:
    readings, peak = read_bandwidth(), peak_macs()
    report = {
        "read_bandwidth_gbps": readings[0].gbps,
        "raw_peak_gmacs": peak and peak / 1e9,
        "tile_gmacs": tile_macs() / 1e9,
        "threads": cores(),
        "readings": [asdict(reading) for reading in readings],
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
