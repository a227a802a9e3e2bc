"""The processor that figures are measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd")


def processor() -> str:
    """Its name, as well as the system knows it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_flags() -> list[str]:
    """Those of its instruction sets that kernels care about."""
    found = _cpuinfo("flags", "Features").split()
    return [flag for flag in _FLAGS if flag in found]


def _cpuinfo(*keys: str) -> str:
    """The first value of one of ``keys`` in Linux's /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() in keys), "")
