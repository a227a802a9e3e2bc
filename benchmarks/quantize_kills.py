"""Quantizing killed with SIGKILL at random moments: what is left never loads as complete, and resumes to the same bits.

    python -m quantspec.benchmarks.quantize_kills MODEL_FOLDER --times 20

prints one JSON object. Each time a new output is begun and killed at a moment drawn evenly from the time that a whole
run takes; what stands on disk is tried as a model; the same settings are given again; and all files but the report and
the manifest, which hold times, are compared with those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from quantspec.calibrate.quantize.config import QuantizeConfig
from quantspec.calibrate.quantize.run import run
from quantspec.errors import QuantSpecError
from quantspec.models import atomic
from quantspec.models.load import load_model

_TIMES = ("quantization_report.json", "quantization_report.html", atomic.MANIFEST)


@dataclass(frozen=True)
class Kill:
    """A run killed ``after`` seconds (or ended before: ``killed``), with so many decoder ``layers`` finished.
    ``loaded``: what stood on disk passed for a model; then it must have been the whole one (``sound``). ``equal``: the
    resumed run ended with the same bits."""

    after: float
    killed: bool
    layers: int
    loaded: bool
    sound: bool
    equal: bool


def weights_and_files(folder: Path) -> dict[str, bytes]:
    """All files of a finished output that must not depend on how the run went."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in _TIMES}


def kill_and_resume(config: QuantizeConfig, after: float, whole: dict[str, bytes]) -> Kill:
    """One kill of a run into ``config.out``, and its resumption; ``whole`` are the files of an undisturbed run."""
    partial = config.out.with_name(config.out.name + ".partial")
    killed = _in_child(lambda: run(config), after)
    progress, layers = partial / atomic.PROGRESS, 0
    if progress.is_file():
        layers = len(json.loads(progress.read_text())["layers"])
    standing = [folder for folder in (config.out, partial) if folder.is_dir() and _loads(folder)]
    sound = all(
        (folder / name).read_bytes() == content
        for folder in standing
        for name, content in whole.items()
        if name.endswith((".safetensors", "config.json", "tokenizer.json"))
    )
    _in_child(lambda: run(config), None)
    return Kill(after, killed, layers, bool(standing), sound, weights_and_files(config.out) == whole)


def _in_child(work: Callable[[], object], kill_after: float | None) -> bool:
    """Run ``work`` in a forked child, and kill that. Returns whether it was killed before its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def _loads(folder: Path) -> bool:
    """Whether the folder passes for a model that is whole."""
    try:
        load_model(folder, backend="reference-fast")
    except QuantSpecError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("method", "group_size", "num_samples", "eval_samples", "seq_len"):
        default = getattr(QuantizeConfig, name)
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    given = vars(parser.parse_args())
    model, times, seed = given.pop("model"), given.pop("times"), given.pop("seed")
    torch.set_num_threads(1)  # a forked child has none but the thread that forked
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        config, started = QuantizeConfig(model, Path(folder) / "whole", **given), time.perf_counter()
        _in_child(lambda: run(config), None)
        seconds = time.perf_counter() - started
        whole = weights_and_files(config.out)
        found = []
        for number in range(times):
            one = replace(config, out=Path(folder) / f"killed-{number}")
            found.append(kill_and_resume(one, draw.uniform(0, seconds), whole))
            print(found[-1], file=sys.stderr)
    good = all(kill.equal and kill.sound for kill in found)
    print(json.dumps({"model": str(model), "seconds": seconds, "good": good, "kills": [asdict(k) for k in found]}))
    sys.exit(0 if good else 5)


if __name__ == "__main__":
    main()
