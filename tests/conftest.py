"""Loads the helper modules beside this file, so that tests can import them by name under
``--import-mode=importlib``."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels are tested under its interpreter. It must know before anything imports it, whoever comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

HELPERS = ("table_model", "tiny_eagle")


def _load(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec
    assert spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


for helper in HELPERS:
    _load(helper)


@pytest.fixture(autouse=True, scope="session")
def _compiled_kernels() -> None:
    """Compile the native kernels, if need be, before a test counts the lines that it was told."""
    from quantspec.kernels.cpu import library

    library.usable()
