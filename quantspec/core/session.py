"""One sequence under one verifier: its committed tokens, the model's cache of them, and the state of its warp chain.

One rule replaces all special cases: every forward feeds ``tokens[cached:] ++ draft``. A prompt is a long lag with an
empty draft; a cascade's intermediate lags two after full acceptance; a drafter that was off lags by what it missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantspec.core.drafter import View
from quantspec.core.sampling import WarpChain, WarpState
from quantspec.types import Verdict

if TYPE_CHECKING:
    from quantspec.core.noise import Stream
    from quantspec.models.base import Cache


@dataclass(slots=True)
class Session:
    """``Verifier.open`` makes one. Before a step ``0 <= cached <= len(tokens) - 1``: the last token is always fed.

    ``final`` tokens are confirmed by the outermost target and never taken back. ``ratio`` hides the noise from
    drafters. ``finish`` is None while the sequence goes on, else ``"stop"``, ``"length"`` or the trimmer's own reason.
    """

    tokens: list[int]
    cache: Cache
    chain: WarpChain
    stream: Stream
    stop_ids: frozenset[int]
    max_new_tokens: int
    vocab_size: int
    max_nodes: int
    ratio: bool = False
    prompt_length: int = field(init=False)
    final: int = field(init=False)
    state: WarpState = field(init=False)
    finish: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.prompt_length = self.final = len(self.tokens)
        self.state = self.chain.start()

    @property
    def cached(self) -> int:
        """Rows in the model's cache: those of ``tokens[:cached]``."""
        return self.cache.length

    @property
    def lag(self) -> int:
        """Committed tokens that the next forward must feed; at least 1 before a step."""
        return len(self.tokens) - self.cache.length

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """How many more tokens may be committed."""
        return self.max_new_tokens - self.generated

    def view(self) -> View:
        """The session as a drafter may see it."""
        return View(
            tokens=tuple(self.tokens),
            prompt_length=self.prompt_length,
            chain=self.chain,
            state=self.state,
            stream=None if self.ratio else self.stream,
            stop_ids=self.stop_ids,
            remaining=self.remaining,
            vocab_size=self.vocab_size,
            draft_stream=self.stream.domain("draft") if self.ratio else None,
        )

    def commit(self, verdict: Verdict) -> None:
        """Take over what a verdict on this session emitted: the path's rows into the cache, its tokens, the warp
        state."""
        assert self.finish is None, "the sequence is over"
        lag = self.lag
        self.cache.commit([*range(lag), *(lag + node for node in verdict.path)])
        self._append(verdict.emitted)
        self.finish = verdict.finish
        assert self.lag == 1, "a step caches all but the last token"
        assert self.remaining >= 0, "more tokens than were asked for"

    def commit_lag(self, rows: int) -> None:
        """A chunk of the lag, ``rows`` long, went through the model: these rows are cached, no token is new."""
        assert rows < self.lag, "the last committed token belongs to a step"
        self.cache.commit(range(rows))

    def truncate(self, length: int, then: Sequence[int] = ()) -> None:
        """Take back all tokens from ``length`` on, which an outer level rejected, and go on with ``then`` instead.

        Rows of the first ``length`` tokens stay cached, except the last token's own, which is always fed.
        """
        assert self.final <= length <= len(self.tokens), "confirmed tokens cannot be taken back"
        self.finish = None
        if length < len(self.tokens):
            del self.tokens[length:]
            self.state = self.chain.at(self.tokens[self.prompt_length :])
        self._append(then)
        fed = min(length, len(self.tokens) - 1)
        if self.cached > fed:
            self.cache.truncate(fed)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append output tokens that another level committed; they are lag until the next forward."""
        self.finish = None
        self._append(tokens)

    def finalize(self, length: int) -> None:
        """The outermost target confirmed the first ``length`` tokens."""
        assert length <= len(self.tokens)
        self.final = max(self.final, length)

    def _append(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)
        for token in tokens:
            self.state = self.chain.advance(self.state, token)
        self.state = self.chain.settle(self.state, self.tokens[self.prompt_length :])


def trim(session: Session, verdict: Verdict) -> Verdict:
    """Cut a verdict after its first stop token or at the session's limit, *before* it is committed."""
    emitted = verdict.emitted[: session.remaining]
    for i, token in enumerate(emitted):
        if token in session.stop_ids:
            return verdict.cut(i + 1, "stop")
    return verdict.cut(len(emitted), "length") if len(emitted) == session.remaining else verdict
