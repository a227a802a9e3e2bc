"""A tune that takes seconds: the default family's target and parts by their folders, and two short prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantspec.calibrate.cost.config import TuneConfig
from quantspec.models.resolve import FAMILY

QUESTIONS = (
    "A farmer has 12 hens and each lays 2 eggs a day. How many eggs are there after a week?",
    "Tom reads 15 pages a day. How long does he need for a book of 300 pages?",
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": each}) + "\n" for each in QUESTIONS))
    return path


@pytest.fixture
def quick(prompts: Path) -> Callable[..., TuneConfig]:
    """As much noise as there may be: tests run on busy machines."""

    def config(**more: object) -> TuneConfig:
        settings: dict[str, object] = {"model": str(FAMILY / "target-w4"), "prompts": prompts, "contexts": (64,)}
        limits = {"max_new_tokens": 16, "seconds": 1.0, "max_noise": 1e9, "threads": 1}
        return TuneConfig(**{**settings, **limits, **more})  # type: ignore[arg-type]

    return config
