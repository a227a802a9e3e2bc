"""How the benchmark speaks with a process that generates: one JSON object a line, through stdin and stdout.

    -> {"load": {...options}}                          <- {"ready": {"describe": "...", ...}} | {"error": "one line"}
    -> {"ask": {"tokens", "text", "max_new_tokens", ...}}   <- {"answer": {...Answer}} | {"error": "one line"}
    -> end of input                                    the process ends

A process stays loaded between its turns and does nothing then. Whatever libraries print goes to stderr. An engine that
fails once may still answer the next question; one that dies, or says nothing past a limit, is out (``process``).

No torch here. A worker is a module with ``serve(load)`` below ``if __name__ == "__main__"``; ``load(options)`` gives a
description and a function that answers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from quantspec.errors import QuantSpecError, one_line
from quantspec.kernels.memory import status_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A text to generate greedily: the prompt as token ids (an engine with the same vocabulary takes these) and as
    text. ``extra`` is the contender's own (``Contender.ask``)."""

    tokens: tuple[int, ...]
    text: str
    max_new_tokens: int
    extra: Mapping[str, Any]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            tokens=tuple(data["tokens"]),
            text=data["text"],
            max_new_tokens=data["max_new_tokens"],
            extra=data.get("extra", {}),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The new ``tokens`` (an end token included or not, as the engine gives them) and the wall ``seconds`` of the whole
    call, the prompt's included; what an engine does not tell is None.

    ``accepted[k]`` are the target forwards, the prompt's left out, in which k drafted tokens were accepted.
    ``part_seconds`` (``draft``, ``verify``, ``overhead``) leave out the prompt's forward and the drafter's reading of
    the prompt.
    ``peak_memory_bytes`` is what this process has held at most: of the machine's memory, or of the GPU's.
    """

    tokens: tuple[int, ...]
    seconds: float
    first_token_seconds: float | None = None
    peak_memory_bytes: int | None = None
    target_forwards: int | None = None
    accepted: tuple[int, ...] = ()
    part_seconds: Mapping[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for what is no answer."""
        known = {each.name: data[each.name] for each in fields(cls) if each.name in data}
        answer = cls(**{**known, "tokens": tuple(data["tokens"]), "accepted": tuple(data.get("accepted", ()))})
        if not answer.seconds > 0 or not all(type(token) is int for token in answer.tokens):
            raise ValueError("an answer needs seconds above 0 and token ids")
        return answer


Answerer = Callable[[Ask], Answer]
Load = Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Answerer]]


def serve(load: Load) -> None:
    """Answer this process's input until it ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand between the replies
    answerer: Answerer | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if "load" in message:
                described, answerer = load(message["load"])
                reply: dict[str, Any] = {"ready": dict(described)}
            else:
                assert answerer is not None, "a question before loading"
                reply = {"answer": answerer(Ask.from_dict(message["ask"])).as_dict()}
        except Exception as error:
            reply = {"error": error_line(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def error_line(error: Exception) -> str:
    """What went wrong, in one line."""
    text = str(error).partition("\n")[0]
    return one_line(text if isinstance(error, QuantSpecError) else f"{type(error).__name__}: {text}")


def peak_memory(process: int | str = "self") -> int | None:
    """Bytes that a process has held in memory at most, files that it maps included; None where the system does not
    say."""
    return status_bytes("VmHWM", process) or None
