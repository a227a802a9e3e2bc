"""A method of this package as a contender: a worker that loads a target with one drafter and generates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

import quantspec
from quantspec.benchmarks.generate_rows import PLAIN
from quantspec.benchmarks.peers.protocol import Answer, Answerer, Ask, peak_memory, serve
from quantspec.engine.auto import AUTO
from quantspec.engine.llm import LLM
from quantspec.engine.stats import Stats
from quantspec.errors import ModelError
from quantspec.types import SamplingParams

_CURVE_CONTEXT, _CURVE_SECONDS = 128, 3.0


def load(options: Mapping[str, Any]) -> tuple[dict[str, Any], Answerer]:
    """``options`` are ``quantspec.load``'s, and ``curve``: widths of target forwards to time, and to tell of alone."""
    notes: list[str] = []
    engine_options = {key: value for key, value in options.items() if key != "curve"}
    llm = quantspec.load(**engine_options, notice=notes.append)
    asked = engine_options["method"]
    if asked != AUTO and llm.config.method != asked:
        raise ModelError(notes[-1])  # such as that the drafter did not fit into memory
    if asked == AUTO and llm._engine.outlook is None and llm.config.method != PLAIN:
        # A profile that does not hold leaves the choice to defaults, whose figures would stand under auto's name.
        raise ModelError(next(line for line in notes if "profile" in line))
    # A first run pays for caches, thread pools and what is compiled.
    llm.generate("Question:", SamplingParams(max_new_tokens=8, seed=0))
    if "curve" in options:
        return {"curve": _curve(llm, options["curve"])}, lambda ask: generate(llm, ask)
    described = {
        "describe": llm.describe(),
        "version": quantspec.__version__,
        "exactness": llm.exactness,
        "num_speculative_tokens": llm.config.max_nodes,
        "weight_bytes": llm.weight_bytes,
        "notes": notes,
    }
    return described, lambda ask: generate(llm, ask)


def generate(llm: LLM, ask: Ask) -> Answer:
    """One greedy text, timed around the call as any other engine's is."""
    accepted, first, at_first = Counter[int](), None, dict[str, float]()
    began = perf_counter()
    with llm.stream(ask.tokens, SamplingParams(max_new_tokens=ask.max_new_tokens, seed=0)) as generation:
        for chunk in generation:
            if first is None:
                first, at_first = perf_counter() - began, _parts(generation.completions[0].stats)
            elif chunk.tokens:
                accepted[len(chunk.tokens) - 1] += 1
    seconds, completion = perf_counter() - began, generation.completions[0]
    parts = _parts(completion.stats)
    parts["draft"] -= completion.stats.draft_prefill_seconds
    return Answer(
        tokens=completion.token_ids,
        seconds=seconds,
        first_token_seconds=first,
        peak_memory_bytes=_peak_memory(),
        target_forwards=completion.stats.target_forwards,
        accepted=tuple(accepted[count] for count in range(max(accepted, default=-1) + 1)),
        part_seconds={part: max(value - at_first[part], 0.0) for part, value in parts.items()},
    )


def _parts(stats: Stats) -> dict[str, float]:
    return {"draft": stats.draft_seconds, "verify": stats.verify_seconds, "overhead": stats.overhead_seconds}


def _peak_memory() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak_memory()


def _curve(llm: LLM, widths: Sequence[int]) -> dict[int, float]:
    """Seconds of a target forward by its rows, with a short text in the cache."""
    from quantspec.calibrate.cost.curve import Forwards

    engine = llm._engine
    forwards = Forwards(engine.verifier, (_CURVE_CONTEXT,), widths, engine.torch_threads, seed=0)
    forwards.run(_CURVE_SECONDS)
    found = forwards.curve()
    return dict(zip(found.widths, found.seconds[0], strict=True))


if __name__ == "__main__":
    serve(load)
