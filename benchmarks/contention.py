"""The int8 kernel beside other work: another process on the same cores, calls from four threads, a forked child.

    python -m quantspec.benchmarks.contention

prints one JSON object: a row per condition and number of input rows n, for a 4096x4096 weight in groups of 128 (copies
take turns, so that none is found in a cache) on all cores. Conditions take turns in rounds: "idle" has the machine to
itself, "busy" runs beside a process per core that does nothing but count, "threads" are four Python threads at once,
"forked" is a child after ``os.fork`` and "first" its first call, which starts threads of its own. Milliseconds a call:
the median and mean of all, the least, and the median of the quietest round. Ratios are to "idle". Two threads that
share a core get half of it each: beside a busy process, the mean of calls made back to back doubles at best.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import fmean, median
from time import perf_counter
from typing import Any

from quantspec.benchmarks.contenders import Contender, Field, Product
from quantspec.benchmarks.kernels import set_threads
from quantspec.kernels.cpu import probes

SHAPE, GROUP_SIZE, WIDTHS, THREADS = (4096, 4096), 128, (1, 4, 16), 4
LIMIT = 2.0
"""Of the median beside a busy process to the idle one."""
_SPIN = "print(flush=True)\nwhile True: pass"
Rounds = list[list[float]]


def burst(call: Product, seconds: float) -> list[float]:
    """Seconds of each of the calls that fit into ``seconds``, without the first (at least one)."""
    call()
    times: list[float] = []
    end = perf_counter() + seconds
    while not times or perf_counter() < end:
        began = perf_counter()
        call()
        times.append(perf_counter() - began)
    return times


@contextmanager
def busy(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """``count`` processes that compute and never wait, running when this begins."""
    processes = [subprocess.Popen([sys.executable, "-c", _SPIN], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def at_once(calls: Sequence[Product], seconds: float) -> list[float]:
    """The calls of one thread each."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [time for times in threads.map(lambda call: burst(call, seconds), calls) for time in times]


def in_child(run: Callable[[], list[float]]) -> list[float]:
    """What ``run`` returns, when a forked child runs it."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: those of the kernels do not mind
        child = os.fork()
    if child == 0:
        try:
            with os.fdopen(write, "w") as out:
                json.dump(run(), out)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as out:
        text = out.read()
    os.waitpid(child, 0)
    return list(json.loads(text))


def forked(call: Product, seconds: float) -> list[float]:
    """A child's calls, its very first one included."""
    began = perf_counter()
    call()
    return [perf_counter() - began, *burst(call, seconds)]


def measure(contender: Contender, rounds: int, seconds: float) -> dict[tuple[str, int], Rounds]:
    """Seconds of the calls of every round, by condition and width; each burst lasts ``seconds``."""
    calls = {n: [contender.product(n) for _ in range(THREADS)] for n in WIDTHS}
    times = defaultdict(list)
    for number in range(rounds):
        for n, (call, *_) in calls.items():
            times["idle", n].append(burst(call, seconds))
            times["threads", n].append(at_once(calls[n], seconds))
            first, *rest = in_child(lambda call=call: forked(call, seconds))  # type: ignore[misc]
            times["first", n].append([first])
            times["forked", n].append(rest)
        with busy(probes.cores()):
            for n, (call, *_) in calls.items():
                times["busy", n].append(burst(call, seconds))
        print(f"\r{number + 1}/{rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return times


def figures(times: Mapping[tuple[str, int], Rounds]) -> list[dict[str, Any]]:
    """One row per condition and width; "idle" must be among the conditions, at every width."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for (condition, n), bursts in times.items():
        together = [time * 1e3 for burst in bursts for time in burst]
        found[condition, n] = {
            "condition": condition,
            "n": n,
            "ms": median(together),
            "ms_mean": fmean(together),
            "ms_min": min(together),
            "ms_quietest": min(median(burst) for burst in bursts) * 1e3,
            "calls_per_second": (THREADS if condition == "threads" else 1) / fmean(together) * 1e3,
        }
    for (_, n), row in found.items():
        idle = found["idle", n]
        row |= {f"ratio{key[2:]}": row[key] / idle[key] for key in ("ms", "ms_mean", "ms_quietest")}
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.15, help="of each burst of calls")
    options = parser.parse_args()
    set_threads(0, 1)
    rows = figures(measure(Field(SHAPE, GROUP_SIZE, seed=0).contender("cpu-int8"), options.rounds, options.seconds))
    within = all(row["ratio"] <= LIMIT for row in rows if row["condition"] == "busy")
    print(json.dumps({"threads": probes.cores(), "load": os.getloadavg()[0], "within": within, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
