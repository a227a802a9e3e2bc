"""Prompt lookup: what followed the last occurrence of the text's own suffix (Saxena 2023; LLMA, arXiv 2304.04487)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from quantspec.core.drafter import TargetParts, View
from quantspec.drafters.config import LookupOptions
from quantspec.types import EMPTY_DRAFT, Budget, Draft, Needs, Verdict


@dataclass(slots=True)
class LookupState:
    """``index[ngram]`` lists, ascending, the positions right after each occurrence of it that has a continuation."""

    tokens: list[int] = field(default_factory=list)
    index: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    trials: int = 0
    hits: int = 0


class PromptLookup:
    """Copies the continuation of the most recent match of the longest suffix as a chain.

    The index grows and shrinks with the text, so a step costs a few dictionary look-ups however long the text is. A
    copy that reaches the end of the text goes on into itself (as in LZ77), so loops are drafted at full length.
    """

    needs = Needs()
    name = "lookup"

    def __init__(self, options: LookupOptions | None = None) -> None:
        options = options or LookupOptions()
        self._sizes = range(options.prompt_lookup_max, options.prompt_lookup_min - 1, -1)

    def prepare(self, parts: TargetParts) -> None:
        pass

    def open(self, view: View) -> LookupState:
        return LookupState()

    def propose(self, states: Sequence[LookupState], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        return [self._draft(*arguments) for arguments in zip(states, views, budgets, strict=True)]

    def _draft(self, state: LookupState, view: View, budget: Budget) -> Draft:
        self._extend(state, view.tokens[len(state.tokens) :])
        source = self._match(state)
        if source is None:
            return EMPTY_DRAFT
        text, scores, score = state.tokens.copy(), [], 1.0
        # Estimated conditional acceptance of a copied token, with the prior of one hit in two trials.
        rate = (state.hits + 1) / (state.trials + 2)
        for k in range(1, min(budget.max_nodes, budget.max_depth, view.remaining - 1) + 1):
            score *= rate
            text.append(text[source + k - 1])
            scores.append(score)
            if text[-1] in view.stop_ids:
                break
        kept = budget.worth(scores)
        return Draft.chain(text[len(view.tokens) :][:kept], scores[:kept], [self.name] * kept)

    def _extend(self, state: LookupState, tokens: Sequence[int]) -> None:
        text = state.tokens
        for token in tokens:
            # An n-gram enters the index when its continuation arrives, so the current suffix never matches itself.
            for n in self._sizes:
                if n <= len(text):
                    state.index.setdefault(tuple(text[-n:]), []).append(len(text))
            text.append(token)

    def _match(self, state: LookupState) -> int | None:
        for n in self._sizes:
            found = state.index.get(tuple(state.tokens[-n:])) if n <= len(state.tokens) else None
            if found:
                return found[-1]
        return None

    def observe(self, state: LookupState, verdict: Verdict) -> None:
        state.hits += len(verdict.path)
        state.trials += len(verdict.path) + (len(verdict.path) < len(verdict.draft))

    def truncate(self, state: LookupState, length: int) -> None:
        while len(state.tokens) > length:
            state.tokens.pop()
            for n in self._sizes:
                if n <= len(state.tokens):
                    key = tuple(state.tokens[-n:])
                    positions = state.index[key]
                    positions.pop()
                    if not positions:
                        del state.index[key]

    def finalize(self, state: LookupState, length: int) -> None:
        pass

    def close(self, state: LookupState) -> None:
        pass

    def describe(self) -> str:
        return f"prompt lookup (suffixes of {self._sizes[0]} to {self._sizes[-1]} tokens)"
