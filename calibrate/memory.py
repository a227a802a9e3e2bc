"""How much memory this process may still take, as the system limits it, and how much it took."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path


def available_bytes() -> int | None:
    """The least of what the machine has free, what the process's control group allows it, and its own limits (ulimit);
    None where the system tells nothing."""
    return min(_limits(), default=None)


def peak_bytes() -> int:
    """The most resident memory that this process had."""
    # getrusage may tell of the parent that this process was forked from.
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def give_back_the_rest() -> None:
    """Return what glibc keeps of smaller freed blocks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _limits() -> Iterator[int]:
    held = _status("VmSize")
    for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(which)
        if soft != resource.RLIM_INFINITY:
            yield max(0, soft - held)
    free = _lines(Path("/proc/meminfo")).get("MemAvailable")
    if free:
        yield _kilobytes(free)
    group = Path("/sys/fs/cgroup")
    try:
        yield max(0, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or one without a limit ("max")
        return


def _status(key: str) -> int:
    return _kilobytes(_lines(Path("/proc/self/status")).get(key, "0 kB"))


def _lines(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {key: value for key, _, value in (line.partition(":") for line in lines)}


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024
