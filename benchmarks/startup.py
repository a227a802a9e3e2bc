"""How long ``quantspec --help`` takes, beside an empty Python: 0.3 s is the budget on two idle CPU cores.

    python -m quantspec.benchmarks.startup

Prints one line of JSON: medians over fresh processes, in seconds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

RUNS = 9


def seconds(*arguments: str) -> float:
    """The median wall time of a fresh interpreter with these arguments."""
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 3)


def main() -> None:
    report = {
        "help_seconds": seconds("-m", "quantspec.cli.main", "--help"),
        "generate_help_seconds": seconds("-m", "quantspec.cli.main", "generate", "--help"),
        "python_seconds": seconds("-c", "pass"),
        "runs": RUNS,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
