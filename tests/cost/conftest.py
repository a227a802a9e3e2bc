"""The default family's parts by their folders, and prompts that are soon written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantspec.calibrate.cost.config import TuneConfig
from quantspec.models.resolve import FAMILY

TARGET, DRAFT, HEAD, INNER = (
    str(FAMILY / name) for name in ("target-w4", "intermediate-w4", "eagle-target", "eagle-intermediate")
)
ANY = 1e9  # as much noise as there may be: tests run on busy machines
QUESTIONS = (
    "A farmer has 12 hens and each lays 2 eggs a day. How many eggs are there after a week?",
    "Tom reads 15 pages a day. How long does he need for a book of 300 pages?",
    "A shop sells 48 cups in April and half as many in May. How many cups are that in all?",
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": each}) + "\n" for each in QUESTIONS))
    return path


def quick(prompts: Path, **more: object) -> TuneConfig:
    """A tune that takes seconds."""
    settings = {"model": TARGET, "prompts": prompts, "contexts": (64,), "max_new_tokens": 16, "seconds": 1.0}
    return TuneConfig(**{**settings, "max_noise": ANY, "threads": 1, **more})  # type: ignore[arg-type]
