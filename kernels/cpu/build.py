"""The native CPU library, compiled at first use with the system's compiler and kept in a cache.

A library's name holds the sha256 of all that makes it (sources, flags, compiler, CPU level), so it is never stale; a
file beside it holds the sha256 of its bytes, checked before it is opened: a truncated library would kill Python.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantspec.errors import Unavailable

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("g++", "clang++", "c++")
TIMEOUT_S = 120.0
LOCK, WORK = "lock", ".build-"
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


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/quantspec/kernels``, or the same below ``~/.cache``."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantspec" / "kernels"
    except RuntimeError:
        raise Unavailable("no home folder to keep the compiled kernels in", hint="set XDG_CACHE_HOME") from None


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
    with one line: no compiler, or one that fails or takes over ``TIMEOUT_S``.
    """
    level = level or cpu_level()
    command = find_compiler(compiler)
    flags = (*FLAGS, *LEVELS[level])
    name = f"quantspec_cpu-{level}-{_fingerprint(command, flags)[:24]}.so"
    cache = cache or default_cache()
    if _whole(cache / name):
        return Built(cache / name, level)
    folder, notice = _writable(cache)
    path = folder / name
    if not _whole(path):
        with _locked(folder):
            if not _whole(path):  # another process may have built it while this one waited
                if tell:
                    tell(f"compiling the CPU kernels with {Path(command[0]).name}: once, under 20 seconds")
                _compile([*command, *flags], path)
    return Built(path, level, notice)


def find_compiler(wanted: str | None = None) -> list[str]:
    """The command, split, that will compile. Raises ``Unavailable`` if there is none."""
    for candidate in [wanted] if wanted else COMPILERS:
        program, *arguments = shlex.split(candidate)
        if found := shutil.which(program):
            return [found, *arguments]
    raise Unavailable(f"no C++ compiler found ({wanted or ', '.join(COMPILERS)})", hint="install g++ or clang++")


def _fingerprint(command: Sequence[str], flags: Sequence[str]) -> str:
    version = _run([*command, "--version"]).splitlines()[:1]
    digest = hashlib.sha256(repr((command, version, flags, sys.platform, platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()


def _run(command: Sequence[str]) -> str:
    """Run a compiler and return what it printed. Neither a timeout nor Ctrl-C leaves a part of it running."""
    name = Path(command[0]).name
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        process = subprocess.Popen(command, **pipes, text=True, errors="replace", start_new_session=True)
    except OSError as error:
        raise Unavailable(f"{name} cannot be run: {_reason(error)}") from error
    with process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unavailable(f"{name} took over {TIMEOUT_S:.0f} s") from error
            raise
    if process.returncode != 0:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it said nothing")
        raise Unavailable(f"{name} failed: {said[:300]}")
    return output


def _compile(command: Sequence[str], path: Path) -> None:
    """Compile into ``path``, whole or not at all: a file is renamed into place once its bytes are on the disk."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=WORK) as folder:
            library, digest = Path(folder, "library"), Path(folder, "sha256")
            _run([*command, str(SOURCES / "quantspec_cpu.cpp"), "-o", str(library)])
            digest.write_text(_sha256(library))
            for file, place in ((library, path), (digest, _sidecar(path))):
                _fsync(file)
                os.replace(file, place)
            _fsync(path.parent)
    except OSError as error:
        raise Unavailable(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).lower()


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _whole(path: Path) -> bool:
    try:
        return _sidecar(path).read_text(errors="replace") == _sha256(path)
    except OSError:
        return False


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_private: tempfile.TemporaryDirectory[str] | None = None


def _writable(cache: Path) -> tuple[Path, str | None]:
    """``cache``, made if need be; or a folder of this process alone, removed at its end, and a line that says so."""
    global _private
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / LOCK, "ab"):
            return cache, None
    except OSError as error:
        _private = _private or tempfile.TemporaryDirectory(prefix="quantspec-kernels-")
        return Path(_private.name), f"cannot write {cache} ({_reason(error)}): every run compiles the CPU kernels anew"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One compile at a time in ``folder``; others wait, and then find its result."""
    with open(folder / LOCK, "ab") as file:
        end = time.monotonic() + TIMEOUT_S + 10
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for stale in folder.glob(f"{WORK}*"):  # of a process that died
                    shutil.rmtree(stale, ignore_errors=True)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise Unavailable(f"another process holds {file.name}", hint="is it stopped?") from None
                time.sleep(0.05)
            except OSError:
                break  # a file system without locks: two compiles cost time, and the renames keep the result whole
        yield
