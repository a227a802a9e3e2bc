"""The CUDA kernels in this process, on one device: each format's are compiled, loaded and kept when first asked for.

torch brings up the device's primary context, which the kernels share, and so its memory and its streams.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import torch

from quantspec.errors import Unavailable
from quantspec.kernels.cuda import driver
from quantspec.kernels.cuda.build import Target, build
from quantspec.kernels.cuda.tile_format import TileFormat

THREADS = 256
WIDTHS = (8, 16, 32, 48, 64)
"""Most rows of each kernel."""
_TYPES = {torch.float16: "half", torch.bfloat16: "bfloat"}
_PROGRAMMATIC = (9, 0)  # the first that has programmatic dependent launch

_lock = threading.Lock()
_outcomes: dict[int, Library | Unavailable] = {}
_announce: Callable[[str], None] | None = None


class Library:
    """The kernels on one device. ``multiprocessors`` is how many blocks run side by side, one on each.

    ``programmatic``: a kernel begins to copy its weights before the one before it on the stream has ended. On where the
    device can; benchmarks switch it off to compare.
    """

    def __init__(self, target: Target, multiprocessors: int, compiler: str | None = None) -> None:
        self.target, self.multiprocessors = target, multiprocessors
        self.programmatic = target.capability >= _PROGRAMMATIC
        self._compiler = compiler
        self._lock = threading.Lock()
        self._functions: dict[tuple[TileFormat, str], ctypes.c_void_p] = {}

    def prepare(self, tile: TileFormat) -> None:
        """Have a format's kernels ready to be launched, since nothing may be loaded while a graph is captured.

        Raises ``Unavailable``: see ``build.build``, and where the driver cannot load them.
        """
        with self._lock:
            if (tile, KERNELS[0]) not in self._functions:
                built = build(self.target, tile, compiler=self._compiler, tell=_announce)
                module = driver.Module(built.path)
                loaded = {(tile, name): module.function(name, self.target.shared_memory) for name in KERNELS}
                self._functions.update(loaded)

    def launch(self, tile: TileFormat, name: str, blocks: int, params: ctypes.Structure, stream: int) -> None:
        """Start a kernel on a stream of the current device, which may be capturing a graph."""
        function, memory = self._functions[tile, name], self.target.shared_memory
        driver.launch(function, blocks, THREADS, memory, params, stream, programmatic=self.programmatic)


def kernel_name(dtype: torch.dtype, n: int) -> str:
    """The narrowest kernel for ``n`` rows of float16 or bfloat16."""
    return f"qs_{_TYPES[dtype]}_n{next(width for width in WIDTHS if n <= width)}"


KERNELS = tuple(kernel_name(dtype, width) for dtype in _TYPES for width in WIDTHS)


def load(device: int, compiler: str | None = None) -> Library:
    """The kernels for a CUDA device, those for 4 bits in groups of 128 ready (see ``Library.prepare``, and
    ``build.build`` for ``compiler``).

    The first call decides for the whole process, also when it fails: ``Unavailable`` is raised again by later ones.
    """
    with _lock:
        if device not in _outcomes:
            try:
                _outcomes[device] = _load(device, compiler)
            except Unavailable as error:
                _outcomes[device] = error
        outcome = _outcomes[device]
    if isinstance(outcome, Unavailable):
        raise Unavailable(str(outcome), hint=outcome.hint)
    return outcome


def usable(device: int = 0) -> str | None:
    """None where the kernels run (they are compiled if need be), or the one line that says why not."""
    try:
        load(device)
    except Unavailable as error:
        return str(error)
    return None


def announce(tell: Callable[[str], None]) -> None:
    """Have ``tell`` called with one line before the compiler runs, if it must run."""
    global _announce
    _announce = tell


def _load(device: int, compiler: str | None) -> Library:
    if not torch.cuda.is_available():
        raise Unavailable("there is no CUDA device that torch can use")
    torch.cuda.init()
    target = Target(torch.cuda.get_device_capability(device), driver.shared_memory(device))
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the primary context current in this thread
        library = Library(target, torch.cuda.get_device_properties(device).multi_processor_count, compiler)
        library.prepare(TileFormat())
    return library
