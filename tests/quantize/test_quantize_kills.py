"""SIGKILL at seeded moments of a run, in the quick form of ``benchmarks.quantize_kills``."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quantspec.benchmarks.quantize_kills import kill_and_resume, weights_and_files
from quantspec.calibrate.quantize.config import QuantizeConfig
from quantspec.calibrate.quantize.run import run
from quantspec.errors import ModelError
from quantspec.models.load import load_model

Configure = Callable[..., QuantizeConfig]


def test_killed_anywhere_it_resumes_to_the_same_bits(configure: Configure, tmp_path: Path) -> None:
    config = configure("whole")
    started = time.perf_counter()
    run(config)
    seconds, whole, draw = time.perf_counter() - started, weights_and_files(config.out), random.Random(0)
    for number in range(5):
        kill = kill_and_resume(replace(config, out=tmp_path / f"killed-{number}"), draw.uniform(0, seconds), whole)
        assert kill.equal, kill
        assert kill.sound, kill


def test_an_unfinished_folder_is_no_model(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the last weight is written and before the run said so: all files are there."""
    from quantspec.calibrate.quantize.work import WorkFolder

    def killed(self: WorkFolder) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(WorkFolder, "complete", killed)
    with pytest.raises(RuntimeError):
        run(configure())
    assert (tmp_path / "out.partial" / "config.json").is_file()
    with pytest.raises(ModelError, match="not finished"):
        load_model(tmp_path / "out.partial")
