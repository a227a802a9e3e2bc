"""The larger default family: train it on a GPU with the preset for one, and measure acceptance on it.

    python -m quantspec.benchmarks.gpu_family --work work --out results --data one.jsonl:0.5 --data other.jsonl:0.5

Training goes on where an interrupted call stopped. Leaves the family in ``--out``/family and its figures in
``--out``/family.json; ``GPU_DUE.md`` lists what to do with them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PARTS = {
    "--model": "target-w4",
    "--draft-model": "intermediate-w4",
    "--head": "eagle-target",
    "--cascade-head": "eagle-intermediate",
}
"""Members of a family, by the option that names them to the acceptance benchmark."""


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the finished family, and its figures")
    parser.add_argument("--data", action="append", required=True, help="PATH[:WEIGHT[:HELD_OUT]], may be repeated")
    parser.add_argument("--work", type=Path, required=True, help="of the training: states, logs and rollouts")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: no CUDA device. hint: the family of --preset cpu trains without one", file=sys.stderr)
        return 4
    options.out.mkdir(parents=True, exist_ok=True)
    found = family(options.data, options.work, options.out / "family")
    (options.out / "family.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
