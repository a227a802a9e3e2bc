"""One sequence from prompt to completion: its session while it runs, and the record that the user gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantspec.core.drafter import Drafter, NoDrafter
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.session import Session
from quantspec.engine.causes import Subject
from quantspec.engine.config import HEAD_METHODS
from quantspec.engine.controller import Controller
from quantspec.engine.engine import Engine, is_out_of_memory
from quantspec.engine.stats import Lap, Stats
from quantspec.engine.stream import OutputText
from quantspec.engine.watch import useless
from quantspec.errors import ResourceError, UsageError
from quantspec.types import Budget, Chunk, SamplingParams, TokenLogprob, Verdict

WATCHED_METHODS = (*HEAD_METHODS, "draft", "cascade")
"""Whose drafters learned what they say."""
_PLAIN = Budget(max_nodes=0, max_depth=0)
_JUDGED_AFTER, _USELESS = 50, 1.05
"""A drafter is called useless if after so many target forwards each still gave fewer tokens than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished text. ``token_ids`` include an end token or stop string that ``text`` leaves out; ``stages`` name
    the level that proposed each. ``finish_reason`` is ``"stop"``, ``"length"`` or ``"cancelled"``. The same ``seed``
    gives the same text again."""

    text: str
    token_ids: tuple[int, ...]
    stages: tuple[str, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    seed: int
    index: int
    stats: Stats


class Request:
    """One sequence to generate, sample number ``sample`` of its prompt. Raises ``UsageError`` if that is impossible."""

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        sample: int = 0,
        index: int = 0,
    ) -> None:
        self.engine, self.prompt, self.index, self.seed = engine, tuple(prompt), index, seed
        self.max_new_tokens = _room(self.prompt, params, engine.max_context)
        self.cut_short = self.max_new_tokens < params.max_new_tokens
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else engine.eos_ids)
        self.chain = WarpChain(params, self.prompt, self.stop_ids)
        self.chain.check(engine.model.vocab_size)
        self.stream = Stream.of(self.prompt, sample, seed)
        self.text = OutputText(engine.tokenizer, params, self.stop_ids, self.max_new_tokens)
        self.stats = Stats(
            method=engine.drafter.name,
            backend=engine.model.backend,
            exactness=engine.verifier.exactness,
            kv_cache_dtype=engine.config.kv_cache_dtype,
            prompt_tokens=len(self.prompt),
        )
        self.drafter: Drafter = engine.drafter
        self.state: Any = None
        self._controller: Controller | None = None
        if engine.outlook:
            self._controller = Controller(engine.outlook, engine.lessons, len(self.prompt), self.max_new_tokens)
        self._session: Session | None = None
        self._token_ids: list[int] = []
        self._stages: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def session(self) -> Session:
        """Its session; it must be open."""
        assert self._session is not None, "not open"
        return self._session

    def open(self) -> None:
        """Give it a cache in the target and a state in the drafter. Raises ``ResourceError`` if there is no room."""
        verifier, nodes = self.engine.verifier, self.engine.budget.max_nodes
        try:
            self._session = verifier.open(
                self.prompt, self.chain, self.stream, self.stop_ids, self.max_new_tokens, nodes
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            hint = "lower max_new_tokens or max_batch"
            raise ResourceError("out of memory for one more sequence", hint=hint) from error
        self.drafter = self.engine.drafter
        view = self._session.view()
        self.state = self._spare(lambda: self.drafter.open(view))

    def budget(self, batch: int = 1) -> Budget:
        """Of the next draft, in a step of ``batch`` sequences. Nothing at first: the target streams its first token
        before any drafter reads the prompt."""
        widest = self.engine.budget
        if not self._token_ids or not widest.max_nodes:
            return _PLAIN
        if self._controller is None:
            return widest
        budget = self._controller.budget(len(self.session.tokens), batch)
        return budget if budget.max_nodes <= widest.max_nodes else replace(budget, max_nodes=widest.max_nodes)

    def take(self, verdict: Verdict, lap: Lap) -> Chunk:
        """Record a committed step; returns what it adds to the stream."""
        if self._controller and self._token_ids and self._controller.take(verdict, lap.draft, lap.verify):
            self.engine.notice(
                f"drafter {self.drafter.name} does not pay here: decoding goes on without it for a while"
            )
        self._token_ids += verdict.emitted
        self._stages += verdict.stages
        self._logprobs += verdict.logprobs
        self.stats.count(verdict, lap)
        self.stats.kv_cache_bytes = max(self.stats.kv_cache_bytes, self.session.cache.nbytes)
        self.session.finalize(len(self.session.tokens))
        self._spare(lambda: self.drafter.finalize(self.state, self.session.final))
        if self.text.finish:
            self._judge()
        self._watch(verdict)
        return Chunk(
            verdict.emitted, verdict.stages, self.text.release(), verdict.logprobs, self.text.finish, self.index
        )

    def cancel(self) -> Chunk:
        """End here; the last chunk brings the text that was held back."""
        self.text.cancel()
        return Chunk((), (), self.text.release(), (), self.text.finish, self.index)

    def leave_drafter(self) -> None:
        """Free the drafter's state and go on without it."""
        self._spare(lambda: self.drafter.close(self.state))
        self.state, self.drafter = None, NoDrafter()

    def close(self) -> None:
        """Free the cache and the drafter's state."""
        if self._session is not None:
            self.leave_drafter()
            self._session = None
            if self._controller:
                self._controller.close()

    def completion(self) -> Completion:
        """What was generated so far."""
        return Completion(
            text=self.text.text,
            token_ids=tuple(self._token_ids),
            stages=tuple(self._stages),
            logprobs=tuple(self._logprobs),
            finish_reason=self.text.finish or "cancelled",
            seed=self.seed,
            index=self.index,
            stats=self.stats,
        )

    def _spare(self, call: Callable[[], Any]) -> Any:
        """A drafter's answer; one that raises costs speed, never the text."""
        try:
            return call()
        except Exception as error:
            self.engine.notice(f"drafter {self.drafter.name} failed: {type(error).__name__}: {error}")
            return None

    def _watch(self, verdict: Verdict) -> None:
        """Raise the alarm for a drafter that is as good as never right, with what may have caused it."""
        engine, tokens = self.engine, self.session.tokens
        if engine.config.method not in WATCHED_METHODS:
            return
        if engine.alarm.count(tokens[: len(tokens) - len(verdict.emitted)], verdict):
            engine.judged = True
            subject = Subject(engine.drafter, engine.model, engine.tokenizer)
            engine.notice(useless(engine.alarm, subject, tokens, self.prompt))

    def _judge(self) -> None:
        """Say what the user would not see: a drafter that never helps, a context that was too short."""
        stats, engine = self.stats, self.engine
        useless = stats.target_forwards >= _JUDGED_AFTER and stats.acceptance_length < _USELESS
        if stats.drafted_tokens and useless and not (engine.judged or self._controller):  # it says so itself
            engine.notice(f"drafter {self.drafter.name} is hardly ever right here: plain decoding would be faster")
        if self.cut_short and self.text.finish == "length":
            engine.notice(f"the context of {engine.max_context} tokens is full: the text ends before max_new_tokens")


def _room(prompt: Sequence[int], params: SamplingParams, context: int) -> int:
    """How many new tokens are asked for and fit."""
    if not prompt:
        raise UsageError("the prompt is empty", hint="give at least one token")
    room = context - len(prompt)
    if room < max(1, params.min_new_tokens):
        least = f" and min_new_tokens is {params.min_new_tokens}" if params.min_new_tokens > 1 else ""
        raise UsageError(
            f"the prompt has {len(prompt)} tokens{least}, but the context holds {context}", hint="shorten the prompt"
        )
    return min(room, params.max_new_tokens)
