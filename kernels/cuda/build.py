"""The CUDA kernels, compiled at first use for the device at hand and kept in a cache, by nvcc or else by NVRTC.

A cubin's name is a hash of all that makes it: sources, flags, compiler. The sources include nothing of the CUDA
toolkit, so the compiler alone is enough; torch's CUDA builds bring NVRTC along.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantspec.errors import Unavailable
from quantspec.kernels.build_cache import built, default_cache, fingerprint, run
from quantspec.kernels.cuda.tile_format import TileFormat

SOURCES = Path(__file__).parent / "src"
KERNELS, PROBE = SOURCES / "quantspec_cuda.cu", SOURCES / "probe.cu"
NVRTC = Path(__file__).parent / "nvrtc.py"
FLAGS = ("-std=c++17",)
LEAST = (8, 0)
"""Compute capability of the oldest device: asynchronous copies and bf16 came with it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of device: its compute capability, and the bytes of shared memory that one block may have."""

    capability: tuple[int, int]
    shared_memory: int

    @property
    def arch(self) -> str:
        """The name of its machine code. 9.0's own instructions (sm_90a) are there for it alone."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if self.capability == (9, 0) else ''}"


@dataclass(frozen=True, slots=True)
class Built:
    """Compiled kernels: their file, and one line for the user where not all went well."""

    path: Path
    notice: str | None = None


def build(
    target: Target,
    tile: TileFormat,
    *,
    compiler: str | None = None,
    cache: Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Built:
    """Compile the kernels for weights of one format, unless the cache has them, and return where they are.

    ``compiler``: nvcc's command, as in $NVCC (None: see ``find_compiler``). ``tell`` gets one line before the compiler
    runs, since that takes seconds. Raises ``Unavailable`` with one line: a device that is too old, no compiler, or one
    that fails or takes too long.
    """
    if target.capability < LEAST:
        found, least = (".".join(map(str, pair)) for pair in (target.capability, LEAST))
        raise Unavailable(f"the CUDA kernels need compute capability {least}, not {found}")
    return _compiled(f"cuda-{tile}-{target.arch}", KERNELS, options(target, tile), f"for {tile}", compiler, cache, tell)


def build_probe(target: Target, compiler: str | None = None, cache: Path | None = None) -> Built:
    """The same for the kernels of ``probe``, which Hopper alone has. Raises ``Unavailable``."""
    if target.arch != "sm_90a":
        raise Unavailable(f"wgmma is there on compute capability 9.0 alone, not on {target.arch}")
    return _compiled("cuda-probe", PROBE, [*FLAGS, f"-arch={target.arch}"], "of the probe", compiler, cache, None)


def options(target: Target, tile: TileFormat, more: Sequence[str] = ()) -> list[str]:
    """The compiler's options for a target and a format, as nvcc and NVRTC both take them."""
    defines = {
        "MEMORY": target.shared_memory, "BITS": tile.bits, "GROUP": tile.group, "ZEROS": int(tile.zeros),
        "SCALE_BYTES": tile.scale_bytes,
    }  # fmt: skip
    return [*more, *FLAGS, f"-arch={target.arch}", *(f"-DQS_{name}={value}" for name, value in defines.items())]


def _compiled(
    name: str, source: Path, options: Sequence[str], which: str, compiler: str | None, cache: Path | None,
    tell: Callable[[str], None] | None,
) -> Built:  # fmt: skip
    command = find_compiler(compiler)
    program = "NVRTC" if str(NVRTC) in command else Path(command[0]).name
    flags = [*options] if program == "NVRTC" else ["-cubin", *options]

    def announce() -> None:
        if tell:
            tell(f"compiling the CUDA kernels {which} with {program}: once, under 30 seconds")

    path, notice = built(
        f"{_fingerprint(command, flags, program)}.cubin",
        lambda out: run([*command, *flags, str(source), "-o", str(out)], program),
        cache=(cache or default_cache()) / name,  # a folder compiles one thing at a time, and formats go side by side
        what="the CUDA kernels",
        tell=announce,
    )
    return Built(path, notice)


def find_compiler(wanted: str | None = None) -> list[str]:
    """The command, split, that will compile: ``wanted``, nvcc of the PATH or of a Python package, or NVRTC of one.

    Raises ``Unavailable`` if there is none.
    """
    if wanted:
        program, *arguments = shlex.split(wanted)
        if found := shutil.which(program):
            return [found, *arguments]
        raise Unavailable(f"no CUDA compiler found ({wanted})", hint="name nvcc, or leave the choice to quantspec")
    if found := shutil.which("nvcc"):
        return [found]
    for toolkit in toolkits():
        if (toolkit / "bin" / "nvcc").is_file() and (toolkit / "nvvm" / "bin" / "cicc").is_file():
            return [str(toolkit / "bin" / "nvcc")]
    for toolkit in toolkits():
        for library in sorted(toolkit.glob("lib/libnvrtc.so.*")):
            return [sys.executable, str(NVRTC), str(library)]
    raise Unavailable("no CUDA compiler found (nvcc, NVRTC)", hint="pip install nvidia-cuda-nvrtc")


def toolkits() -> Iterator[Path]:
    """Folders of the CUDA toolkit's parts as Python packages bring them: ``nvidia/cu13``, or ``nvidia/cuda_nvrtc``."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(place).glob("cu*"), reverse=True)


def _fingerprint(command: Sequence[str], flags: Sequence[str], name: str) -> str:
    version = run([*command, "--version"], name)
    return fingerprint((command, version, flags), (s for s in SOURCES.iterdir() if s.suffix in (".h", ".cu")))
