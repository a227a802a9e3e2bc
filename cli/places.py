"""Where things are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """``$XDG_CACHE_HOME/quantspec``, or the same below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantspec"


def profiles() -> Path:
    """Of what ``quantspec tune`` has measured."""
    return cache() / "profiles"
