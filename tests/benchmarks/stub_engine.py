"""A worker of ``bench generate`` without a model: it answers at once, and misbehaves as its options tell it.

``quantspec.benchmarks.peers.protocol`` is all that it shares with the real ones.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from quantspec.benchmarks.peers.protocol import Answer, Answerer, Ask, serve


def load(options: Mapping[str, Any]) -> tuple[dict[str, Any], Answerer]:
    if "curve" in options:
        return {"curve": {1: 0.1, 2: 0.15}}, plain
    os.write(1, b"libraries print to stdout\n")
    method, asked = options.get("method", "none"), []

    def answer(ask: Ask) -> Answer:
        asked.append(1)
        return BEHAVIOURS.get(method, lambda ask, count: plain(ask))(ask, len(asked))

    if method == "unloadable":
        raise RuntimeError("no weights\nat all")
    return {"describe": method, "exactness": "exact", "notes": [f"{method} is a stub"]}, answer


def plain(ask: Ask) -> Answer:
    tokens = tuple((sum(ask.tokens) + 7 * i) % 1000 + 2 for i in range(ask.max_new_tokens))
    return Answer(
        tokens=tokens,
        seconds=1.0,
        first_token_seconds=0.1,
        peak_memory_bytes=10**6,
        target_forwards=len(tokens) - 1,
        accepted=(len(tokens) - 1,),
        part_seconds={"draft": 0.0, "verify": 0.9, "overhead": 0.0},
    )


def _wrong(ask: Ask, count: int) -> Answer:
    return Answer(tokens=(5,), seconds=1.0)


def _crash(ask: Ask, count: int) -> Answer:
    if count == 2:
        os.write(2, b"last words\n")
        os.kill(os.getpid(), signal.SIGSEGV)
    return plain(ask)


def _hang(ask: Ask, count: int) -> Answer:
    time.sleep(600)
    return plain(ask)


def _raise(ask: Ask, count: int) -> Answer:
    if count == 2:
        raise ValueError("no luck\nat all")
    return plain(ask)


def _garbage(ask: Ask, count: int) -> Answer:
    return Answer(tokens=(1.5,), seconds=0.0)  # type: ignore[arg-type]


def _interrupt(ask: Ask, count: int) -> Answer:
    if count == 3:
        os.kill(os.getppid(), signal.SIGINT)
    return plain(ask)


BEHAVIOURS = {
    "wrong": _wrong, "crash": _crash, "hang": _hang, "raise": _raise, "garbage": _garbage, "interrupt": _interrupt,
}  # fmt: skip


if __name__ == "__main__":
    serve(load)
