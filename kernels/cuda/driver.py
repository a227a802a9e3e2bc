"""CUDA's driver, which loads compiled kernels and starts them. Its library is all that is needed at run time."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int, c_uint, c_void_p
from functools import cache
from pathlib import Path

from quantspec.errors import Unavailable

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_OPT_IN_SHARED = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``, its union of 64 bytes begun by an integer."""

    _fields_ = (("id", c_int), ("pad", c_int), ("value", c_int), ("rest", c_int * 15))


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``: what there is to know about a launch but the kernel and its parameters."""

    _fields_ = (
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared_memory", c_uint), ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("attribute_count", c_uint),
    )  # fmt: skip


class Module:
    """A cubin, loaded into the current context. Raises ``Unavailable`` if the driver does not take it."""

    def __init__(self, cubin: Path) -> None:
        self._handle = c_void_p()
        hint = "a driver that is older than the compiler cannot read its kernels"
        _check(
            library().cuModuleLoadData(byref(self._handle), cubin.read_bytes()), "cannot load the CUDA kernels", hint
        )

    def function(self, name: str, shared_memory: int) -> c_void_p:
        """A kernel whose blocks may have so many bytes of shared memory."""
        function, limit = c_void_p(), c_int(shared_memory)
        _check(library().cuModuleGetFunction(byref(function), self._handle, name.encode()), f"no kernel {name}")
        _check(library().cuFuncSetAttribute(function, c_int(_MAX_DYNAMIC_SHARED), limit), f"cannot use {name}")
        return function


def launch(
    function: c_void_p, blocks: int, threads: int, shared_memory: int, params: ctypes.Structure, stream: int,
    *, programmatic: bool = False,
) -> None:  # fmt: skip
    """Start a kernel on a stream of the current device, which may be capturing a graph.

    ``programmatic``: it may begin before the one before it has ended, and waits for that itself (programmatic dependent
    launch; compute capability 9.0).
    """
    attribute = _Attribute(id=_PROGRAMMATIC, value=1)
    size = (c_uint * 3)(blocks, 1, 1), (c_uint * 3)(threads, 1, 1)
    config = LaunchConfig(*size, shared_memory, stream, ctypes.pointer(attribute), int(programmatic))
    arguments = (c_void_p * 1)(ctypes.addressof(params))  # copied before the call returns
    _check(library().cuLaunchKernelEx(byref(config), function, arguments, None), "cannot start a CUDA kernel")


def shared_memory(device: int) -> int:
    """Bytes that one block may have, on a device as torch counts them: as the driver does, those that
    CUDA_VISIBLE_DEVICES leaves."""
    handle, size = c_int(), c_int()
    _check(library().cuDeviceGet(byref(handle), c_int(device)), f"no CUDA device {device}")
    _check(library().cuDeviceGetAttribute(byref(size), c_int(_OPT_IN_SHARED), handle), f"cannot ask device {device}")
    return size.value


@cache
def library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"CUDA's driver cannot be loaded: {error}") from error


def _check(status: int, failed: str, hint: str | None = None) -> None:
    if status:
        text = c_char_p()
        library().cuGetErrorString(c_int(status), byref(text))
        said = text.value.decode(errors="replace") if text.value else f"error {status}"
        raise Unavailable(f"{failed}: {said}", hint=hint)
