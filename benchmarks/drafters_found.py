"""Which of the drafters that there are for a target a benchmark measures."""

from __future__ import annotations

from collections.abc import Callable

from quantspec.benchmarks.config import DraftersBench
from quantspec.calibrate.cost import found
from quantspec.calibrate.cost.found import PLAIN, Found
from quantspec.errors import UsageError


def find(config: DraftersBench, note: Callable[[str], None]) -> list[Found]:
    """Those that are asked for, plain decoding first. Raises ``UsageError`` for a name that is not among them."""
    drafters = found.find(config.model, config.draft_model, config.head, note)
    known = [one.name for one in drafters]
    unknown = [name for name in config.drafters if name not in known]
    if unknown:
        raise UsageError(f"there is no drafter {unknown[0]!r} here", hint=f"one of {', '.join(known)}")
    return [one for one in drafters if one.name == PLAIN or not config.drafters or one.name in config.drafters]
