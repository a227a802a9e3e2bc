"""How much memory this process may still take, as the system limits it, how much it took, and how to give some back.
No torch here."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """The least of what the machine has free, what the process's control group allows it, and its own limits (ulimit);
    None where the system tells nothing."""
    return min(_limits(), default=None)


def peak_bytes() -> int:
    """The most resident memory that this process had."""
    # getrusage may tell of the parent that this process was forked from.
    return status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def status_bytes(key: str, process: int | str = "self") -> int:
    """A figure of a process's status in Linux's /proc, such as ``VmRSS``; 0 where there is none."""
    return _kilobytes(_lines(Path(f"/proc/{process}/status")).get(key, "0 kB"))


def give_back_the_rest() -> None:
    """Return what glibc keeps of smaller freed blocks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _limits() -> Iterator[int]:
    held = status_bytes("VmSize")
    for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(which)
        if soft != resource.RLIM_INFINITY:
            yield max(0, soft - held)
    free = _lines(Path("/proc/meminfo")).get("MemAvailable")
    if free:
        yield _kilobytes(free)
    try:
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such group, or one without a limit ("max")
        return
    # Files that were read stand to its account, and leave when their room is needed.
    yield max(0, limit - used + _group_files())


def _group_files() -> int:
    try:
        figures = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return int(figures.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0


def _lines(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {key: value for key, _, value in (line.partition(":") for line in lines)}


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024
