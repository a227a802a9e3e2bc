"""How good a drafter is, on held-out text that its base wrote: acceptance as it generates, and tau."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantspec.calibrate.train.rollout import Rollouts
from quantspec.types import SamplingParams

if TYPE_CHECKING:
    from quantspec.calibrate.train.features import OnlineFeatures
    from quantspec.calibrate.train.trainer import Guess, Method
    from quantspec.engine.stats import Stats

TREE_NODES, TREE_DEPTH, TREE_TOP_K = 15, 6, 4
_TAUS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
_MAX_TEXTS = 60
_FAR = -50.0  # of a token that the drafter cannot say: as bad under every tau
LOOP = 0.6
"""Below this share of distinct 4-grams a text counts as a loop."""


def tree_acceptance(base: Path, method: str, head: Path, texts: Rollouts) -> float:
    """Tokens per forward of the base, the prompt's not counted, when it writes the held-out texts' greedy answers with
    that drafter."""
    stats = draft_greedy_texts(base, method, head, texts)
    return sum(each.new_tokens - 1 for each in stats) / max(1, sum(each.target_forwards for each in stats))


def draft_greedy_texts(base: Path, method: str, head: Path, texts: Rollouts) -> list[Stats]:
    """What it took the base, with that drafter, to write the held-out texts' greedy answers again."""
    from quantspec.engine.llm import load

    llm = load(
        str(base), method=method, head=str(head), num_speculative_tokens=TREE_NODES, tree_depth=TREE_DEPTH,
        tree_top_k=TREE_TOP_K,
    )  # fmt: skip
    stats = []
    for index in greedy_texts(texts):
        start, end = int(texts.starts[index]), int(texts.starts[index + 1])
        prompt = texts.ids[start : start + int(texts.prompt_lens[index])].tolist()
        completion = llm.generate(prompt, SamplingParams(max_new_tokens=end - start - len(prompt)))
        assert not isinstance(completion, list)
        stats.append(completion.stats)
    return stats


def chain_acceptance(agrees: list[list[bool]], length: int) -> float:
    """Tokens per target forward when a drafter proposes `length` tokens at a time; `agrees` per generated position."""
    committed = rounds = 0
    for text in agrees:
        at = 0
        while at < len(text):
            run = next((i for i, hit in enumerate(text[at : at + length]) if not hit), min(length, len(text) - at))
            gain = min(run + 1, len(text) - at)
            at, committed, rounds = at + gain, committed + gain, rounds + 1
    return committed / max(1, rounds)


def greedy_texts(texts: Rollouts) -> list[int]:
    """Greedy texts that do not repeat themselves: a loop is easy to draft and would flatter every figure."""
    greedy = [i for i in range(len(texts)) if texts.temperatures[i] == 0]
    return [i for i in greedy if distinct_4grams(texts, i) >= LOOP][:_MAX_TEXTS]


def distinct_4grams(texts: Rollouts, index: int) -> float:
    """Share of different ones among the runs of four generated tokens of a text."""
    first, end = int(texts.starts[index] + texts.prompt_lens[index]), int(texts.starts[index + 1])
    grams = texts.ids[first:end].unfold(0, 4, 1).tolist() if end - first >= 4 else []
    return len(set(map(tuple, grams))) / len(grams) if grams else 1.0


@torch.no_grad()
def fit_tau(method: Method, features: OnlineFeatures, texts: Rollouts) -> dict[str, float]:
    """`fit_taus` of a head's first two draft steps."""
    device = str(features.base.model.norm.weight.device)
    return fit_taus(lambda index: islice(method.guesses(features.fill(texts.batch([index]).to(device))), 2), texts)


@torch.no_grad()
def fit_taus(
    guesses: Callable[[int], Iterable[Guess]], texts: Rollouts, temperatures: tuple[float, ...] = (0.0, 0.8, 1.0)
) -> dict[str, float]:
    """Of logits [n, V] of verifier and drafter, for each of the texts, per temperature the tau for which
    softmax((log q - log E) / tau) finds the verifier's draw likeliest.

    E is the exponential noise that drafter and verifier share: the verifier draws argmax(log p - log E). At temperature
    0 there is none, and the verifier takes argmax p.
    """
    result = {}
    for temperature in temperatures:
        generator = torch.Generator().manual_seed(0)
        likelihood = torch.zeros(len(_TAUS), dtype=torch.float64)
        drawn_at = [i for i in range(len(texts)) if abs(float(texts.temperatures[i]) - temperature) < 1e-3][:_MAX_TEXTS]
        chosen = drawn_at if temperature else greedy_texts(texts)
        for index in chosen or range(min(len(texts), _MAX_TEXTS)):
            for truth, guess in guesses(index):
                if temperature:
                    surprise = -torch.empty(truth.shape).exponential_(generator=generator).log().to(truth)
                    truth = (truth / temperature).log_softmax(-1) + surprise
                    guess = (guess / temperature).log_softmax(-1) + surprise
                drawn = truth.argmax(-1, keepdim=True)
                found = [(guess / t).log_softmax(-1).gather(1, drawn).clamp_min(_FAR) for t in _TAUS]
                likelihood += torch.stack([rows.double().sum().cpu() for rows in found])
        result[f"{temperature:g}"] = _TAUS[int(likelihood.argmax())]
    return result
