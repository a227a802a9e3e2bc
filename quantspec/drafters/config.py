"""Options of the drafters: plain dataclasses, no torch at import."""

from __future__ import annotations

from dataclasses import dataclass

from quantspec.errors import UsageError


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UsageError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupOptions:
    """Prompt lookup: match the longest suffix of ``prompt_lookup_max`` down to ``prompt_lookup_min`` tokens."""

    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2

    def __post_init__(self) -> None:
        _require(self.prompt_lookup_min >= 1, f"prompt_lookup_min must be at least 1, not {self.prompt_lookup_min}")
        _require(
            self.prompt_lookup_max >= self.prompt_lookup_min,
            f"prompt_lookup_max {self.prompt_lookup_max} must not be below prompt_lookup_min {self.prompt_lookup_min}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleOptions:
    """Growth of the dynamic tree. The budget bounds how many of the grown nodes are verified.

    ``top_k`` nodes per level are expanded, each into ``top_k`` children, down to ``depth`` levels (one forward of the
    head each). The defaults suit a small family on a CPU, where a verifier's row is not free; EAGLE-2 has 10 and 7.
    """

    top_k: int = 4
    depth: int = 6

    def __post_init__(self) -> None:
        _require(self.top_k >= 1, f"top_k must be at least 1, not {self.top_k}")
        _require(self.depth >= 1, f"depth must be at least 1, not {self.depth}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeOptions:
    """A cascade hands its chain over once it has ``min_draft`` tokens; surplus tokens are kept for the next round."""

    min_draft: int = 6

    def __post_init__(self) -> None:
        _require(self.min_draft >= 1, f"min_draft must be at least 1, not {self.min_draft}")
