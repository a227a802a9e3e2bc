"""Which weights a model has, in a line: what drafters remember of the target that they were trained for."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from quantspec.models.atomic import MANIFEST, sha256
from quantspec.models.gguf.reader import is_gguf, parts_of
from quantspec.models.tensors import checkpoint_files


def fingerprint(folder: Path) -> str:
    """Sum over a model's weight files; sums of files that the folder's manifest has are taken from there. Raises
    ``ModelError``: there are none."""
    try:
        known = {name: entry["sha256"] for name, entry in json.loads((folder / MANIFEST).read_text())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = {}
    files = parts_of(folder) if is_gguf(folder) else checkpoint_files(folder)
    sums = [known.get(path.name) or _sum(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


@cache
def _sum(path: Path, size: int, modified: int) -> str:
    """Of a file that has this size and time; large ones take seconds."""
    return sha256(path)
