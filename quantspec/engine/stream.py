"""Where a text ends, and how much of it may be shown: end tokens, stop strings and limits, found token by token.

The tokens decide, not the draft they came in: a step's tokens are pushed one by one, so a text ends at the same place
whether its last tokens were drafted in one tree or decoded singly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantspec.types import SamplingParams, Verdict

if TYPE_CHECKING:
    from quantspec.models.tokenizer import Tokenizer


class OutputText:
    """The text of one sequence as its tokens arrive.

    A stop string ends the text just before its first occurrence, wherever it lies between tokens; the tokens that
    spelled it stay in ``token_ids``. One that is complete before ``min_new_tokens`` is part of the text. Text that may
    yet become a stop string, or half of a character, is held back until it is decided.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, params: SamplingParams, stop_ids: frozenset[int], max_new_tokens: int
    ) -> None:
        self.tokens = 0
        self.text = ""
        self.finish: str | None = None
        self._shown = 0
        self._decoder = None if tokenizer is None else tokenizer.stream()
        self._stops = params.stop
        self._stop_ids = stop_ids
        self._min_new_tokens = params.min_new_tokens
        self._max_new_tokens = max_new_tokens

    def trim(self, verdict: Verdict) -> Verdict:
        """The verdict up to the token that ends the text, if one does. Call once per verdict, before its commit."""
        for length, token in enumerate(verdict.emitted, 1):
            if self.push(token) is not None:
                return verdict.cut(length, self.finish)
        return verdict

    def push(self, token: int) -> str | None:
        """Take the next token; ``"stop"`` or ``"length"`` if the text ends with it."""
        assert self.finish is None
        self.tokens += 1
        if token in self._stop_ids:
            return self._end("stop")
        if self._decoder is not None:
            self._append(self._decoder.push(token))
        if self.finish is None and self.tokens == self._max_new_tokens:
            self._end("length")
        return self.finish

    def release(self) -> str:
        """The text that became certain since the last call; all that is left once the text has ended."""
        certain = len(self.text) if self.finish else len(self.text) - self._held_back()
        shown, self._shown = self._shown, max(certain, self._shown)
        return self.text[shown : self._shown]

    def cancel(self) -> None:
        """End the text here for a reason of the user's."""
        self._end("cancelled")

    def _append(self, piece: str) -> None:
        before, self.text = len(self.text), self.text + piece
        if self.tokens < self._min_new_tokens:
            return
        found = [(at, stop) for stop in self._stops if (at := self._find(stop, before)) >= 0]
        if found:
            self.text = self.text[: min(found)[0]]
            self.finish = "stop"

    def _find(self, stop: str, before: int) -> int:
        # Only an occurrence that ends inside the newest piece is new.
        return self.text.find(stop, max(0, before - len(stop) + 1))

    def _end(self, finish: str) -> str:
        if self._decoder is not None:
            self._append(self._decoder.flush())
        self.finish = self.finish or finish
        return self.finish

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stops), default=0) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stops):
                return length
        return 0
