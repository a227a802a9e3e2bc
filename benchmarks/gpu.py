"""All that waits for a GPU, in one call: build, checks of every kernel against fp64, figures; in a number of minutes.

    python -m quantspec.benchmarks.gpu --out results [--minutes 8] [--only NAME,NAME]

Parts run in the order of their importance, each in a process of its own: one that fails, hangs or breaks the device's
context takes nothing along. A part that no longer fits into the minutes is left out, with a line. After each, what has
been found is in ``--out``: ``gpu.json`` (all figures), ``gpu.md`` (the page that ``docs/performance.md`` is made from),
and ``gpu.log`` (what the parts printed). Exit code 5 if a check failed, 1 if another part did.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, BinaryIO

import quantspec
from quantspec.benchmarks import gpu_page
from quantspec.errors import UsageError, VerificationError
from quantspec.models.atomic import write_bytes


@dataclass(frozen=True)
class Part:
    """``least`` and ``most`` seconds: with less time left it is not begun, after more it is stopped."""

    name: str
    least: float
    most: float


PARTS = (
    Part("environment", 5, 40),
    Part("build", 20, 120),
    Part("products", 20, 120),
    Part("kernels", 20, 120),
    Part("decode-8b", 20, 75),
    Part("decode-70b", 30, 90),
    Part("triton", 15, 75),
    Part("prove", 15, 60),
    Part("generate", 25, 90),
    Part("probe", 5, 45),
    Part("launch", 15, 60),
    Part("tests", 40, 180),
    Part("decode-8b-triton", 20, 60),
    Part("decode-8b-head4", 15, 45),
    Part("sanitizer", 40, 150),
    Part("decode-1b", 15, 45),
    Part("paper-8b", 240, 900),
    Part("paper-70b", 300, 900),
)
"""Most important first; what each does: ``gpu_parts``."""
Start = Callable[[str, Path], Sequence[str]]
"""The command of a part, which leaves its result, as JSON, at the path."""


def command(name: str, result: Path) -> list[str]:
    return [sys.executable, "-m", "quantspec.benchmarks.gpu_parts", name, str(result)]


def run(
    out: Path, minutes: float, parts: Sequence[Part] = PARTS, start: Start = command,
    clock: Callable[[], float] = monotonic,
) -> dict[str, Any]:  # fmt: skip
    """The report, which has been written to ``out`` after every part."""
    report: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="minutes"), "command": " ".join(sys.argv)}
    report |= {"minutes": minutes, "parts": {}}
    deadline = clock() + 60 * minutes
    with TemporaryDirectory() as scratch, open(out / "gpu.log", "wb") as log:
        variables = environment(Path(scratch) / "site")
        for part in parts:
            left = deadline - clock()
            if left < part.least:
                found: dict[str, Any] = {"status": "left out", "seconds": 0.0}
                found["why"] = f"{left:.0f} s were left, and it needs {part.least:.0f}"
            else:
                result, began = Path(scratch) / f"{part.name}.json", clock()
                status = _run(start(part.name, result), min(part.most, left), log, part.name, variables)
                found = _found(status, result, min(part.most, left))
                found["seconds"] = round(clock() - began, 1)
            report["parts"][part.name] = found
            print(_line(part.name, found), flush=True)
            _write(report, out)
    return report


def environment(site: Path) -> dict[str, str]:
    """Variables with which quantspec is found where it is not installed, and of its checkout nothing else: a folder
    named ``kernels`` on the path would be taken for the package of that name."""
    site.mkdir()
    (site / "quantspec").symlink_to(Path(quantspec.__file__).resolve().parent, target_is_directory=True)
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path}


def _run(words: Sequence[str], seconds: float, log: BinaryIO, name: str, variables: Mapping[str, str]) -> int | None:
    """A command's exit status, or None: it was stopped, and all that it had started, when its time was over."""
    log.write(f"\n== {name}\n".encode())
    log.flush()
    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=variables)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _found(status: int | None, result: Path, seconds: float) -> dict[str, Any]:
    """What a part has left, also one that came to no good end."""
    try:
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {"result": {}}
    if status is None:
        return found | {"status": "stopped", "why": f"it took more than {seconds:.0f} s"}
    if status:
        return {"why": f"exit status {status}, see gpu.log"} | found | {"status": "failed", "exit_code": status}
    return found | {"status": "done"}


def _line(name: str, found: Mapping[str, Any]) -> str:
    why = f": {found['why']}" if "why" in found else ""
    return f"{name}: {found['status']} in {found['seconds']:.0f} s{why}"


def _write(report: Mapping[str, Any], out: Path) -> None:
    write_bytes(out / "gpu.json", (json.dumps(report, indent=1) + "\n").encode())
    write_bytes(out / "gpu.md", gpu_page.page(report).encode())


def chosen(names: str | None) -> list[Part]:
    """The parts of those names, in their order. Raises ``UsageError`` for one that there is not."""
    known = {part.name: part for part in PARTS}
    asked = names.split(",") if names else list(known)
    if unknown := [name for name in asked if name not in known]:
        raise UsageError(f"there is no part {unknown[0]!r}", hint=f"parts: {', '.join(known)}")
    return [part for name, part in known.items() if name in asked]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the report")
    parser.add_argument("--minutes", type=float, default=8.0, help="to be through in (default: 8)")
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join(part.name for part in PARTS)}")
    options = parser.parse_args()
    try:
        parts = chosen(options.only)
    except UsageError as error:
        print(f"error: {error}. hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    import torch

    if not torch.cuda.is_available():
        print("error: there is no CUDA device that torch can use. hint: quantspec doctor", file=sys.stderr)
        return 4
    options.out.mkdir(parents=True, exist_ok=True)
    report = run(options.out, options.minutes, parts)
    print((options.out / "gpu.md").read_text(encoding="utf-8"))
    failed = [
        found.get("exit_code", 1) for found in report["parts"].values() if found["status"] in ("failed", "stopped")
    ]
    return VerificationError.exit_code if VerificationError.exit_code in failed else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
