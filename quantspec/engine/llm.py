"""The Python interface: ``quantspec.load(...)``, ``.generate``, ``.stream``, and cancelling from any thread."""

from __future__ import annotations

import secrets
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from quantspec.engine.build import build
from quantspec.engine.config import EngineConfig
from quantspec.engine.engine import Engine
from quantspec.engine.generate import generate
from quantspec.engine.request import Completion, Request
from quantspec.errors import UsageError
from quantspec.types import Chunk, SamplingParams

Prompt = str | Sequence[int]
"""Text, or token ids."""


def load(model: str = "default", *, notice: Callable[[str], None] | None = None, **options: Any) -> LLM:
    """Load a target and its drafters.

    ``model`` is a folder, a hub id, or ``"default"``; ``options`` are ``EngineConfig``'s fields, or vLLM's keys under
    ``speculative_config``. ``notice`` receives one line whenever something is not as asked for (default: a warning).
    Raises ``UsageError`` for a wrong option, ``ModelError`` for a model that is missing, damaged or does not match.
    """
    notice = notice or _warn
    return LLM(build(EngineConfig.from_mapping({"model": model, **options}, notice), notice))


class LLM:
    """A target with its drafter, ready to generate."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def config(self) -> EngineConfig:
        """The configuration in force, with the method that was chosen."""
        return self._engine.config

    @property
    def exactness(self) -> str:
        """How the text relates to plain decoding of the target: the verifier's label."""
        return self._engine.verifier.exactness

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights held: the target's and the drafters'."""
        return self._engine.weight_bytes

    @property
    def tokenizer(self) -> Any:
        """The target's tokenizer."""
        return self._engine.tokenizer

    def describe(self) -> str:
        """One line for people: target, drafter, exactness."""
        return f"{self.config.model}; drafter {self._engine.drafter.describe()}; {self.exactness}"

    def generate(
        self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> Completion | list[Completion]:
        """Complete one prompt, or a batch of them: a list where several were given or ``params.n`` is above 1.

        Completions of one prompt stand together, in sample order. Raises ``UsageError`` for a prompt that does not fit.
        """
        generation = self.stream(prompt, params)
        for _ in generation:
            pass
        completions = generation.completions
        return completions[0] if _is_single(prompt) and len(completions) == 1 else completions

    def stream(self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> Generation:
        """The same, chunk by chunk as it is generated; ``Chunk.index`` numbers the completions."""
        engine, params = self._engine, params or SamplingParams()
        if params.stop and engine.tokenizer is None:
            raise UsageError("stop strings need a tokenizer", hint="use stop_token_ids")
        seed = secrets.randbits(32) if params.seed is None else params.seed
        encoded = [self._encode(each) for each in _prompts(prompt)]
        return Generation(
            engine,
            [
                Request(engine, ids, params, seed=seed, sample=sample, index=number * params.n + sample)
                for number, ids in enumerate(encoded)
                for sample in range(params.n)
            ],
        )

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        engine = self._engine
        if isinstance(prompt, str):
            if engine.tokenizer is None:
                raise UsageError("this model has no tokenizer", hint="give token ids")
            return engine.tokenizer.encode(prompt)
        wrong = [token for token in prompt if not isinstance(token, int) or not 0 <= token < engine.model.vocab_size]
        if wrong:
            raise UsageError(f"token {wrong[0]!r} is not an id below the vocabulary's size {engine.model.vocab_size}")
        return prompt


class Generation(Iterator[Chunk]):
    """Chunks of one call as they come. Leaving it early (``close``, or a ``with`` block) frees everything at once;
    ``cancel`` asks from any thread for the end after the step in progress, and the last chunks say ``"cancelled"``."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._cancelled = threading.Event()
        self._chunks = generate(engine, requests, self._cancelled.is_set)

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def cancel(self) -> None:
        """Stop after the step in progress. Safe from any thread, at any time, more than once."""
        self._cancelled.set()

    def close(self) -> None:
        """Stop now and free caches. From the iterating thread only."""
        self._chunks.close()

    @property
    def completions(self) -> list[Completion]:
        """What was generated so far, by index; whole once the iteration has ended."""
        return [request.completion() for request in self._requests]


def _is_single(prompt: Any) -> bool:
    return isinstance(prompt, str) or (len(prompt) > 0 and all(isinstance(token, int) for token in prompt))


def _prompts(prompt: Any) -> list[Prompt]:
    if not _is_single(prompt) and not prompt:
        raise UsageError("no prompt was given")
    return [prompt] if _is_single(prompt) else list(prompt)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
