"""NVRTC as a compiler command, for machines without nvcc: ``python nvrtc.py LIBRARY [OPTION ...] SOURCE -o CUBIN``.

A program of its own that imports nothing of quantspec, so that a compiler that crashes or hangs harms nobody.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

Program = ctypes.c_void_p


def compile_cubin(nvrtc: ctypes.CDLL, source: Path, options: list[str]) -> tuple[bytes, str]:
    """Machine code of ``source``, whose headers lie beside it, and the log. Raises ``ValueError`` with the log."""
    program = Program()
    text, name = source.read_bytes(), source.name.encode()
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None)
    if status == 0:
        arguments = [option.encode() for option in [*options, f"--include-path={source.parent}"]]
        status = nvrtc.nvrtcCompileProgram(program, len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
    log = _fetch(nvrtc, "ProgramLog", program).rstrip(b"\0").decode(errors="replace").strip() if program else ""
    if status != 0:
        raise ValueError(log or f"error: NVRTC says {status}")
    return _fetch(nvrtc, "CUBIN", program), log


def _fetch(nvrtc: ctypes.CDLL, what: str, program: Program) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, data)
    return data.raw


def main() -> int:
    library, *arguments = sys.argv[1:]
    for builtins in Path(library).parent.glob("libnvrtc-builtins.so.*"):  # else it would look for them in the system
        ctypes.CDLL(str(builtins))
    nvrtc = ctypes.CDLL(library)
    if arguments == ["--version"]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        sys.stdout.write(f"NVRTC {major.value}.{minor.value}\n")
        return 0
    *options, source, _, out = arguments
    try:
        cubin, log = compile_cubin(nvrtc, Path(source), options)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(log)
    Path(out).write_bytes(cubin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
