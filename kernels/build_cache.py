"""Compiled kernels on disk: made once, whole or not at all, by one process at a time, and checked before they are used.

A file's name holds a fingerprint of all that makes it, so it is never stale; a file beside it holds the sha256 of its
bytes, checked before it is opened: a truncated library would kill Python.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantspec.errors import Unavailable

TIMEOUT_S = 120.0
LOCK, WORK = "lock", ".build-"


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/quantspec/kernels``, or the same below ``~/.cache``."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantspec" / "kernels"
    except RuntimeError:
        raise Unavailable("no home folder to keep the compiled kernels in", hint="set XDG_CACHE_HOME") from None


def built(
    name: str, compile: Callable[[Path], Any], *, cache: Path, what: str, tell: Callable[[], None]
) -> tuple[Path, str | None]:
    """The file ``name`` of the cache, made by ``compile(path)`` if it is not there, and a line if not all went well.

    ``what`` it holds is for that line; ``tell`` is called before ``compile``, since that takes seconds. Raises
    ``Unavailable``, as ``compile`` may, with one line.
    """
    if _whole(cache / name):
        return cache / name, None
    folder, notice = _writable(cache, what)
    path = folder / name
    if not _whole(path):
        with _locked(folder):
            if not _whole(path):  # another process may have built it while this one waited
                tell()
                _make(compile, path)
    return path, notice


def fingerprint(made_of: object, sources: Iterable[Path]) -> str:
    """24 hexadecimal digits that stand for ``made_of`` (by its repr: flags, compiler, machine) and the files' bytes."""
    digest = hashlib.sha256(repr(made_of).encode())
    for source in sorted(sources):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:24]


def run(command: Sequence[str], name: str | None = None) -> str:
    """Run a compiler (errors call it ``name``) and return what it printed. Neither a timeout nor Ctrl-C leaves a part
    of it running."""
    name = name or Path(command[0]).name
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


def _make(compile: Callable[[Path], Any], path: Path) -> None:
    """Compile into ``path``, whole or not at all: a file is renamed into place once its bytes are on the disk."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=WORK) as folder:
            made, digest = Path(folder, "made"), Path(folder, "sha256")
            compile(made)
            digest.write_text(_sha256(made))
            for file, place in ((made, path), (digest, _sidecar(path))):
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


def _writable(cache: Path, what: str) -> tuple[Path, str | None]:
    """``cache``, made if need be; or a folder of this process alone, removed at its end, and a line that says so."""
    global _private
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / LOCK, "ab"):
            return cache, None
    except OSError as error:
        _private = _private or tempfile.TemporaryDirectory(prefix="quantspec-kernels-")
        return Path(_private.name), f"cannot write {cache} ({_reason(error)}): every run compiles {what} anew"


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
