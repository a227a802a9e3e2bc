"""The CUDA kernels in this process: loaded once per device through CUDA's driver, which also starts them.

The driver's library is all that is needed at run time. torch brings up the device's primary context, which the kernels
share, and so its memory and its streams.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_uint, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quantspec.errors import Unavailable
from quantspec.kernels.cuda.build import Target, build

THREADS = 256
WIDTHS = (8, 16, 32, 48, 64)
"""Most rows of each kernel."""
_TYPES = {torch.float16: "half", torch.bfloat16: "bfloat"}
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_OPT_IN_SHARED = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN

_lock = threading.Lock()
_outcomes: dict[int, Library | Unavailable] = {}
_announce: Callable[[str], None] | None = None


class Library:
    """The kernels on one device. ``multiprocessors`` is how many blocks run side by side, one on each."""

    def __init__(self, cubin: Path, shared_memory: int, multiprocessors: int) -> None:
        self.multiprocessors = multiprocessors
        self._shared_memory = shared_memory
        self._module = c_void_p()
        hint = "a driver that is older than the compiler cannot read its kernels"
        _check(
            _driver().cuModuleLoadData(byref(self._module), cubin.read_bytes()), "cannot load the CUDA kernels", hint
        )
        # All at once: nothing may be loaded while a graph is captured.
        self._functions = {name: self._function(name) for name in KERNELS}

    def launch(self, name: str, blocks: int, params: ctypes.Structure, stream: int) -> None:
        """Start a kernel on a stream of the current device, which may be capturing a graph."""
        arguments = (c_void_p * 1)(ctypes.addressof(params))  # copied before the call returns
        size, handle = (blocks, 1, 1, THREADS, 1, 1), c_void_p(stream)
        status = _driver().cuLaunchKernel(self._functions[name], *size, self._shared_memory, handle, arguments, None)
        _check(status, f"cannot start {name}")

    def _function(self, name: str) -> c_void_p:
        function, limit = c_void_p(), c_int(self._shared_memory)
        _check(_driver().cuModuleGetFunction(byref(function), self._module, name.encode()), f"no kernel {name}")
        _check(_driver().cuFuncSetAttribute(function, c_int(_MAX_DYNAMIC_SHARED), limit), f"cannot use {name}")
        return function


def kernel_name(bits: int, dtype: torch.dtype, n: int) -> str:
    """The narrowest kernel for codes of 4 or 8 ``bits``, and ``n`` rows of float16 or bfloat16."""
    return f"qs_w{bits}_{_TYPES[dtype]}_n{next(width for width in WIDTHS if n <= width)}"


KERNELS = tuple(kernel_name(bits, dtype, width) for bits in (4, 8) for dtype in _TYPES for width in WIDTHS)


def load(device: int, compiler: str | None = None) -> Library:
    """The kernels for a CUDA device, compiled if need be (see ``build.build``, also for ``compiler``).

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
    target = Target(torch.cuda.get_device_capability(device), _shared_memory(device))
    built = build(target, compiler=compiler, tell=_announce)
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the primary context current in this thread
        count = torch.cuda.get_device_properties(device).multi_processor_count
        return Library(built.path, target.shared_memory, count)


def _shared_memory(device: int) -> int:
    torch.cuda.init()
    handle, size = c_int(), c_int()
    # torch counts the devices that CUDA_VISIBLE_DEVICES leaves, and so does the driver.
    _check(_driver().cuDeviceGet(byref(handle), c_int(device)), f"no CUDA device {device}")
    _check(_driver().cuDeviceGetAttribute(byref(size), c_int(_OPT_IN_SHARED), handle), f"cannot ask device {device}")
    return size.value


@cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"CUDA's driver cannot be loaded: {error}") from error
    handles: list[Any] = [c_void_p] * 3
    driver.cuLaunchKernel.argtypes = [c_void_p, *[c_uint] * 7, *handles]
    return driver


def _check(status: int, failed: str, hint: str | None = None) -> None:
    if status:
        text = c_char_p()
        _driver().cuGetErrorString(c_int(status), byref(text))
        said = text.value.decode(errors="replace") if text.value else f"error {status}"
        raise Unavailable(f"{failed}: {said}", hint=hint)
