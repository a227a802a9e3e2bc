"""The Triton kernels compile for NVIDIA GPUs, and multiply by ``mma.sync`` on all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compile.py")
    done = subprocess.run(
        [sys.executable, script], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 24
    # One family of instructions for all: wgmma, which takes 64 rows, would add up in another order.
    assert lines[0].startswith("_attend_chunk 80 mma")
    assert lines[1].startswith("_attend_chunk 90 mma")
    assert all(line.split()[-2] == "0" for line in lines), "registers are spilled"
    # What one block may have on sm_86 and sm_89, the least of all.
    assert all(int(line.split()[-1]) <= 99 * 1024 for line in lines)
