"""The native CPU library in this process: loaded once, with typed functions."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantspec.errors import Unavailable
from quantspec.kernels.cpu.build import build

__all__ = [
    "Unavailable", "announce", "bind", "load", "loaded", "no_memory", "notice", "open_library", "set_threads", "usable",
]  # fmt: skip

_lock = threading.Lock()
_outcome: ctypes.CDLL | Unavailable | None = None
_notice: str | None = None
_announce: Callable[[str], None] | None = None


def load(compiler: str | None = None) -> ctypes.CDLL:
    """The library for this processor, compiled if need be (see ``build.build``, also for ``compiler``).

    The first call decides for the whole process, also when it fails: ``Unavailable`` is raised again by later ones.
    """
    global _outcome, _notice
    with _lock:
        if _outcome is None:
            try:
                built = build(compiler=compiler, tell=_announce)
                _outcome, _notice = open_library(built.path), built.notice
            except Unavailable as error:
                _outcome = error
        if isinstance(_outcome, Unavailable):
            raise Unavailable(str(_outcome), hint=_outcome.hint)
        return _outcome


def usable() -> str | None:
    """None where the native kernels run (they are compiled if need be), or the one line that says why not."""
    try:
        load()
    except Unavailable as error:
        return str(error)
    return None


def announce(tell: Callable[[str], None]) -> None:
    """Have ``tell`` called with one line before the compiler runs, if it must run."""
    global _announce
    _announce = tell


def set_threads(count: int) -> None:
    """Let native kernels use that many threads, the caller's own included."""
    bind("qs_set_threads", None, [ctypes.c_int])(count)


def loaded() -> bool:
    """Whether ``load`` has succeeded before: for helpers that are not worth a compile of their own."""
    return isinstance(_outcome, ctypes.CDLL)


def notice() -> str | None:
    """One line for the user, where loading did not go as it should and yet succeeded (the cache cannot be written)."""
    return _notice


def open_library(path: Path) -> ctypes.CDLL:
    """Open a compiled library. Its functions release the GIL while they run."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # a folder mounted noexec, a processor of another kind
        raise Unavailable(f"cannot load the compiled kernels: {error}") from error


def bind(name: str, restype: Any, argtypes: Sequence[Any], library: ctypes.CDLL | None = None) -> Any:
    """The library's function ``name`` with its C types. Raises ``Unavailable``, as ``load`` does."""
    function = getattr(library or load(), name)
    function.restype, function.argtypes = restype, list(argtypes)
    return function


def no_memory(status: int) -> None:
    """The ``restype`` of functions that work in memory of their own: raises ``MemoryError`` if there was none."""
    if status:
        raise MemoryError("no memory for the CPU kernels to work in")
