"""What waits for a GPU, in one command: checks and times the CUDA kernels, then trains and measures a default family.

    python -m quantspec.benchmarks.gpu --out results
    python -m quantspec.benchmarks.gpu --out results --data gsm8k_train.jsonl:0.5 --data other.jsonl:0.5 --work work

Without ``--data`` it is the kernels alone, a few minutes. Without CUDA it says so and does nothing. Training goes on
where an interrupted call stopped. Leaves ``gpu.json`` and ``gpu.md`` in ``--out``, and the family in ``--out``/family;
``GPU_DUE.md`` lists what to do with them.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantspec.errors import QuantSpecError

PARTS = {
    "--model": "target-w4",
    "--draft-model": "intermediate-w4",
    "--head": "eagle-target",
    "--cascade-head": "eagle-intermediate",
}
"""Members of a family, by the option that names them to the acceptance benchmark."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the report, and the finished family")
    parser.add_argument("--data", action="append", default=[], help="PATH[:WEIGHT[:HELD_OUT]], may be repeated")
    parser.add_argument("--work", type=Path, help="of the training: states, logs and rollouts")
    options = parser.parse_args()
    if options.data and not options.work:
        parser.error("--data needs --work")
    import torch

    if not torch.cuda.is_available():
        print("error: no CUDA device. hint: the family of --preset cpu trains without one", file=sys.stderr)
        return 4
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    status = kernels(report, options.out)
    if options.data:
        report["family"] = family(options.data, options.work, options.out / "family")
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return status


def kernels(report: dict[str, Any], out: Path) -> int:
    """Add the kernels' results, or why there are none, to the report; an exit code."""
    from quantspec.benchmarks import gpu_kernels
    from quantspec.kernels.cuda import library

    library.announce(lambda line: print(line, file=sys.stderr))
    try:
        report["kernels"] = gpu_kernels.measure()
    except QuantSpecError as error:
        report["kernels"] = {"error": str(error)}
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    page = f"# {report['device']}, torch {report['torch']}\n\n{gpu_kernels.table(report['kernels'])}\n"
    (out / "gpu.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


def family(data: list[str], work: Path, out: Path) -> dict[str, Any]:
    """Train a family of the larger preset and measure acceptance on it."""
    command = ["train", "family", "--preset", "gpu", "--device", "cuda", "--processes", "1", "--compile"]
    for source in data:
        command += ["--data", source]
    command += ["--work", str(work), "--out", str(out)]
    # A process of its own, so that its memory is gone before anything is measured.
    trained = subprocess.run(
        [sys.executable, "-m", "quantspec.cli.main", *command], check=True, stdout=subprocess.PIPE, text=True
    )
    acceptance = [sys.executable, "-m", "quantspec.benchmarks.acceptance", "--prompts", data[0].split(":")[0]]
    for option, member in PARTS.items():
        acceptance += [option, str(out / member)]
    measured = subprocess.run(acceptance, check=True, stdout=subprocess.PIPE, text=True)
    return {
        "command": " ".join(command),
        "stages": json.loads(trained.stdout.splitlines()[-1]),
        "acceptance": json.loads(measured.stdout),
    }


if __name__ == "__main__":
    sys.exit(main())
