"""The structs of the CPU kernels, as C++ and as ctypes lay them out."""

from __future__ import annotations

import ctypes

import pytest

from quantspec.kernels.cpu import eagle, forward, library
from quantspec.kernels.cpu.packed import LinearStruct

pytestmark = pytest.mark.skipif(library.usable() is not None, reason=str(library.usable()))


def test_sizes_agree() -> None:
    structs = (LinearStruct, forward._LayerStruct, forward.ModelStruct, forward.RowsStruct)
    # A cache and the target of a tap are handed over as three and two 64-bit numbers.
    expected = [*map(ctypes.sizeof, structs), 3 * 8, 2 * 8, ctypes.sizeof(eagle._EagleStruct)]
    sizes = (ctypes.c_int64 * len(expected))()
    library.bind("qs_struct_sizes", None, [ctypes.c_void_p])(sizes)
    assert list(sizes) == expected
