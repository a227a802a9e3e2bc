"""The parts of ``benchmarks.gpu``, one a process: ``python -m quantspec.benchmarks.gpu_parts NAME RESULT.json``.

What a part has found is written after each of its steps, so that one that is stopped or fails leaves what it had.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from quantspec.benchmarks import cuda_kernels, gpu_checks, gpu_figures
from quantspec.benchmarks.cuda_timing import current_device
from quantspec.benchmarks.gpu_found import Found, line_of
from quantspec.errors import QuantSpecError


def environment(found: Found) -> None:
    """What is there, and what the device's memory and its matrix units give."""
    packages = ("torch", "triton", "transformers", "bitsandbytes", "gptqmodel", "numpy")
    found.put(
        python=platform.python_version(),
        system=platform.platform(),
        cores=len(os.sched_getaffinity(0)),
        packages={name: _version(name) for name in packages},
        cuda=torch.version.cuda,
        nvcc=_first_line(["nvcc", "--version"], "release"),
        driver=_first_line(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]),
        commit=_first_line(["git", "rev-parse", "HEAD"]),
    )
    found.put(**cuda_kernels.look_at_device(current_device()).json())


def build(found: Found) -> None:
    """Compile the CUDA kernels for every format of weights that other parts use, side by side."""
    from quantspec.benchmarks.gpu_kernels import CASES
    from quantspec.kernels.cuda import build, driver, library
    from quantspec.kernels.cuda.packed import format_for

    torch.cuda.init()
    device = current_device()
    target = build.Target(torch.cuda.get_device_capability(device), driver.shared_memory(device.index))
    weights = (replace(case, n_out=1).weight(torch.bfloat16, current_device()) for case in CASES)
    formats = list(dict.fromkeys(map(format_for, weights)))

    def seconds(tile: Any) -> float:
        began = perf_counter()
        build.build(target, tile)
        return round(perf_counter() - began, 1)

    with ThreadPoolExecutor(len(formats)) as threads:
        found.put(seconds=dict(zip(map(str, formats), threads.map(seconds, formats), strict=True)))
    library.load(device.index)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(words: list[str], containing: str = "") -> str | None:
    """Of what a program says, if it is there."""
    try:
        ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((line.strip() for line in ran.stdout.splitlines() if containing in line), None)


PARTS: dict[str, Callable[[Found], None]] = {
    "environment": environment,
    "build": build,
    "products": gpu_checks.products,
    "triton": gpu_checks.triton,
    "kernels": gpu_figures.kernels,
    "decode-8b": gpu_figures.decode("8b"),
    "decode-8b-triton": gpu_figures.decode("8b", "triton"),
    "decode-8b-head4": gpu_figures.decode("8b", head_bits=4),
    "decode-70b": gpu_figures.decode("70b"),
    "decode-1b": gpu_figures.decode("1b"),
    "generate": gpu_checks.generate,
    "tests": gpu_checks.tests,
    "prove": gpu_checks.prove,
    "probe": gpu_checks.probe,
    "launch": gpu_figures.launch,
    "paper-8b": gpu_figures.paper("8b", ("w4", "bf16", "w8")),
    "paper-70b": gpu_figures.paper("70b", ("w4",)),
    "sanitizer": gpu_checks.sanitizer,
    "sanitized": gpu_checks.sanitized,
}


def main() -> int:
    name, path = sys.argv[1:]
    found = Found(Path(path))
    try:
        PARTS[name](found)
    except Exception as error:
        traceback.print_exc()
        found.say_why(line_of(error))
        return error.exit_code if isinstance(error, QuantSpecError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
