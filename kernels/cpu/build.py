"""The native CPU library, compiled at first use with the system's compiler and kept in a cache.

A library's name holds the sha256 of all that makes it: sources, flags, compiler, CPU level.
"""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantspec.errors import Unavailable
from quantspec.kernels.build_cache import built, default_cache, fingerprint, run

__all__ = ["Built", "build", "cpu_level", "default_cache", "find_compiler"]

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread"),
    "-ffp-contract=off",  # a fused multiply-add is written out, or every compiler would round in its own way
    *("-fno-rtti", "-fvisibility=hidden"),
)
_AVX2 = ("-mtune=native", "-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
LEVELS = {"avx512vnni": (*_AVX512, "-mavx512vnni"), "avx512": _AVX512, "avx2": _AVX2, "portable": ()}
"""Compiler flags of each CPU level, best first. Never ``-march=native``: the flags say what a cached file needs."""


@dataclass(frozen=True)
class Built:
    """A compiled library: its file, the CPU level it is for, and one line for the user where not all went well."""

    path: Path
    level: str
    notice: str | None = None


def cpu_level(cpuinfo: str | None = None) -> str:
    """The best of ``LEVELS`` that this processor runs, by the text of /proc/cpuinfo ("portable" if there is none)."""
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            cpuinfo = ""
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    has = {"-m" + flag.replace("_", "") for flag in line.partition(":")[2].split()} | {"-mtune=native"}
    return next(level for level, flags in LEVELS.items() if has.issuperset(flags))


def build(
    level: str | None = None,
    *,
    compiler: str | None = None,
    cache: Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Built:
    """Compile the library, unless the cache has it, and return where it is.

    ``level``: one of ``LEVELS`` (None: ``cpu_level()``). ``compiler``: a command, as in $CXX (None: the first of
    ``COMPILERS``). ``tell`` gets one line before the compiler runs, since that takes seconds. Raises ``Unavailable``
    with one line: no compiler, or one that fails or takes too long.
    """
    level = level or cpu_level()
    command = find_compiler(compiler)
    flags = (*FLAGS, *LEVELS[level])

    def announce() -> None:
        if tell:
            tell(f"compiling the CPU kernels with {Path(command[0]).name}: once, under 20 seconds")

    path, notice = built(
        f"quantspec_cpu-{level}-{_fingerprint(command, flags)}.so",
        lambda out: run([*command, *flags, str(SOURCES / "quantspec_cpu.cpp"), "-o", str(out)]),
        cache=cache or default_cache(),
        what="the CPU kernels",
        tell=announce,
    )
    return Built(path, level, notice)


def find_compiler(wanted: str | None = None) -> list[str]:
    """The command, split, that will compile. Raises ``Unavailable`` if there is none."""
    for candidate in [wanted] if wanted else COMPILERS:
        program, *arguments = shlex.split(candidate)
        if found := shutil.which(program):
            return [found, *arguments]
    raise Unavailable(f"no C++ compiler found ({wanted or ', '.join(COMPILERS)})", hint="install g++ or clang++")


def _fingerprint(command: Sequence[str], flags: Sequence[str]) -> str:
    version = run([*command, "--version"]).splitlines()[:1]
    made_of = (command, version, flags, sys.platform, platform.machine())
    return fingerprint(made_of, (source for source in SOURCES.iterdir() if source.suffix in (".h", ".cpp")))
