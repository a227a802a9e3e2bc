"""Fixtures for all floors. Helpers that tests import from nowhere else live beside this file and are loaded by path, since
pytest runs with ``--import-mode=importlib``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec and spec.loader
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


table = _load("table_model")


@pytest.fixture
def table_model() -> type:
    """The class ``TableModel`` of ``tests/table_model.py``: ``table_model(vocab_size=32, seed=1, ...)`` makes one."""
    return table.TableModel
