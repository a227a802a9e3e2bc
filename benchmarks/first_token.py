"""How long a user waits for the first token, and what a step costs outside the models.

    python -m quantspec.benchmarks.first_token [--model default] [--method cascade]

First token: one fresh process; the clock starts after ``import torch`` (2-3 s that no code of ours can save) and stops
when the first chunk arrives, so loading weights and tokenizer counts. transformers must not have been imported.
Overhead: time of a step outside the target's forwards and the drafter's ``propose``, median over the steps of one
text: draws, acceptance, commits, detokenizing, records. Goals: 1.0 s, 0.3 ms greedy and 1 ms sampled, on two CPU cores.

Each figure comes twice: by the wall, and as processor time of this thread. On an idle machine they agree but for what
other threads do; on a busy one the second is the one to trust. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantspec.engine.llm import LLM

PROMPT = "Question: A baker has 24 rolls. She sells 9 in the morning and 7 in the afternoon. How many rolls are left?\n"
TEXT: dict[str, Any] = {"max_new_tokens": 256, "ignore_eos": True, "seed": 0}
SETTINGS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95}}


class Clock:
    """Wall and processor seconds since the last reading, without those spent in calls that it was put around."""

    def __init__(self) -> None:
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        return perf_counter(), thread_time()

    def read(self) -> tuple[float, float]:
        """The seconds, and start anew."""
        now, last = self._now(), self._last
        self._last = now
        return now[0] - last[0], now[1] - last[1]

    def without(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, unseen by this clock."""

        def unseen(*arguments: Any, **options: Any) -> Any:
            before = self._now()
            try:
                return call(*arguments, **options)
            finally:
                after = self._now()
                self._last = (self._last[0] + after[0] - before[0], self._last[1] + after[1] - before[1])

        return unseen


def first_token(model: str, method: str | None) -> tuple[LLM, dict[str, float]]:
    """Load and wait for the first chunk; all imports but torch's count."""
    clock = Clock()
    import quantspec

    llm = quantspec.load(model, method=method)
    loaded = clock.read()
    with llm.stream(PROMPT) as stream:
        next(stream)
    prefilled = clock.read()
    return llm, {
        "load_s": loaded[0],
        "first_token_s": loaded[0] + prefilled[0],
        "first_token_processor_s": loaded[1] + prefilled[1],
    }


def overhead(llm: LLM, **settings: Any) -> tuple[float, float]:
    """Median milliseconds of a step outside forwards and ``propose``, the prompt's step left out."""
    from quantspec.types import SamplingParams

    engine, clock = llm._engine, Clock()
    forward, propose = engine.model.forward, engine.drafter.propose
    engine.model.forward = clock.without(forward)  # type: ignore[method-assign]
    engine.drafter.propose = clock.without(propose)  # type: ignore[method-assign]
    try:
        steps = [clock.read() for _ in llm.stream(PROMPT, SamplingParams(**TEXT, **settings))][1:]
    finally:
        engine.model.forward, engine.drafter.propose = forward, propose  # type: ignore[method-assign]
    return statistics.median(wall for wall, _ in steps) * 1e3, statistics.median(own for _, own in steps) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--method")
    arguments = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does
    started = perf_counter()
    import torch

    report: dict[str, Any] = {"model": arguments.model, "import_torch_s": perf_counter() - started}
    llm, waits = first_token(arguments.model, arguments.method)
    report |= {"method": llm.config.method, "threads": torch.get_num_threads(), **waits}
    for name, settings in SETTINGS.items():
        wall, own = overhead(llm, **settings)
        report |= {f"overhead_{name}_ms": wall, f"overhead_{name}_processor_ms": own}
    print(json.dumps({**report, "transformers_imported": "transformers" in sys.modules}))


if __name__ == "__main__":
    main()
