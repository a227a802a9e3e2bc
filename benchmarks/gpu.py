"""What waits for a GPU, in one command: trains the larger default family and measures acceptance on it.

    python -m quantspec.benchmarks.gpu --data gsm8k_train.jsonl:0.5 --data other.jsonl:0.5 --work work --out family

Without CUDA it says so and does nothing. Every stage goes on where an interrupted call stopped. Prints a line of JSON;
``GPU_DUE.md`` lists what to do with the result.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

PARTS = {
    "--model": "target-w4",
    "--draft-model": "intermediate-w4",
    "--head": "eagle-target",
    "--cascade-head": "eagle-intermediate",
}
"""Members of a family, by the option that names them to the acceptance benchmark."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", action="append", required=True, help="PATH[:WEIGHT[:HELD_OUT]], may be repeated")
    parser.add_argument("--work", type=Path, required=True, help="states, logs and rollouts")
    parser.add_argument("--out", type=Path, required=True, help="the finished family")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: no CUDA device. hint: the family of --preset cpu trains without one", file=sys.stderr)
        return 4
    command = ["train", "family", "--preset", "gpu", "--device", "cuda", "--processes", "1", "--compile"]
    for source in options.data:
        command += ["--data", source]
    command += ["--work", str(options.work), "--out", str(options.out)]
    # A process of its own, so that its memory is gone before anything is measured.
    trained = subprocess.run(
        [sys.executable, "-m", "quantspec.cli.main", *command], check=True, stdout=subprocess.PIPE, text=True
    )
    acceptance = [sys.executable, "-m", "quantspec.benchmarks.acceptance", "--prompts", options.data[0].split(":")[0]]
    for option, member in PARTS.items():
        acceptance += [option, str(options.out / member)]
    measured = subprocess.run(acceptance, check=True, stdout=subprocess.PIPE, text=True)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(command),
        "stages": json.loads(trained.stdout.splitlines()[-1]),
        "acceptance": json.loads(measured.stdout),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
