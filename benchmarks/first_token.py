"""How long a user waits for the first token, and what a step costs outside the models.

    python -m quantspec.benchmarks.first_token [--model default] [--method cascade]

First token: one fresh process; the clock starts after ``import torch`` (2-3 s that no code of ours can save) and stops
when the first chunk arrives, so loading weights and tokenizer counts. transformers must not have been imported.
Overhead: wall time of a step outside the target's forwards and the drafter's ``propose``, median over the steps of one
text: draws, acceptance, commits, detokenizing, records. Goals: 1.0 s, and 0.3 ms (greedy) or 1 ms (sampled) on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantspec.engine.llm import LLM
    from quantspec.types import SamplingParams

PROMPT = (
    "Question: A baker has 24 rolls. She sells 9 in the morning and 7 in the afternoon. How many are left?\nAnswer:"
)


class Stopwatch:
    """Adds up the time spent in some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds += perf_counter() - started

        return timed


def first_token(model: str, method: str | None) -> tuple[LLM, dict[str, float]]:
    """Load and wait for the first chunk; seconds since the call, all imports but torch's included."""
    started = perf_counter()
    import quantspec

    llm = quantspec.load(model, method=method)
    loaded = perf_counter()
    with llm.stream(PROMPT) as stream:
        next(stream)
    ended = perf_counter()
    return llm, {"load_s": loaded - started, "prefill_s": ended - loaded, "first_token_s": ended - started}


def overhead(llm: LLM, params: SamplingParams) -> float:
    """Median milliseconds of a step outside forwards and ``propose``, the prompt's step left out."""
    engine, watch = llm._engine, Stopwatch()
    forward, propose = engine.model.forward, engine.drafter.propose
    engine.model.forward = watch.around(forward)  # type: ignore[method-assign]
    engine.drafter.propose = watch.around(propose)  # type: ignore[method-assign]
    try:
        steps, started = [], perf_counter()
        for _ in llm.stream(PROMPT, params):
            ended = perf_counter()
            steps.append(ended - started - watch.seconds)
            watch.seconds, started = 0.0, ended
    finally:
        engine.model.forward, engine.drafter.propose = forward, propose  # type: ignore[method-assign]
    return statistics.median(steps[1:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--method")
    arguments = parser.parse_args()
    started = perf_counter()
    import torch

    torch_s = perf_counter() - started
    llm, report = first_token(arguments.model, arguments.method)
    from quantspec.types import SamplingParams

    long: dict[str, Any] = {"max_new_tokens": 256, "ignore_eos": True}
    greedy = overhead(llm, SamplingParams(**long))
    sampled = overhead(llm, SamplingParams(**long, temperature=0.8, top_p=0.95, seed=0))
    print(
        json.dumps(
            {
                "model": arguments.model,
                "method": llm.config.method,
                "threads": torch.get_num_threads(),
                "import_torch_s": torch_s,
                **report,
                "overhead_greedy_ms": greedy,
                "overhead_sampled_ms": sampled,
                "transformers_imported": "transformers" in sys.modules,
            }
        )
    )


if __name__ == "__main__":
    main()
