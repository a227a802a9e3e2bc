"""What a generation cost and where its tokens came from: counted per sequence, in tokens and wall seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from quantspec.core.session import Session
from quantspec.core.verify import NO_NEEDS, Verifier
from quantspec.types import Needs, Proposal, Verdict


@dataclass(frozen=True, slots=True)
class Lap:
    """Wall seconds of one step: all of it, what came before the verifier's call (the drafter), and that call."""

    total: float
    draft: float
    verify: float


class TimedVerifier(Verifier):
    """A verifier that remembers when its last call began and ended."""

    began = ended = 0.0

    def verify(self, sessions: Sequence[Session], drafts: Sequence[Proposal], needs: Needs = NO_NEEDS) -> list[Verdict]:
        self.began = perf_counter()
        verdicts = super().verify(sessions, drafts, needs)
        self.ended = perf_counter()
        return verdicts

    def lap(self, started: float) -> Lap:
        """The step that started then and has just ended."""
        return Lap(perf_counter() - started, self.began - started, self.ended - self.began)


@dataclass(slots=True, kw_only=True)
class Stats:
    """Figures of one sequence. Times are wall seconds of the steps it took part in: in a batch, sequences share them.

    ``backend`` is the target's, ``kv_cache_bytes`` the most that its keys and values took. ``target_forwards`` leaves
    out the prompt's own forward, which gives the first token; all others come from these. ``stages`` counts tokens by
    the level that proposed them, ``"target"`` for the target's own draws; they sum to ``new_tokens``.
    ``draft_prefill_seconds`` is the first real ``propose``, in which a drafter reads the prompt.
    """

    method: str
    backend: str
    exactness: str
    kv_cache_dtype: str
    prompt_tokens: int
    new_tokens: int = 0
    drafted_tokens: int = 0
    target_forwards: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    time_to_first_token: float = 0.0
    draft_prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    kv_cache_bytes: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens per target forward, the target's own token counted and the prompt's forward not; 0 without one."""
        return (self.new_tokens - 1) / self.target_forwards if self.target_forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        """All new tokens over all seconds, prefills of target and drafters included."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the seconds after it, without the drafters' prefill."""
        seconds = self.seconds - self.time_to_first_token - self.draft_prefill_seconds
        return (self.new_tokens - 1) / seconds if self.target_forwards and seconds > 0 else 0.0

    @property
    def overhead_seconds(self) -> float:
        """Seconds outside the verifier and the drafter."""
        return self.seconds - self.draft_seconds - self.verify_seconds

    def count(self, verdict: Verdict, lap: Lap) -> None:
        """Add one step."""
        first, drafted = self.new_tokens == 0, len(verdict.y) - 1
        self.seconds += lap.total
        self.draft_seconds += lap.draft
        self.verify_seconds += lap.verify
        if first:
            self.time_to_first_token = self.seconds
        else:
            self.target_forwards += 1
        if self.target_forwards == 1:
            self.draft_prefill_seconds = lap.draft
        self.drafted_tokens += drafted
        self.new_tokens += len(verdict.emitted)
        self.stages.update(verdict.stages)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: names, counts, rates, then seconds."""
        return {
            "method": self.method,
            "backend": self.backend,
            "exactness": self.exactness,
            "kv_cache_dtype": self.kv_cache_dtype,
            "kv_cache_bytes": self.kv_cache_bytes,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "target_forwards": self.target_forwards,
            "drafted_tokens": self.drafted_tokens,
            "stages": dict(self.stages),
            "acceptance_length": self.acceptance_length,
            "tokens_per_second": self.tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "seconds": self.seconds,
            "time_to_first_token": self.time_to_first_token,
            "draft_prefill_seconds": self.draft_prefill_seconds,
            "draft_seconds": self.draft_seconds,
            "verify_seconds": self.verify_seconds,
            "overhead_seconds": self.overhead_seconds,
        }
