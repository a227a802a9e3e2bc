"""quantspec: quantize a language model to 4 bits, then generate fast by speculation.

``load`` gives a model with its drafter; ``SamplingParams`` says what is asked of the text; every error that a user may
meet derives from ``QuantSpecError``. Importing this package does not import torch: ``load`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantspec.errors import (
    Interrupted,
    ModelError,
    QuantSpecError,
    ResourceError,
    UsageError,
    VerificationError,
)
from quantspec.types import SamplingParams

if TYPE_CHECKING:
    from quantspec.engine.llm import LLM, load

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Interrupted",
    "ModelError",
    "QuantSpecError",
    "ResourceError",
    "SamplingParams",
    "UsageError",
    "VerificationError",
    "__version__",
    "load",
]

_LAZY = {"LLM": "quantspec.engine.llm", "load": "quantspec.engine.llm"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'quantspec' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
