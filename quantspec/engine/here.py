"""Where a profile holds: the machine and the kernels, in words that stay the same from one start to the next."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import quantspec.kernels as kernels
from quantspec.kernels.machine import cores, processor
from quantspec.models.load import usable_device

if TYPE_CHECKING:
    from quantspec.engine.config import EngineConfig
    from quantspec.models.base import CausalModel

_SOURCES = (".py", ".cpp", ".h", ".cu")


def machine(config: EngineConfig) -> Mapping[str, str | int]:
    """The processor or GPU, and how many threads it decodes with. Raises ``UsageError``: no such device."""
    found: dict[str, str | int] = {"processor": processor(), "threads": config.threads or cores()}
    device = torch.device(usable_device(config.device)[0])  # without a GPU the CPU runs, as at load
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "device_bytes": properties.total_memory}
    return found


def kernels_of(model: CausalModel, config: EngineConfig) -> str:
    """What computes the model's forwards: the backend and all that decides what it costs."""
    rows = "exact" if model.row_invariant else "fast"
    parts = [model.backend, rows, f"kv {config.kv_cache_dtype}", f"torch {torch.__version__}"]
    return ", ".join((*parts, f"sources {_sources_digest()}"))


def _sources_digest() -> str:
    """Of the kernels' sources: whatever changes there may change costs."""
    digest, folder = hashlib.sha256(), Path(next(iter(kernels.__path__)))
    for path in sorted(folder.rglob("*")):
        if path.suffix in _SOURCES:
            digest.update(f"\0{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
