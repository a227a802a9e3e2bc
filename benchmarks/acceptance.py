"""How much of what the drafters say the target takes, on GSM8K-form prompts that no training stage has seen.

    python -m quantspec.benchmarks.acceptance --prompts gsm8k_train.jsonl --out acceptance.json

The last ``--limit`` lines of the file, at most the 200 that training holds out, are put as "Question: ...\\nAnswer:"
and generated greedily and at temperature 0.8 with top-p 0.95. Reported per setting, each with a 95% bootstrap interval
over prompts: acceptance length per target forward (the target's own token counted, the prompt's forward not) of every
method and its quotient with that of the first, and the share of tokens on which the intermediate, given the target's
text and noise, draws the target's token.
Texts that loop (under 60% distinct 4-grams) are counted, named and left out; the figures with them are given too.
A method may have settings behind colons, as in ``peagle:num_speculative_tokens=5:tree_depth=5:tree_top_k=1``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import quantspec
from quantspec.benchmarks.generate_config import engine_setting
from quantspec.calibrate.stats import distinct_ngrams, quotient, ratio
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.engine.llm import LLM
from quantspec.errors import ModelError, UsageError
from quantspec.models.base import CausalModel
from quantspec.models.load import load_model
from quantspec.types import Batch, SamplingParams

HELD_OUT = 200
DISTINCT = 0.6
SETTINGS: dict[str, dict[str, float]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95}}


@dataclass(frozen=True, slots=True)
class Result:
    """One prompt under one setting: the target's text, tokens and forwards by method, and the intermediate's hits."""

    tokens: tuple[int, ...]
    lengths: dict[str, tuple[int, int]]
    hits: int

    @property
    def degenerate(self) -> bool:
        return distinct_ngrams(self.tokens) < DISTINCT


def questions(path: Path, limit: int) -> list[str]:
    """The last questions of a GSM8K JSONL file, as prompts. Raises ``UsageError`` for more than were held out."""
    if not 1 <= limit <= HELD_OUT:
        raise UsageError(f"--limit must be from 1 to {HELD_OUT}, which training holds out, not {limit}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[-limit:]
        return [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not JSON lines with a question each") from error


def agreements(
    model: CausalModel, prompt: Sequence[int], text: Sequence[int], params: SamplingParams, stream: Stream
) -> int:
    """On how many tokens of ``text`` the model, fed prompt and text, draws the same token with the same noise."""
    tokens = [*prompt, *text]
    chain, cache = WarpChain(params, prompt), model.new_cache(len(tokens), 0)
    logits = model.forward(Batch.chain(tokens[:-1], 0, num_logits=len(text)), [cache]).logits
    states = [chain.at(text[:i]) for i in range(len(text))]
    positions = range(len(prompt), len(tokens))
    drawn = chain.draw(chain.apply_rows(states, logits), positions, stream)
    return sum(a == b for a, b in zip(drawn, text, strict=True))


def measure(llms: dict[str, LLM], intermediate: CausalModel, prompt: str, params: SamplingParams) -> Result:
    """Generate with every method, which must agree on the text."""
    lengths, texts = {}, {}
    for method, llm in llms.items():
        completion = llm.generate(prompt, params)
        assert not isinstance(completion, list)
        lengths[method] = (completion.stats.new_tokens - 1, completion.stats.target_forwards)
        texts[method] = completion.token_ids
    tokens = next(iter(texts.values()))
    if any(text != tokens for text in texts.values()):
        raise AssertionError(f"texts differ between methods: {texts}")
    ids = next(iter(llms.values())).tokenizer.encode(prompt)
    assert params.seed is not None
    return Result(tokens, lengths, agreements(intermediate, ids, tokens, params, Stream.of(ids, 0, params.seed)))


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Figures without the degenerate texts, and the acceptance with them."""
    sound = [(i, result) for i, result in enumerate(results) if not result.degenerate]
    kept = [result for _, result in sound]

    def acceptance(chosen: Sequence[Result]) -> dict[str, Any]:
        methods = results[0].lengths
        return {method: ratio([result.lengths[method] for result in chosen]).json() for method in methods}

    first, *others = results[0].lengths
    return {
        "agreement": ratio([(result.hits, len(result.tokens)) for result in kept]).json(),
        "acceptance_length": acceptance(kept),
        "to_the_first": {
            method: quotient([r.lengths[method] for r in kept], [r.lengths[first] for r in kept]).json()
            for method in others
        },
        "tokens": sum(len(result.tokens) for result in kept),
        "degenerate_prompts": sorted(set(range(len(results))) - {i for i, _ in sound}),
        "with_degenerate": {
            "agreement": ratio([(result.hits, len(result.tokens)) for result in results]).json(),
            "acceptance_length": acceptance(results),
        },
    }


def load_methods(arguments: argparse.Namespace) -> dict[str, LLM]:
    """One engine per method. Where parts of the default family are replaced, the flags name them."""
    parts: dict[str, dict[str, Any]] = {
        "eagle": {"head": arguments.head, "num_speculative_tokens": 15},
        "eagle3": {"head": arguments.eagle3_head, "num_speculative_tokens": 15},
        "peagle": {"head": arguments.peagle_head},
        "medusa": {"head": arguments.medusa_head, "num_speculative_tokens": 15},
        "cascade": {
            "draft_model": arguments.draft_model,
            "head": arguments.cascade_head,
            "min_draft": arguments.min_draft,
        },
        "draft": {"draft_model": arguments.draft_model},
        "lookup": {},
    }
    tree = {"tree_depth": arguments.tree_depth, "tree_top_k": arguments.tree_top_k}
    llms = {}
    for spec in arguments.methods.split(","):
        method, *settings = spec.split(":")
        if method not in parts:
            raise UsageError(f"unknown method {method!r}", hint=f"one of {', '.join(parts)}")
        given = {key: value for key, value in (parts[method] | tree).items() if value is not None}
        llms[spec] = quantspec.load(
            arguments.model, method=method, **given | dict(engine_setting(spec, each) for each in settings)
        )
    return llms


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="GSM8K-form JSON lines; the last ones are used")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--methods", default="eagle,cascade,draft,lookup")
    parser.add_argument("--model", default="default")
    parser.add_argument("--draft-model", help="the intermediate")
    parser.add_argument("--head", help="the target's EAGLE head")
    parser.add_argument("--eagle3-head", help="the target's EAGLE-3 head")
    parser.add_argument("--peagle-head", help="the target's P-EAGLE head")
    parser.add_argument("--medusa-head", help="the target's Medusa heads")
    parser.add_argument("--cascade-head", help="the intermediate's EAGLE head")
    parser.add_argument("--min-draft", type=int)
    parser.add_argument("--tree-depth", type=int)
    parser.add_argument("--tree-top-k", type=int)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    try:
        prompts, llms = questions(options.prompts, options.limit), load_methods(options)
    except UsageError as error:
        parser().error(f"{error}. hint: {error.hint}" if error.hint else str(error))
    intermediate = load_model(options.draft_model or "default/intermediate-w4")
    report: dict[str, Any] = {"prompts": len(prompts), "max_new_tokens": options.max_new_tokens}
    for setting, sampling in SETTINGS.items():
        results = []
        for i, prompt in enumerate(prompts):
            params = SamplingParams(max_new_tokens=options.max_new_tokens, seed=i, **sampling)  # type: ignore[arg-type]
            results.append(measure(llms, intermediate, prompt, params))
            print(f"\r{setting} {i + 1}/{len(prompts)}", end="", file=sys.stderr)
        print(file=sys.stderr)
        report[setting] = summary(results)
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
