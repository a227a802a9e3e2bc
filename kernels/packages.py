"""Which foreign packages are here, and new enough. Imports none of them."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def lacking(package: str, oldest: tuple[int, ...]) -> str | None:
    """Why an installed package does not serve: missing, or older than ``oldest``; None if it does."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return f"the package {package} is not installed"
    if tuple(map(int, re.findall(r"\d+", found)[: len(oldest)])) >= oldest:
        return None
    return f"{package} {'.'.join(map(str, oldest))} or newer is needed, and {found} is installed"
