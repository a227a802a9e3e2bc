"""Giving memory back to the system between a model's layers."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BLOCK = 2**23


def give_back_freed_blocks() -> None:
    """Let glibc return each freed block of 8 MB or more to the system at once.

    It learns to keep blocks of up to 32 MB for reuse, and holes between them then add up to more than a decoder layer.
    Smaller ones, such as a group's columns, come and go so often that new pages for each would take a third of the
    time.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in other C libraries
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _BLOCK)
            mallopt(_M_TRIM_THRESHOLD, 2 * _BLOCK)
