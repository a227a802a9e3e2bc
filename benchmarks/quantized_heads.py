"""What quantizing a drafter's head costs: acceptance length, bytes and draft time beside those of the head that it was
made from.

    python -m quantspec.benchmarks.quantized_heads default/eagle-target w4 --prompts gsm8k_train.jsonl

Heads of one target, the first of which the others are compared with, prompt by prompt: all must give the same text.
Prompts and settings are those of ``acceptance``. Intervals are 95% bootstrap intervals over prompts, texts that loop
left out; the quotient's are paired. Draft times are medians over prompts of milliseconds per draft, the heads taken in
turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import quantspec
from quantspec.benchmarks.acceptance import DISTINCT, SETTINGS, questions
from quantspec.calibrate.stats import distinct_ngrams, quotient, ratio
from quantspec.engine.llm import LLM
from quantspec.models.resolve import resolve
from quantspec.models.tensors import TensorStore
from quantspec.types import SamplingParams


@dataclass
class Rows:
    """Of one head: tokens and target forwards, and milliseconds per draft, of each sound prompt."""

    lengths: list[tuple[int, int]] = field(default_factory=list)
    draft_ms: list[float] = field(default_factory=list)

    def json(self, first: Rows) -> dict[str, Any]:
        return {
            "acceptance_length": ratio(self.lengths).json(),
            "to_the_first": quotient(self.lengths, first.lengths).json(),
            "draft_ms": round(statistics.median(self.draft_ms), 4),
        }


def measure(llms: dict[str, LLM], prompts: Sequence[str], tokens: int, sampling: dict[str, float]) -> dict[str, Rows]:
    """Generate all prompts with all heads, which must agree on the text."""
    rows = {head: Rows() for head in llms}
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(max_new_tokens=tokens, seed=seed, **sampling)  # type: ignore[arg-type]
        texts = set()
        for head, llm in llms.items():
            completion = llm.generate(prompt, params)
            assert not isinstance(completion, list)
            texts.add(completion.token_ids)
            if distinct_ngrams(completion.token_ids) >= DISTINCT and completion.stats.target_forwards > 1:
                stats = completion.stats
                rows[head].lengths.append((stats.new_tokens - 1, stats.target_forwards))
                seconds = stats.draft_seconds - stats.draft_prefill_seconds
                rows[head].draft_ms.append(1e3 * seconds / (stats.target_forwards - 1))
        if len(texts) > 1:
            raise AssertionError(f"texts differ between heads: {texts}")
        print(f"\r{seed + 1}/{len(prompts)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", nargs="+", help="folders, the unquantized head first")
    parser.add_argument("--prompts", type=Path, required=True, help="GSM8K-form JSON lines; the last ones are used")
    parser.add_argument("--model", default="default")
    parser.add_argument("--limit", type=int, default=80)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parser.parse_args(arguments)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    prompts = questions(options.prompts, options.limit)
    llms = {
        head: quantspec.load(options.model, method="eagle", head=head, num_speculative_tokens=15)
        for head in options.heads
    }
    report: dict[str, Any] = {"bytes": {head: TensorStore(resolve(head)).nbytes() for head in options.heads}}
    for setting, sampling in SETTINGS.items():
        rows = measure(llms, prompts, options.max_new_tokens, sampling)
        first = rows[options.heads[0]]
        report[setting] = {head: found.json(first) for head, found in rows.items()}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
