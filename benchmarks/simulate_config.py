"""Options of ``quantspec bench simulate``. No torch here: the command line reads them for its help."""

from __future__ import annotations

from dataclasses import dataclass

from quantspec.errors import UsageError

STRATEGIES = ("none", "eagle", "draft", "cascade", "cascade3")
"""Of a packaged machine: plain decoding, a tree of the target's own head, a draft model's chain, and cascades of two
levels (head, intermediate, target) and of three (a smaller intermediate below that)."""


@dataclass(frozen=True)
class SimulateBench:
    """What ``quantspec bench simulate`` predicts."""

    machine: tuple[str, ...] = ("a100",)
    """A packaged machine, or a profile by quantspec tune (may be repeated)."""
    acceptance: str | None = None
    """What is accepted: a packaged pair, or a profile. Default: the machine's own if it is a profile, else llama-3."""
    target: str = "70b"
    """On packaged machines, the target's shape: 1b, 8b, 70b. The next smaller ones draft for it."""
    format: str = "w4a16"
    """On packaged machines, the weights of target and intermediates: w4a16 or bf16. Heads have 16 bits."""
    batch: tuple[int, ...] = (1,)
    """Sequences at a time."""
    context: int = 1024
    """Tokens in each sequence's cache."""
    strategies: tuple[str, ...] = ()
    """Which to predict; empty: all."""

    def __post_init__(self) -> None:
        if not self.batch or not all(1 <= batch <= 128 for batch in self.batch):
            raise UsageError("batch must be from 1 to 128")
        if self.context < 0:
            raise UsageError(f"context must not be below 0, but is {self.context}")
