"""Words for the machine and the kernels: the same where nothing changed, others where costs may have."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantspec.engine import here
from quantspec.engine.config import EngineConfig
from quantspec.errors import UsageError

MODEL = SimpleNamespace(backend="cpu-int8", row_invariant=True)


def test_the_machine_with_its_threads() -> None:
    found = here.machine(EngineConfig(threads=3))
    assert found["threads"] == 3
    assert found["processor"]
    assert here.machine(EngineConfig()) == here.machine(EngineConfig())
    assert json.loads(json.dumps(found)) == found  # a profile keeps it


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_the_machine_is_the_cpu_that_runs_instead() -> None:
    assert here.machine(EngineConfig(device="cuda")) == here.machine(EngineConfig())
    with pytest.raises(UsageError, match="device must be cpu or cuda"):
        here.machine(EngineConfig(device="abacus"))


def test_kernels_are_others_when_a_source_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig()
    now = here.kernels_of(MODEL, config)  # type: ignore[arg-type]
    assert now == here.kernels_of(MODEL, config)  # type: ignore[arg-type]
    assert now.startswith("cpu-int8, exact, kv auto, torch ")
    assert here.kernels_of(MODEL, EngineConfig(kv_cache_dtype="int8")) != now  # type: ignore[arg-type]
    (tmp_path / "inner").mkdir()
    source = tmp_path / "inner" / "linear.cpp"
    source.write_text("one")
    monkeypatch.setattr(here.kernels, "__path__", [str(tmp_path)])
    one = here.kernels_of(MODEL, config)  # type: ignore[arg-type]
    source.write_text("two")
    two = here.kernels_of(MODEL, config)  # type: ignore[arg-type]
    (tmp_path / "notes.md").write_text("of no account")
    assert len({now, one, two}) == 3
    assert here.kernels_of(MODEL, config) == two  # type: ignore[arg-type]
