"""What the parts of ``benchmarks.gpu`` have in common: where they leave what they find."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantspec.errors import QuantSpecError, VerificationError
from quantspec.models.atomic import write_bytes

if TYPE_CHECKING:
    from quantspec.models.load_triton import Kernels

KERNELS: tuple[Kernels, ...] = ("cuda", "triton")


class Found:
    """What a part has found so far, and the file that holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.result: dict[str, Any] = {}

    def put(self, **values: Any) -> None:
        self.result |= values
        self._write({})

    def say_why(self, why: str) -> None:
        self._write({"why": why})

    def _write(self, more: dict[str, str]) -> None:
        write_bytes(self._path, json.dumps({"result": self.result, **more}).encode())


def attempt(found: Found, name: str, measure: Callable[[], Any]) -> list[str]:
    """Put what ``measure`` returns under the name; or why not, as the only entry of the list."""
    try:
        found.put(**{name: measure()})
    except Exception as error:
        traceback.print_exc()
        said = line_of(error)
        found.put(**{name: {"error": said}})
        return [f"{name}: {said}"]
    return []


def line_of(error: Exception) -> str:
    """What went wrong, with the kind of an error that nobody foresaw."""
    return str(error) if isinstance(error, QuantSpecError) else f"{type(error).__name__}: {error}"[:400]


def refuse(wrong: list[str]) -> None:
    if wrong:
        raise VerificationError("; ".join(wrong))


def say(line: str) -> None:
    print(line, flush=True)
