"""What a step costs outside model forwards and ``propose``: warp, noise, acceptance, commit, views, trimming.

``python -m quantspec.benchmarks.loop_overhead`` prints one JSON object: per setting the median wall time of a step, the
median processor time of its thread and the lowest tenth of that, in milliseconds. The work is single-threaded, so on an
idle machine the first two agree; on a busy one shared caches and cores slow even processor time, and the tenth says
what an idle one would take. Model and drafter are stand-ins whose own time is measured
and taken off: rows of Zipf-like logits known in advance, and a tree of 15 nodes (or none) of which about three are
accepted. The noise cache is emptied before every step, so no drafter is assumed to have drawn with the same noise.
Settings take turns, round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from time import perf_counter, thread_time
from typing import Any

import torch

from quantspec.core import noise
from quantspec.core.drafter import NoDrafter, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.core.step import step
from quantspec.core.verify import Verifier
from quantspec.models.base import Cache, Output
from quantspec.types import Batch, Budget, Draft, SamplingParams, Tap

SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_p": 0.95},
    "penalized": {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1},
}
LIMITS_MS = {"greedy": 0.3, "sampled": 1.0}
POOL = 512


class Stopwatch:
    """Seconds spent inside it, by the wall and by this thread's processor clock."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def __enter__(self) -> None:
        self._start = perf_counter(), thread_time()

    def __exit__(self, *error: object) -> None:
        self.wall += perf_counter() - self._start[0]
        self.processor += thread_time() - self._start[1]


class CountingCache:
    """A cache without contents."""

    length = nbytes = 0
    chains_only = False

    def commit(self, rows: Sequence[int]) -> None:
        self.length += len(rows)

    def truncate(self, length: int) -> None:
        self.length = length


class KnownModel:
    """The logits of a row depend on its position alone: ``pool[position % POOL]``."""

    weight_bytes = 0
    hidden_size = 1
    row_invariant = True
    backend = "known"
    notes: tuple[str, ...] = ()

    def __init__(self, vocab_size: int, max_positions: int, watch: Stopwatch) -> None:
        self.vocab_size, self.max_positions, self.watch = vocab_size, max_positions, watch
        torch.manual_seed(0)
        zipf = -1.3 * torch.arange(1, vocab_size + 1).log()
        self.pool = torch.stack([zipf[torch.randperm(vocab_size)] for _ in range(POOL)])
        self.pool += 0.7 * torch.randn(POOL, vocab_size)

    def new_cache(self, max_length: int, max_nodes: int) -> Cache:
        return CountingCache()

    def forward(self, batch: Batch, caches: Sequence[Cache], taps: Sequence[Tap] = ()) -> Output:
        with self.watch:
            rows = torch.tensor(batch.positions()[-batch.num_logits[0] :])
            return Output(self.pool[rows % POOL])


class KnowingDrafter(NoDrafter):
    """Five children at each of three levels, the first of which carries the target's token, and goes on."""

    name = "knowing"

    def __init__(self, model: KnownModel, nodes: int) -> None:
        self.model, self.nodes = model, nodes

    def propose(self, states: Sequence[None], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        with self.model.watch:
            drafts = [self._draft(view) for view in views]
            noise._noise_row.cache_clear()
            return drafts

    def _draft(self, view: View) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        for level in range(self.nodes // 5):
            t = len(view.tokens) + level
            warped = view.chain.apply(view.state, self.model.pool[(t - 1) % POOL])
            assert view.stream
            y = view.chain.draw(warped[None], [t], view.stream)[0]
            tokens += [(y + i) % self.model.vocab_size for i in range(5)]
            parents += [5 * (level - 1) if level else -1] * 5
        return Draft(tuple(tokens), tuple(parents), (1.0,) * len(tokens), ("draft",) * len(tokens))


class Setting:
    """One combination of parameters and draft width, stepped on its own session."""

    def __init__(self, params: dict[str, Any], nodes: int, vocab_size: int, steps: int) -> None:
        self.watch = Stopwatch()
        prompt, new = tuple(range(1, 65)), 4 * steps + 8
        model = KnownModel(vocab_size, len(prompt) + new, self.watch)
        chain = WarpChain(SamplingParams(max_new_tokens=new, **params), prompt)
        self.verifier = Verifier(model)
        self.session = self.verifier.open(prompt, chain, Stream.of(prompt, 0, 7), max_new_tokens=new)
        self.drafter = KnowingDrafter(model, nodes)
        self.steps: list[Stopwatch] = []

    def step(self) -> None:
        own, total = self.watch, Stopwatch()
        own.wall = own.processor = 0.0
        with total:
            step([self.session], [None], self.drafter, self.verifier, [Budget(64, 16)])
        total.wall -= own.wall
        total.processor -= own.processor
        self.steps.append(total)


def measure(vocab_size: int, rounds: int, steps_per_round: int) -> dict[str, Any]:
    """Milliseconds per setting, with the limit it should keep."""
    steps = rounds * steps_per_round
    settings = {
        f"{name}, {nodes + 1} rows": Setting(params, nodes, vocab_size, steps)
        for name, params in SETTINGS.items()
        for nodes in (0, 15)
    }
    for _ in range(rounds):
        for setting in settings.values():
            for _ in range(steps_per_round):
                setting.step()
    return {
        name: {
            "wall_ms": round(1e3 * statistics.median(step.wall for step in setting.steps), 4),
            "processor_ms": round(1e3 * statistics.median(step.processor for step in setting.steps), 4),
            "processor_p10_ms": round(1e3 * statistics.quantiles((s.processor for s in setting.steps), n=10)[0], 4),
            "limit_ms": LIMITS_MS.get(name.split(",")[0]),
            "steps": steps,
            "tokens_per_step": round(setting.session.generated / steps, 2),
        }
        for name, setting in settings.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps-per-round", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.vocab_size, options.rounds, options.steps_per_round)
    print(json.dumps({"vocab_size": options.vocab_size, "threads": options.threads, "settings": result}, indent=2))


if __name__ == "__main__":
    main()
