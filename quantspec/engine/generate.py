"""The loop: rounds of draft, verify, trim and commit over the sequences that are still running.

Prompts of a batch, samples of a prompt and a single text go through the same code. A sequence that ends leaves the
batch, and a waiting one takes its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from time import perf_counter

import torch

from quantspec.core.step import step
from quantspec.engine.engine import Engine, is_out_of_memory, torch_threads
from quantspec.engine.request import Request
from quantspec.types import Chunk, Verdict


@torch.inference_mode()
def advance(engine: Engine, running: Sequence[Request]) -> list[Chunk]:
    """One step of every running sequence."""
    started = perf_counter()
    with torch_threads(engine.torch_threads):
        verdicts = _step(engine, running)
    for line in engine.model.notes:  # such as that no memory was left to capture a graph
        engine.notice(line)
    lap = engine.verifier.lap(started)
    return [request.take(verdict, lap) for request, verdict in zip(running, verdicts, strict=True)]


def generate(
    engine: Engine, requests: Sequence[Request], cancelled: Callable[[], bool]
) -> Generator[Chunk, None, None]:
    """Run all requests, yielding one chunk per sequence and step. Closing the iterator frees every sequence."""
    waiting, running = deque(requests), list[Request]()
    try:
        while waiting or running:
            if cancelled():
                yield from [request.cancel() for request in (*running, *waiting)]
                return
            while waiting and len(running) < engine.config.max_batch:
                running.append(waiting.popleft())
                running[-1].open()
            chunks = advance(engine, running)
            for request in running:
                if request.text.finish:
                    request.close()
            running = [request for request in running if not request.text.finish]
            yield from chunks
    finally:
        for request in running:
            request.close()


def _step(engine: Engine, running: Sequence[Request]) -> list[Verdict]:
    """``core.step``, again with narrower drafts while memory does not suffice."""
    sessions = [request.session for request in running]
    texts = {id(request.session): request.text for request in running}
    while True:
        try:
            return step(
                sessions,
                [request.state for request in running],
                engine.drafter,
                engine.verifier,
                [request.budget(len(running)) for request in running],
                trim=lambda session, verdict: texts[id(session)].trim(verdict),
                notice=engine.notice,
            )
        except (MemoryError, RuntimeError) as error:
            untouched = all(session.generated == texts[id(session)].tokens for session in sessions)
            if not (untouched and is_out_of_memory(error)):
                raise
            engine.step_down(error, running)
